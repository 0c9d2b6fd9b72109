"""Judge a generated program by its tests, and survive it. Linux only.

    run(program, tests, "add")          # None where it passes, or what went wrong, in one line

**The verdict** is given by a process in which the program never was. The program runs in one, the tests in another,
where a stand-in takes the place of the function under test: a call sends its arguments to the first process, and the
result comes back as plain data (JSON, from which numbers, texts, lists, tuples, sets, dicts and the like are built
anew; a subclass as its plain base, any other iterable as an iterator, other objects not at all). The program sees
neither the tests nor any object, file or memory of the process that judges: its `__eq__`, its patched builtins, its
exit code and its frames stay on its own side, and all it can do is answer.

Each process is this file as a script: a fresh interpreter in its own session, with six variables and an empty stdin,
which confines itself before it executes anything. They share a fresh directory, removed afterwards, and a wall clock.

**The first line is the kernel's**, and needs no privileges.

* Limits on CPU seconds, address space, the size of a file, open files and core dumps, and *no* new processes or
  threads. The last one does not bind root, so a root process first becomes `nobody`. Where `nobody` cannot read the
  interpreter's library (it may live under /root) it keeps one capability, to read, or at worst to pass by file
  permissions, as in a container that does not grant the first.
* Landlock (Linux 5.13 and later): changing files only inside the directory; reading only there and in the libraries of
  Python and the system, so no data set, no home and no /proc; executing nothing; no look into other processes. From
  Linux 6.7 on no TCP either, from 6.12 on no signal to the outside.
* When the tests end, or the time does, both processes are killed (SIGKILL cannot be ignored).

**The second line is Python's**: an audit hook, which Python code cannot take off again, refuses new processes, signals,
sockets, databases, foreign functions, and any change to a file outside the directory, under whatever name it is asked
for. Without Landlock it is all that guards your files (`run` then warns once). It stops accidents, not attacks.

**Not covered**

* UDP and Unix sockets; chmod and chown of libraries that are yours. Only the second line stands before them, and native
  code (a buggy extension module, hand-made bytecode) steps past that. Names and sizes of files can be seen anywhere.
* Without Landlock, besides: reading what the user may read, the tests' file included; and what Python's hooks are not
  told of: mkfifo, mknod, `os.open` with dir_fd, `signal.pidfd_send_signal`, modules like dbm that open files.
* Filling the disk with many small files while the clock runs (they are removed afterwards).
* Tests that a wrong answer passes. Bugs in the kernel: for programs by somebody who wishes you harm, use a virtual
  machine.
"""

import builtins
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Iterable
from contextlib import suppress

TIMEOUT = 10.0  # seconds of wall clock, interpreter start included
MEMORY = 1 << 30  # bytes of address space
FILE_SIZE = 16 << 20  # bytes, per file
OPEN_FILES = 64
REASON_LENGTH = 200  # characters of an error message


def run(program: str, tests: str, function: str, timeout: float = TIMEOUT, memory: int = MEMORY) -> str | None:
    """Execute `program`, then `tests`, in which `function` names what the program defines and the tests call. Returns
    None where they end without an error, else what went wrong. timeout in seconds, memory in bytes. Raises OSError
    where programs cannot be confined: that is no verdict on the program."""
    if sys.platform != "linux":
        raise OSError(f"generated programs run on Linux only (their limits are the kernel's), not on {sys.platform}")
    task = {"program": program, "tests": tests, "function": function, "memory": memory, "cpu": int(timeout) + 1}
    home = tempfile.mkdtemp(prefix="nanoedit-")
    variables = {
        "PATH": os.defpath, "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",  # or the order of a set of strings, and some verdicts, would change from run to run
        "OPENBLAS_NUM_THREADS": "1",  # numpy would start threads when imported, and may not
    }  # fmt: skip
    python = [sys.executable, "-P", "-s", "-B", os.path.abspath(__file__)]  # -I, but with our variables
    options = {"cwd": home, "env": variables, "start_new_session": True, "stderr": subprocess.DEVNULL}
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    ours, theirs = socket.socketpair()
    number = ours.fileno()
    try:
        with (
            subprocess.Popen([*python, str(number)], stdin=pipe, stdout=pipe, pass_fds=[number], **options) as judge,
            subprocess.Popen(python, stdin=theirs, stdout=nowhere, **options) as defendant,
        ):
            ours.close(), theirs.close()  # so that each of the two sees the other one end
            try:
                return _verdict(judge.communicate(json.dumps(task).encode(), timeout)[0])
            except subprocess.TimeoutExpired:
                return f"timed out after {timeout:g} s"
            finally:
                judge.kill()
                os.killpg(defendant.pid, signal.SIGKILL)  # not yet reaped, so the number is still this group's
    finally:  # programs can take permissions away, and nest folders deeper than Python's recursion
        for command in (["chmod", "-R", "u+rwx", home], ["rm", "-rf", home]):
            subprocess.run(command, stderr=subprocess.DEVNULL, check=False)


def _verdict(report: bytes) -> str | None:
    """What the judge's report says; it is empty where the judge was killed."""
    said = json.loads(report or '{"setup_error": "", "landlock": 1, "reason": "its tests ended without a verdict"}')
    if said["setup_error"]:
        raise OSError(f"cannot confine a generated program: {said['setup_error']}")
    if not said["landlock"]:  # Python shows a warning once
        warnings.warn("no Landlock here: only an audit hook keeps generated programs off your files", stacklevel=1)
    return said["reason"]


# ------------------------------------------------------------------------------------------------------- plain data

PLAIN = {kind.__name__.lower(): kind for kind in (list, tuple, set, frozenset, bytes, dict, complex, Iterable)}


def encode(value):
    """Plain data as JSON can hold it: a scalar, or [type, parts]. Raises TypeError for anything else."""
    if getattr(value, "shape", None) == ():  # a number of numpy's
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    kind = next((name for name, kind in PLAIN.items() if isinstance(value, kind)), None)
    if not kind:
        raise TypeError(f"an object of type {type(value).__name__} is not plain data")
    value = list(value.items()) if kind == "dict" else [value.real, value.imag] if kind == "complex" else value
    return [kind, [encode(part) for part in value]]


def decode(value):
    """What `encode` made of a value, built anew of builtin types. Raises an exception for what it did not make."""
    if not isinstance(value, list):
        return value
    kind, parts = value[0], [decode(part) for part in value[1]]
    return {"iterable": iter, "complex": lambda parts: complex(*parts)}.get(kind, PLAIN[kind])(parts)


# ------------------------------------------------------------------------------------------ the sides that are confined


def _judge(link) -> None:
    """The side of the tests: read a task, confine, send the program to the other side, execute the tests, report."""
    task = json.load(sys.stdin)
    out, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115

    def ask(question):
        print(json.dumps(question), file=link, flush=True)
        answer, *error = json.loads(link.readline() or '[null, "EOFError", "the program ended before its tests did"]')
        if not error:
            return decode(answer)
        base = getattr(builtins, error[0], None)
        base = base if isinstance(base, type) and issubclass(base, Exception) else Exception
        raise type(error[0], (base,), {"__init__": Exception.__init__, "__str__": Exception.__str__})(error[1])

    report, place = {"setup_error": "", "landlock": 0, "reason": None}, "setup_error"
    try:
        report["landlock"] = _confine(task["memory"], task["cpu"])
        place = "reason"
        module = sys.modules["tests"] = types.ModuleType("tests")  # dataclasses and pickle look theirs up
        vars(module)[task["function"]] = lambda *args, **kwargs: ask(encode([args, kwargs]))
        tests = compile(task.pop("tests"), "<tests>", "exec")
        ask(task)
        exec(tests, vars(module))
    except BaseException as error:
        report[place] = f"{type(error).__name__}: {error}".split("\n")[0][:REASON_LENGTH]
    print(json.dumps(report), file=out, flush=True)
    os._exit(0)


def _defend(link) -> None:
    """The side of the program: confine, execute it, and answer calls of its function for as long as there are some."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the link has a number of its own; the program finds an empty stdin
    task = json.loads(link.readline())
    _confine(task["memory"], task["cpu"])
    module = sys.modules["program"] = types.ModuleType("program")

    def execute(line: str):
        if line is None:
            return exec(compile(task["program"], "<program>", "exec"), vars(module))
        args, kwargs = decode(json.loads(line))
        return eval(task["function"], vars(module))(*args, **kwargs)

    line = None
    while line != "":
        try:
            answer = [encode(execute(line))]
        except BaseException as error:  # SystemExit too: leaving early is not passing
            answer = [None, type(error).__name__, str(error)[:REASON_LENGTH]]
        link.write(json.dumps(answer) + "\n")
        link.flush()
        line = link.readline()


def _confine(memory: int, cpu_seconds: int) -> int:
    """Both lines. Returns Landlock's version, 0 where there is none; raises OSError when a limit cannot be set."""
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
    call("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: no process of the same user looks into this one
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
    sys.addaudithook(_second_line(os.getcwd()))
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
    """Deny every change to the file system outside `home`, reading outside it and the libraries, every execve, TCP, and
    signals to the outside. The bits are those of linux/landlock.h; a version knows those of the versions before it."""
    create_ruleset, add_rule, restrict_self = 444, 445, 446  # the same numbers on every architecture
    try:
        version = call("syscall", create_ruleset, None, 0, 1)
    except OSError:
        return 0
    execute, write, read_file, read = 1 << 0, 1 << 1, 1 << 2, 1 << 2 | 1 << 3
    everything = (1 << 13 + min(version - 1, 2)) - 1  # 13 bits; then renaming across, truncating
    tcp = 0b11 if version >= 4 else 0  # bind, connect
    scoped = 0b11 if version >= 6 else 0  # abstract Unix sockets, signals
    rules = call("syscall", create_ruleset, struct.pack("=3Q", everything, tcp, scoped), 24, 0)
    allowed = dict.fromkeys([*sys.path, sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64"], read)
    allowed |= dict.fromkeys(["/etc/ld.so.cache", "/etc/localtime", "/dev/urandom"], read_file)
    allowed |= {os.devnull: read_file | write, home: everything - execute}
    for path in filter(os.path.exists, allowed):
        bits = allowed[path] if os.path.isdir(path) else allowed[path] & (read_file | write)
        call("syscall", add_rule, rules, 1, struct.pack("=Qi", bits, os.open(path, os.O_PATH)), 0)
    call("syscall", restrict_self, rules, 0)
    return version


def _second_line(home: str):
    """An audit hook (PEP 578). It sees the operation, not the name: `from os import unlink as tidy` gains nothing."""
    refused = {"os.fork", "os.forkpty", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "subprocess.Popen"}
    refused |= {"os.kill", "os.killpg", "signal.pthread_kill", "socket.__new__", "ctypes.dlsym", "resource.setrlimit"}
    refused |= {"resource.prlimit", "sqlite3.connect"}  # in SQL, ATTACH opens files
    # where an event has its paths, and the descriptors of the folders that they are relative to (dir_fd=...)
    places = dict.fromkeys(["os.truncate", "os.setxattr", "os.removexattr"], ((0, None),))
    changing = ["os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.utime", "shutil.rmtree"]
    places |= dict.fromkeys(changing, ((0, -1),)) | {"os.symlink": ((0, -1), (1, -1))}
    places |= dict.fromkeys(["os.rename", "os.link"], ((0, -2), (1, -1)))
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    inside, real_path, join, decode = os.path.realpath(home) + os.sep, os.path.realpath, os.path.join, os.fsdecode

    def hook(event: str, arguments: tuple) -> None:
        if event in refused:
            raise PermissionError(f"{event} is not available to generated programs")
        opens_to_write = event == "open" and arguments[2] & writing and not isinstance(arguments[0], int)
        for i, j in ((0, None),) if opens_to_write else places.get(event, ()):
            path, folder = arguments[i], -1 if j is None else arguments[j]
            path, folder = ("", path) if isinstance(path, int) else (decode(path), folder)
            where = path if folder in (-1, None) else join(f"/proc/self/fd/{folder}", path)
            if path != os.devnull and not (real_path(where) + os.sep).startswith(inside):
                raise PermissionError(f"{event}: {path or folder} is outside the program's own directory")

    return hook


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _judge(socket.socket(fileno=int(sys.argv[1])).makefile("rw"))
    else:
        _defend(socket.socket(fileno=os.dup(0)).makefile("rw"))
