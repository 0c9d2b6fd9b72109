"""Run a generated program against its tests, and survive it. Linux only.

    run(program, tests)          # "passed", or what went wrong, in one line

The program gets a fresh interpreter in a fresh, empty directory that is removed afterwards, its own session, an
environment of six variables, an empty stdin and a wall clock; its output is thrown away. It has passed when, and only
when, the last line of its tests was reached: the interpreter then writes a random token to a pipe. The token came
through stdin, so it stands in no file, no argument and no variable of the environment; `sys.exit(0)` half-way is a
failure like any other. `run` starts this file again as a script, which confines itself before it executes anything.

**The first line is the kernel's**, and needs no privileges.

* Limits on CPU seconds, address space, the size of a file, open files and core dumps, and *no* new processes or
  threads. The last one does not bind root, so a root process first becomes `nobody`. Where `nobody` cannot read the
  interpreter's library (it may live under /root) it keeps one capability, to read, or at worst to pass by file
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
import signal
import struct
import subprocess
import sys
import tempfile
import types
import warnings
from contextlib import suppress

TIMEOUT = 10.0  # seconds of wall clock, interpreter start included
MEMORY = 1 << 30  # bytes of address space
FILE_SIZE = 16 << 20  # bytes, per file
OPEN_FILES = 64
REASON_LENGTH = 200  # characters of an error message: a pipe takes so short a report in one piece


def run(program: str, tests: str, timeout: float = TIMEOUT, memory: int = MEMORY) -> str:
    """Execute `program`, then `tests` in the same namespace. Returns "passed" or what went wrong. timeout in seconds,
    memory in bytes. Raises OSError where programs cannot be confined: that is no verdict on the program.
    """
    if sys.platform != "linux":
        raise OSError(f"generated programs run on Linux only (their limits are the kernel's), not on {sys.platform}")
    token = secrets.token_hex(16)
    task = {"token": token, "program": program, "tests": tests, "memory": memory, "cpu": int(timeout) + 1}
    home = tempfile.mkdtemp(prefix="nanoedit-")
    variables = {
        "PATH": os.defpath, "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",  # or the order of a set of strings, and some verdicts, would change from run to run
        "OPENBLAS_NUM_THREADS": "1",  # numpy would start threads when imported, and may not
    }  # fmt: skip
    command = [sys.executable, "-P", "-s", "-B", os.path.abspath(__file__)]  # -I, but with our variables
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    try:
        with subprocess.Popen(command, cwd=home, env=variables, start_new_session=True, **pipes) as child:
            try:
                with suppress(BrokenPipeError), child.stdin:  # the child may have died; then its report is empty
                    child.stdin.write(json.dumps(task).encode())
                if not select.select([child.stdout], [], [], timeout)[0]:
                    return f"timed out after {timeout:g} s"
                report = os.read(child.stdout.fileno(), select.PIPE_BUF)  # it was written in one piece
            finally:
                os.killpg(child.pid, signal.SIGKILL)  # not yet reaped, so the number is still this group's
    finally:  # programs can take permissions away, and nest folders deeper than Python's recursion
        for command in (["chmod", "-R", "u+rwx", home], ["rm", "-rf", home]):
            subprocess.run(command, stderr=subprocess.DEVNULL, check=False)
    return _verdict(report, token)


def _verdict(report: bytes, token: str) -> str:
    """What a report says, if it is one: nobody else knows the token that it begins with."""
    if not report.startswith(token.encode()):
        return "wrote to the pipe that carries the verdict" if report else "ended before its tests did"
    said = json.loads(report[len(token) :])
    if said["setup_error"]:
        raise OSError(f"cannot confine a generated program: {said['setup_error']}")
    if not said["landlock"]:  # Python shows a warning once
        warnings.warn("no Landlock here: only an audit hook keeps generated programs off your files", stacklevel=1)
    return said["verdict"]


# -------------------------------------------------------------------------------------------- the side that is confined


def _child() -> None:
    """Read a task, confine, execute, report. Reading stdin to its end leaves the program nothing to read, and it finds
    its output thrown away: the pipe that stdout was has another number."""
    task = json.load(sys.stdin)
    pipe = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    report = {"setup_error": "", "landlock": 0, "verdict": ""}
    module = types.ModuleType("program")
    sys.modules["program"] = module  # dataclasses and pickle look theirs up
    execute, write, leave, dumps = exec, os.write, os._exit, json.dumps  # before the program can replace them
    try:
        report["landlock"] = _confine(task["memory"], task["cpu"])
    except (OSError, ValueError) as error:
        report["setup_error"] = str(error)
    else:
        sys.addaudithook(_second_line(os.getcwd()))
        try:
            stages = [compile(task[part], f"<{part}>", "exec") for part in ("program", "tests")]
            for stage in stages:
                execute(stage, module.__dict__)
            report["verdict"] = "passed"
        except BaseException as error:  # SystemExit too: leaving early is not passing
            report["verdict"] = f"{type(error).__name__}: {error}".split("\n")[0][:REASON_LENGTH]
    write(pipe, (task["token"] + dumps(report)).encode())
    leave(0)


def _confine(memory: int, cpu_seconds: int) -> int:
    """The first line. Returns Landlock's version, 0 where there is none; raises OSError when a limit cannot be set."""
    import ctypes
    import resource

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
    limits = {"CPU": cpu_seconds, "AS": memory, "FSIZE": FILE_SIZE, "NOFILE": OPEN_FILES, "CORE": 0, "NPROC": 0}
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)  # never more than we have been given
        resource.setrlimit(kind, (value, value))
    if os.geteuid() == 0:
        with suppress(BlockingIOError):  # the limit binds this root, of a user namespace
            os.fork() or os._exit(0)
            raise ValueError("root may not become nobody here, and no limit binds it; evaluate as another user")
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
        rule = struct.pack("=Qi", allowed, os.open(path, os.O_PATH))
        call("syscall", add_rule, rules, 1, rule, 0)
    call("syscall", restrict_self, rules, 0)
    return version


def _second_line(home: str):
    """An audit hook (PEP 578). It sees the operation, not the name: `from os import unlink as tidy` gains nothing."""
    refused = {"os.fork", "os.forkpty", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "subprocess.Popen"}
    refused |= {"os.kill", "os.killpg", "signal.pthread_kill", "socket.__new__", "ctypes.dlsym", "resource.setrlimit"}
    changing = "remove rmdir mkdir truncate chmod chown utime setxattr removexattr"
    paths_of = {f"os.{name}": 1 for name in changing.split()} | {"shutil.rmtree": 1}
    paths_of |= {"os.rename": 2, "os.link": 2, "os.symlink": 2}
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    inside, real_path, decode = os.path.realpath(home) + os.sep, os.path.realpath, os.fsdecode

    def hook(event: str, arguments: tuple) -> None:
        if event in refused:
            raise PermissionError(f"{event} is not available to generated programs")
        opens_to_write = event == "open" and arguments[2] & writing
        for path in arguments[: 1 if opens_to_write else paths_of.get(event, 0)]:
            if isinstance(path, int) or decode(path) == os.devnull:  # a file that is open already
                continue
            if not (real_path(decode(path)) + os.sep).startswith(inside):
                raise PermissionError(f"{event}: {decode(path)} is outside the program's own directory")

    return hook


if __name__ == "__main__":
    _child()
