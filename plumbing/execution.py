"""Run a generated program against its tests, and survive it. Linux only.

    result = run(program, tests)          # Result(passed, reason, seconds)

The program gets a fresh interpreter in a fresh, empty directory that is removed afterwards, its own session, an
environment of six variables, an empty stdin and a wall clock. It has passed when, and only when, the last line of its
tests was reached: the interpreter then writes a random token to a pipe. The token came through stdin, so it stands in
no file, no argument and no variable of the environment; `sys.exit(0)` half-way is a failure like any other. Output is
thrown away. This file plays both parts: `run` starts it again as a script, and the script confines itself before it
executes anything it was given.

**The first line is the kernel's**, and needs no privileges.

* Limits on CPU seconds, address space, the size of a file, open files and core dumps, and *no* new processes or
  threads. The last one does not bind root, so a root process first becomes `nobody`. Where `nobody` cannot read the
  interpreter's library (it may well live under /root) it keeps one capability, to read, or at worst to pass by file
  permissions, as in a container that does not grant the first.
* Landlock (Linux 5.13 and later): writing, creating, renaming, truncating and removing only inside the program's own
  directory; executing nothing. From Linux 6.7 on no TCP either, from 6.12 on no signal to a process outside.
* When the program ends, or its time does, its whole process group is killed (SIGKILL cannot be ignored).

**The second line is Python's**: an audit hook, which Python code cannot take off again, refuses new processes, signals,
sockets, foreign functions, and any change to a file outside the directory, under whatever name it is asked for. On a
kernel without Landlock it is all that guards your files (`run` then warns once). It stops accidents, not attacks.

**Not covered**

* Reading. The program can read what the user who runs the evaluation can read. When that is root, it is what `nobody`
  can read, or everything if the capability was needed.
* A program that means to cheat. It shares an interpreter with its tests: it can find the token in the frames above it,
  or return an object that is equal to everything.
* UDP and Unix sockets, chmod and chown of your own files. Only the second line stands before them, and native code (a
  buggy extension module, hand-made bytecode) steps past that. Without Landlock the same goes for writing and removing.
* Filling the disk with many small files while the clock runs (they are removed afterwards).
* Bugs in the kernel. For programs by somebody who wishes you harm, use a virtual machine.
"""

import json
import os
import secrets
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import types
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

TIMEOUT = 10.0  # seconds of wall clock, interpreter start included
MEMORY = 1 << 30  # bytes of address space
FILE_SIZE = 16 << 20  # bytes, per file
OPEN_FILES = 64
REASON_LENGTH = 200  # characters of an error message that are kept


@dataclass(frozen=True)
class Result:
    passed: bool
    reason: str  # "passed", or what went wrong, in one line
    seconds: float  # wall clock


# ----------------------------------------------------------------------------------------------- the side that survives


def run(program: str, tests: str, timeout: float = TIMEOUT, memory: int = MEMORY) -> Result:
    """Execute `program`, then `tests` in the same namespace; passed when the tests' last line was reached in time.

    `timeout` in seconds, `memory` in bytes. Raises OSError when the confinement itself cannot be set up (that is no
    verdict on the program), or on a system other than Linux.
    """
    if sys.platform != "linux":
        raise OSError(f"generated programs run on Linux only (their limits are the kernel's), not on {sys.platform}")
    token, started = secrets.token_hex(16), time.monotonic()
    home = tempfile.mkdtemp(prefix="nanoedit-")
    report_in, report_out = os.pipe()
    task = {"token": token, "program": program, "tests": tests, "report": report_out}
    task |= {"memory": memory, "cpu": int(timeout) + 1}
    try:
        with os.fdopen(report_in, "rb", buffering=0) as report:
            child = _start(home, report_out)
            try:
                with suppress(BrokenPipeError), child.stdin:  # the child may have died; then the report is empty
                    child.stdin.write(json.dumps(task).encode())
                line = _first_line(report, started + timeout)
            finally:
                os.killpg(child.pid, signal.SIGKILL)  # not yet reaped, so the number is still this group's
                child.wait()
    finally:
        _remove(home)
    reason = _reason(line, token, timeout)
    return Result(reason == "passed", reason, time.monotonic() - started)


def _remove(folder: str) -> None:
    """Also when the program has taken permissions away, or nested folders deeper than Python's recursion."""
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):
        for command in (["chmod", "-R", "u+rwx", folder], ["rm", "-rf", folder]):
            subprocess.run(command, stderr=subprocess.DEVNULL, check=False)


def _start(home: str, report_out: int) -> subprocess.Popen:
    """This file as a script. `-P -s` with an environment of our own isolates as `-I` does, and fixes the hash seed:
    otherwise the order of a set of strings, and with it some verdicts, would change from run to run."""
    variables = {"PATH": os.defpath, "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    variables["OPENBLAS_NUM_THREADS"] = "1"  # numpy would start threads when imported, and may not
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-s", "-B", os.path.abspath(__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=home,
            env=variables,
            pass_fds=[report_out],
            start_new_session=True,
        )
    finally:
        os.close(report_out)  # ours; the child's copy is now the only one, and closes with it


def _first_line(report, deadline: float) -> bytes | None:
    """What the child wrote up to the first newline; what there is when it ends without one; None at the deadline."""
    received = b""
    while b"\n" not in received and len(received) < 1 << 16:
        if not select.select([report], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return None
        chunk = report.read(4096)
        if not chunk:
            break
        received += chunk
    return received


def _reason(line: bytes | None, token: str, timeout: float) -> str:
    if line is None:
        return f"timed out after {timeout:g} s"
    try:
        report = json.loads(line)
        genuine = report["token"] == token
    except (ValueError, TypeError, KeyError):
        genuine = False
    if not genuine:
        return "ended before its tests did" if not line else "wrote to the pipe that carries the verdict"
    if report["setup_error"]:
        raise OSError(f"cannot confine a generated program: {report['setup_error']}")
    if not report["landlock"]:
        _warn_without_landlock()
    return report["reason"]


@cache
def _warn_without_landlock() -> None:
    message = "no Landlock in this kernel: only an audit hook keeps generated programs off your files"
    warnings.warn(message, stacklevel=4)


# -------------------------------------------------------------------------------------------- the side that is confined


def _child() -> None:
    """Read a task, confine, execute, report. Reading stdin to its end leaves the program nothing to read."""
    task = json.load(sys.stdin)
    os.set_inheritable(task["report"], False)
    answer = {"token": task["token"], "setup_error": "", "landlock": 0, "reason": ""}
    write, leave, dumps = os.write, os._exit, json.dumps  # before the program can put others in their places
    try:
        answer["landlock"] = _confine(task["memory"], task["cpu"])
    except (OSError, ValueError, ImportError) as error:
        answer["setup_error"] = str(error) or type(error).__name__
    else:
        sys.addaudithook(_second_line(os.getcwd()))
        answer["reason"] = _execute(task["program"], task["tests"])
    write(task["report"], dumps(answer).encode() + b"\n")
    leave(0)


def _execute(program: str, tests: str) -> str:
    """"passed", or the error in one line. The namespace is a real module: dataclasses and pickle look theirs up."""
    module = sys.modules["program"] = types.ModuleType("program")
    execute = exec  # the program may replace the builtin
    try:
        stages = [compile(text, name, "exec") for text, name in ((program, "<program>"), (tests, "<tests>"))]
        for stage in stages:
            execute(stage, module.__dict__)
    except BaseException as error:  # SystemExit too: leaving early is not passing
        return f"{type(error).__name__}: {error}".split("\n")[0][:REASON_LENGTH]
    return "passed"


def _confine(memory: int, cpu_seconds: int) -> int:
    """The first line. Returns Landlock's version, 0 where there is none; raises OSError when a limit cannot be set."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def call(function: str, *arguments):
        """A C function that answers -1 for an error. Numbers go as 64 bits: that is what a variadic `syscall` reads."""
        wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
        answer = getattr(libc, function)(*wide)
        if answer < 0:
            raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")
        return answer

    if os.geteuid() == 0:
        with suppress(OSError):  # a container may forbid it
            _become_nobody(call)
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: a set-uid program would gain nothing; Landlock asks for it
    version = _landlock(call, os.getcwd())
    _limit_resources(memory, cpu_seconds)
    if os.geteuid() == 0 and _can_fork():
        raise OSError("root may not become nobody here, and no limit binds it; evaluate as another user")
    return version


def _become_nobody(call) -> None:
    """From root to uid 65534, with no capability but the least that keeps the interpreter's library readable."""
    nobody, read_search, override = 65534, 1 << 2, 1 << 1  # CAP_DAC_READ_SEARCH, CAP_DAC_OVERRIDE
    with open("/proc/self/status") as status:
        permitted = int(next(line.split()[1] for line in status if line.startswith("CapPrm:")), 16)
    os.chown(".", nobody, nobody)
    call("prctl", 8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS: do not lose them all with the uid
    os.setgroups([])
    os.setresgid(nobody, nobody, nobody)
    os.setresuid(nobody, nobody, nobody)
    readable = os.access(os.__file__, os.R_OK) and os.access(sys.prefix, os.X_OK)
    kept = 0 if readable else permitted & read_search or permitted & override
    if not (readable or kept):
        raise ValueError(f"nobody cannot read {os.path.dirname(os.__file__)}; evaluate as a user other than root")
    header = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    call("capset", header, struct.pack("=6I", kept, kept, 0, 0, 0, 0))  # effective, permitted, inheritable; two words


def _can_fork() -> bool:
    try:
        child = os.fork()
    except OSError:
        return False
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return True


def _landlock(call, home: str) -> int:
    """Deny every change to the file system outside `home`, every execve, TCP, and signals to the outside.

    The bits are those of linux/landlock.h; a version knows the bits of the versions before it. Reading is left open.
    """
    create_ruleset, add_rule, restrict_self = 444, 445, 446  # the same numbers on every architecture
    try:
        version = call("syscall", create_ruleset, None, 0, 1)
    except OSError:
        return 0
    execute, read = 1 << 0, 1 << 2 | 1 << 3
    changes = (1 << 13 + min(version - 1, 2)) - 1 - execute - read  # 13 bits; then renaming across, truncating
    tcp = 0b11 if version >= 4 else 0  # bind, connect
    scoped = 0b11 if version >= 6 else 0  # abstract Unix sockets, signals
    rules = call("syscall", create_ruleset, struct.pack("=3Q", changes | execute, tcp, scoped), 24, 0)
    for path, allowed in ((home, changes), (os.devnull, 1 << 1)):
        folder = os.open(path, os.O_PATH)
        call("syscall", add_rule, rules, 1, struct.pack("=Qi", allowed, folder), 0)
        os.close(folder)
    call("syscall", restrict_self, rules, 0)
    os.close(rules)
    return version


def _limit_resources(memory: int, cpu_seconds: int) -> None:
    import resource

    limits = {"CPU": cpu_seconds, "AS": memory, "FSIZE": FILE_SIZE, "NOFILE": OPEN_FILES, "CORE": 0, "NPROC": 0}
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)  # never more than we have been given
        resource.setrlimit(kind, (value, value))


def _second_line(home: str):
    """An audit hook (PEP 578). It sees the operation, not the name: `from os import unlink as tidy` gains nothing."""
    refused = {"os.fork", "os.forkpty", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "subprocess.Popen"}
    refused |= {"os.kill", "os.killpg", "signal.pthread_kill", "socket.__new__", "ctypes.dlsym", "resource.setrlimit"}
    changing = {"os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.setxattr"}
    changing |= {"os.removexattr", "shutil.rmtree"}
    changing_two = {"os.rename", "os.link", "os.symlink"}
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    inside, real_path, decode = os.path.realpath(home) + os.sep, os.path.realpath, os.fsdecode

    def hook(event: str, arguments: tuple) -> None:
        if event in refused:
            raise PermissionError(f"{event} is not available to generated programs")
        if event in changing or (event == "open" and arguments[2] & writing):
            paths = arguments[:1]
        elif event in changing_two:
            paths = arguments[:2]
        else:
            return
        for path in paths:
            if isinstance(path, int) or decode(path) == os.devnull:  # a file that is open already
                continue
            if not (real_path(decode(path)) + os.sep).startswith(inside):
                raise PermissionError(f"{event}: {decode(path)} is outside the program's own directory")

    return hook


if __name__ == "__main__":
    _child()
