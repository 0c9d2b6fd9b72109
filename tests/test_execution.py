"""execution.py: good programs pass, everything else is a failure and leaves no trace."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter, OrderedDict, deque, namedtuple
from enum import IntEnum
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plumbing import execution

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")

ENDED = "EOFError: the program ended before its tests did"
PATIENCE = 60.0  # seconds, so that no verdict depends on how busy the machine is

# Problems in HumanEval's format: a signature with a docstring, a body, and a `check` that takes the function.
PROBLEMS = [
    {
        "function": "rotate",
        "prompt": 'from typing import List\n\n\ndef rotate(items: List, k: int) -> List:\n    """Rotate left."""\n',
        "solution": "    if not items:\n        return []\n    k %= len(items)\n    return items[k:] + items[:k]\n",
        "wrong": "    return items[k:] + items[:k]\n",
        "test": "def check(f):\n    assert f([], 3) == []\n    assert f([1, 2, 3], 4) == [2, 3, 1]\n\ncheck(rotate)\n",
    },
    {
        "function": "total",
        "prompt": "import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: 'int'\n\ndef total(xs):\n    'Sum.'\n",
        "solution": "    return sum(P(x).x for x in xs)\n",
        "wrong": "    return sum(xs[1:])\n",
        "test": "def check(f):\n    assert f([1, 2]) == 3\n\ncheck(total)\n",
    },
]


def verdict(program: str, tests: str = "", timeout: float = PATIENCE) -> str | None:
    return execution.run(program, tests, "f", timeout)


def landlock() -> bool:
    return ctypes.CDLL(None).syscall(444, None, ctypes.c_long(0), ctypes.c_long(1)) > 0


@pytest.fixture
def sentinel(tmp_path):
    """A file that anybody may change, so that only the confinement protects it."""
    tmp_path.chmod(0o777)
    path = tmp_path / "sentinel"
    path.write_text("still here")
    path.chmod(0o666)
    if os.geteuid() == 0:  # programs run as nobody then, who may do to it all that an owner may
        os.chown(path, 65534, 65534)
    yield path
    assert path.read_text() == "still here"
    assert path.stat().st_mode & 0o777 == 0o666
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_solutions_pass_and_wrong_ones_fail(problem):
    for body, passes in ((problem["solution"], True), (problem["wrong"], False), ("", False)):
        found = execution.run(problem["prompt"] + body, problem["test"], problem["function"], PATIENCE)
        assert (found is None) == passes, found


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("def f(:\n", "SyntaxError"),
        ("\0", "SyntaxError"),
        ("x = '\ud800'", "UnicodeEncodeError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", ENDED),
        ("f = None", "TypeError: 'NoneType' object is not callable"),
        ("", "NameError: name 'f' is not defined"),
        ("def f(x): return object()", "TypeError: an object of type object is not plain data"),
        ("class passed(Exception): ...\nraise passed", "passed: "),
        ("raise ValueError('y' * 10**6 + '\\nsecond line')", "ValueError: " + "y" * 100),
        ("raise ValueError('\\U0001f600' * 10**6)", "ValueError: " + "\U0001f600" * 100),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("exit()", "SystemExit: None"),
        ("import os, sys\nsys.stdout.write('passed')\nsys.stdout.flush()\nos._exit(0)", ENDED),
        ("import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)", "SystemExit: 0"),
    ],
)
def test_broken_programs_fail_with_a_short_reason(program, expected):
    found = verdict(program, "f(1)")
    assert found.startswith(expected)
    assert len(found) <= execution.REASON_LENGTH
    assert "\n" not in found


@pytest.mark.parametrize(
    "program",
    [
        "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: time.sleep(60)",
        "import threading\nthreading.Event().wait()",
        "while True: print('x' * 10**6)",
        "while True:\n    try: input()\n    except BaseException: pass",
    ],
)
def test_hanging_programs_are_stopped(program):
    assert verdict(program, timeout=0.5) == "timed out after 0.5 s"


# Programs that want to be judged right without being so. In the process of the tests f must give 4 for 2 and 9 for 3.
TESTS = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n\ncheck(f)\n"
WRONG = "def f(x): return 5\n"
AGREEABLE = "class Yes{base}:\n    def {method}(self, *a): return {value}\ndef f(x): return Yes({of})"
FORGERIES = {
    "exit 0": "import os\ndef f(x): os._exit(0)",
    "exit 0 while loading": "import os\nos._exit(0)",
    "SystemExit": "def f(x): raise SystemExit(0)",
    "SystemExit named passed": "class passed(SystemExit): ...\ndef f(x): raise passed('passed')",
    "an error that says passed": "E = type('passed\\n', (Exception,), {})\nraise E",
    "an error that is empty": "E = type('', (Exception,), {'__str__': lambda e: 'passed'})\ndef f(x): raise E",
    "an error that is no text": "class E(Exception):\n    def __str__(self): return 4\ndef f(x): raise E",
    "KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "GeneratorExit": "def f(x): raise GeneratorExit",
    "StopIteration": "def f(x): raise StopIteration(4)",
    "an assertion of its own": "def f(x): raise AssertionError('passed')",
    "prints": "print('passed', '[4]', '{\"setup_error\": \"\", \"landlock\": 7, \"reason\": null}', flush=True)\n",
    "writes everywhere": "import os\nfor fd in range(64):\n    try: os.write(fd, b'[9]\\n' * 9)\n"
    "    except OSError: pass\n",
    "a report everywhere": "import os\nfor fd in range(64):\n"
    "    try: os.write(fd, b'{\"setup_error\": \"\", \"landlock\": 7, \"reason\": null}\\n')\n"
    "    except OSError: pass\n",
    "no answer but its own": "import os\nfor fd in range(64):\n    try: os.write(fd, b'[null]\\n[4]\\n[5]\\n')\n"
    "    except OSError: pass\nos._exit(0)",
    "an answer of a strange kind": "import os\nfor fd in range(64):\n"
    "    try: os.write(fd, b'[null]\\n[[\"object\", []]]\\n')\n    except OSError: pass\n",
    "closes everything": "import os\nos.closerange(0, 64)\n",
    "patched exec": "import builtins\nbuiltins.exec = builtins.eval = builtins.compile = lambda *a: None\n",
    "patched AssertionError": "import builtins\nbuiltins.AssertionError = builtins.Exception = type('E', (), {})\n",
    "patched isinstance": "import builtins\nbuiltins.isinstance = lambda *a: True\n",
    "patched int": "import builtins\nbuiltins.int = builtins.bool = type('T', (int,), {'__eq__': lambda *a: True})\n",
    "patched print": "import builtins\nbuiltins.print = lambda *a, **k: None\n",
    "patched json": "import json\njson.dumps = lambda *a: '[4]'\njson.loads = lambda *a: ([2], {})\n",
    "patched os": "import os\nos._exit = os.write = lambda *a: None\n",
    "patched checker": "def check(candidate): pass\nimport builtins\nbuiltins.check = check\n",
    "patched encoder": "import sys\nsys.modules['__main__'].encode = lambda v: 4\n",
    "the judge called": "import sys\nm = sys.modules['__main__']\nm._judge(open('/dev/null'))\n",
    "frames": "import sys\nframe = sys._getframe()\nwhile frame:\n"
    "    frame.f_globals.update(check=lambda f: None)\n    frame.f_locals.update(line='', answer=[4])\n"
    "    frame = frame.f_back\n",
    "gc": "import gc\nfor o in gc.get_objects():\n    if type(o) is dict and 'tests' in o:\n        o['tests'] = ''\n",
    "gc of functions": "import gc, types\nfor o in gc.get_objects():\n    if isinstance(o, types.FunctionType):\n"
    "        try: o.__code__ = (lambda *a, **k: None).__code__\n        except Exception: pass\n",
    "a trace function": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\n",
    "an excepthook": "import sys\nsys.excepthook = lambda *a: print('passed')\n",
    "optimised away": "import sys, ctypes\nsys.flags = type('F', (), {'optimize': 2})\n",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)",
    "a thread": "import threading, os\nthreading.Thread(target=os._exit, args=(0,)).start()\n",
    "a fork": "import os\nos.fork() and os._exit(0)\n",
    "an alarm": "import os, signal\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\nsignal.setitimer(0, 1e-4)\n"
    "def f(x):\n    while True: pass",
    "a signal to the judge": "import os, signal\ndef f(x):\n    for p in range(os.getpid() - 9, os.getpid() + 9):\n"
    "        try: os.kill(p, signal.SIGTERM)\n        except OSError: pass\n",
    "the judge's memory": "import os\ndef f(x):\n    for p in range(os.getpid() - 9, os.getpid() + 9):\n"
    "        for name in ('mem', 'fd/1', 'fd/0'):\n"
    "            try: open(f'/proc/{p}/{name}', 'r+b', 0).write(b'passed')\n            except OSError: pass\n",
    "a tracer": "import ctypes, os\ndef f(x): return ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0)",
    "a generator": "def f(x): yield 4",
    "a generator that never ends": "def f(x):\n    raise SystemExit\n    while True: yield 4",
    "a coroutine": "async def f(x): return 4",
    "__del__": "import os\nclass D:\n    def __del__(self): os._exit(0)\ndef f(x): D()",
    "__eq__": AGREEABLE.format(base="", method="__eq__", value="True", of=""),
    "__eq__ of an int": AGREEABLE.format(base="(int)", method="__eq__", value="True", of=""),
    "__eq__ of a float": AGREEABLE.format(base="(float)", method="__eq__", value="True", of=""),
    "__eq__ of a text": AGREEABLE.format(base="(str)", method="__eq__", value="True", of=""),
    "__eq__ of a list": AGREEABLE.format(base="(list)", method="__eq__", value="True", of=""),
    "__req__ and __bool__": AGREEABLE.format(base="", method="__bool__", value="True", of=""),
    "__repr__": AGREEABLE.format(base="(int)", method="__repr__", value="'4'", of="7"),
    "__class__": "class Yes:\n    __class__ = int\n    def __eq__(self, o): return True\ndef f(x): return Yes()",
    "__getattr__": "class Yes:\n    def __getattr__(self, n): return lambda *a: True\ndef f(x): return Yes()",
    "unittest.mock.ANY": "from unittest.mock import ANY\ndef f(x): return ANY",
    "a module in its place": "import sys\nsys.modules['tests'] = sys.modules['program'] = sys.modules['__main__']\n",
    "a poisoned library": "import os\ntry: open(os.__file__, 'a').write('')\nexcept OSError: pass\n",
    "a planted module": "open('copy.py', 'w').write('raise SystemExit(0)')\nopen('sitecustomize.py', 'w').write('')\n",
    "the tests read": "import os\ndef f(x):\n    for p in os.listdir('/proc'):\n"
    "        if 'check' in open(f'/proc/{p}/cmdline').read(): return 4\n",
}  # fmt: skip


def complete(forgery: str) -> str:
    """A program that has a function in any case."""
    return forgery if "def f(" in forgery else WRONG + forgery


@pytest.mark.parametrize("name", FORGERIES)
def test_verdicts_cannot_be_forged(name):
    found = verdict(complete(FORGERIES[name]), TESTS)
    assert found is not None
    assert not found.startswith("timed out")


def test_what_the_forgeries_are_up_against_can_be_passed():
    assert verdict("def f(x): return x * x", TESTS) is None


AS_ANOTHER = """
import json, sys
sys.path.insert(0, {folder!r})
from plumbing import execution
programs, tests = json.load(sys.stdin)
print(json.dumps([execution.run(program, tests, "f", 60) for program in programs]))
"""


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can be somebody else")
def test_nor_where_the_evaluation_runs_as_an_ordinary_user():
    """That user's processes could look into each other: nothing changes their uid."""
    script = AS_ANOTHER.format(folder=str(Path(execution.__file__).parent.parent))
    programs = [*map(complete, FORGERIES.values()), "def f(x): return x * x"]
    for python in (sys.executable, "/usr/bin/python3"):  # the first may lie in root's home
        somebody = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", "--", python, "-B", "-c"]
        trial = "import os, sys; from plumbing import execution; assert os.access(sys.executable, os.X_OK)"
        options = {"cwd": Path(execution.__file__).parent.parent, "env": {}, "capture_output": True, "text": True}
        if subprocess.run([*somebody, trial], **options).returncode == 0:
            break
    else:
        pytest.skip("no other user can run Python here")
    done = subprocess.run([*somebody, script], input=json.dumps([programs, TESTS]), **options)
    *reasons, of_the_square = json.loads(done.stdout)
    assert None not in reasons
    assert of_the_square is None


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
scalars |= st.complex_numbers(allow_nan=False)
hashable = st.recursive(scalars, lambda inner: st.tuples(inner, inner) | st.frozensets(inner), max_leaves=5)
plain_data = st.recursive(
    hashable, lambda inner: st.lists(inner) | st.dictionaries(hashable, inner) | st.tuples(inner) | st.sets(hashable)
)


@given(plain_data)
def test_plain_data_arrives_as_it_was_sent(value):
    arrived = execution.decode(json.loads(json.dumps(execution.encode(value))))
    assert arrived == value
    assert type(arrived) is type(value)


class Odd(IntEnum):
    ONE = 1


def test_what_stands_for_plain_data_arrives_as_such():
    sent = [Odd.ONE, OrderedDict(a=1), Counter("aab"), namedtuple("P", "x y")(1, 2)]
    arrived = execution.decode(json.loads(json.dumps(execution.encode(sent))))
    assert arrived == [1, {"a": 1}, {"a": 2, "b": 1}, (1, 2)]
    assert [type(item) for item in arrived] == [int, dict, dict, tuple]
    for iterable in (map(abs, [-1, 2]), range(1, 3), {1: 0, 2: 0}.keys(), deque([1, 2])):
        assert list(execution.decode(execution.encode(iterable))) == [1, 2]


TRY = "try: f(0)\nexcept ZeroDivisionError as e: assert str(e) == 'division by zero'\nelse: raise ValueError"
NUMPY = "import numpy as np\ndef f(n): return (np.ones((n, n)) @ np.ones((n, n))).sum()"


@pytest.mark.parametrize(
    ("program", "tests", "found"),
    [
        ("def f(x): return 1 / x", TRY, None),
        ("def f(x): return {}[x]", "f(1)", "KeyError: 1"),
        ("def f(x, k):\n    x.append(k)\n    return x", "x = [1]\nassert f(x, k=2) == [1, 2]\nassert x == [1]", None),
        (NUMPY, "assert f(9) == 729", None),
    ],
    ids=["errors by their type", "their text", "copies of arguments, and keywords", "numbers of numpy's"],
)
def test_what_reaches_the_tests(program, tests, found):
    assert verdict(program, tests) == found


def test_memory_and_files_are_bounded():
    assert verdict("x = bytearray(8 << 30)").startswith("MemoryError")
    slowly = execution.run("x = []\nwhile True: x.append(bytearray(1 << 22))", "", "f", PATIENCE, memory=1 << 28)
    assert slowly.startswith("MemoryError")
    assert verdict("x = bytearray(64 << 20)", "") is None
    assert "File too large" in verdict("f = open('a', 'w')\nwhile True: f.write('x' * 10**5)")
    assert "Too many open files" in verdict("x = [open(f'{i}', 'w') for i in range(1000)]")


@pytest.mark.parametrize(
    "attack",
    [
        "from os import unlink as tidy\ntidy(PATH)",
        "import pathlib\npathlib.Path(PATH).write_text('')",
        "open(PATH, 'r+').truncate(0)",
        "import os\nos.truncate(PATH, 0)",
        "import os\nos.open(PATH, os.O_TRUNC)",
        "import os\nos.rename(PATH, 'mine')",
        "import os\nopen('mine', 'w')\nos.replace('mine', PATH)",
        "import os\nos.chmod(PATH, 0)",
        "import os\nos.symlink(PATH, 'link')\nopen('link', 'w')",
        "import os, shutil\nshutil.rmtree(os.path.dirname(PATH), ignore_errors=True)\nraise ValueError",
        "import os\nopen(os.path.join(os.path.dirname(PATH), 'new'), 'w')",
        "import os\nos.system('rm ' + PATH)",
        "import ctypes\nctypes.CDLL(None).unlink(PATH.encode())\nraise ValueError",
        "import os\nos.fchmod(os.open(PATH, os.O_RDONLY), 0)",
        "import os\nos.chmod(os.open(PATH, os.O_RDONLY), 0)",
        "import os\nos.utime(os.open(PATH, os.O_PATH), (1, 1))",
        "import os\nos.unlink('sentinel', dir_fd=os.open(FOLDER, os.O_PATH))",
        "import os\nos.chmod('sentinel', 0, dir_fd=os.open(FOLDER, os.O_PATH))",
        "import os\nos.rename('sentinel', 'mine', src_dir_fd=os.open(FOLDER, os.O_PATH))",
        "import os\nopen('mine', 'w')\nos.rename('mine', 'new', dst_dir_fd=os.open(FOLDER, os.O_PATH))",
        "import os\nos.mkdir('new', dir_fd=os.open(FOLDER, os.O_PATH))",
        "import os\nos.open('sentinel', os.O_WRONLY | os.O_TRUNC, dir_fd=os.open(FOLDER, os.O_PATH))",
        "import os\nos.link(PATH, 'mine')\nopen('mine', 'w')",
        "import os\nos.chdir(FOLDER)\nopen('new', 'w')",
        "import os\nos.setxattr(PATH, 'user.a', b'b')",
        "import os\nos.mkfifo(PATH + '.new')",
        "import os\nos.mknod(PATH + '.new')",
        "import sqlite3\nsqlite3.connect(PATH + '.new').execute('create table t (x)')",
        "import sqlite3\nsqlite3.connect('mine').execute('attach ? as x', [PATH]).execute('create table x.t (x)')",
        "import dbm.dumb\ndbm.dumb.open(PATH + '.new', 'n')['a'] = 'b'",
        "import shelve\nshelve.open(PATH + '.new')['a'] = 'b'",
        "import tempfile\ntempfile.NamedTemporaryFile(dir=FOLDER, delete=False)",
        "import io\nio.FileIO(PATH, 'a').write(b'x')",
        "import _io, os\n_io.open_code(PATH)\n_io.open(os.open(PATH, os.O_RDWR), 'w')",
        "import mmap, os\nmmap.mmap(os.open(PATH, os.O_RDWR), 0)[0] = 0",
    ],
)
def test_files_outside_survive(attack, sentinel):
    paths = f"PATH, FOLDER = {str(sentinel)!r}, {str(sentinel.parent)!r}\n"
    assert verdict(paths + attack) is not None


@pytest.mark.skipif(sys.platform != "linux" or not landlock(), reason="reading is for Landlock to refuse")
@pytest.mark.parametrize(
    "attempt",
    [
        "open(PATH)",
        "import os\nos.listdir(os.path.dirname(PATH))",
        "import os\nos.open('sentinel', os.O_RDONLY, dir_fd=os.open(os.path.dirname(PATH), os.O_PATH))",
        "import os\nos.symlink(PATH, 'link')\nopen('link')",
        "import os\nos.link(PATH, 'link')\nopen('link')",
        "open('/proc/self/cwd/../' + PATH)",
        "import os\nopen(f'/proc/{os.getppid()}/environ')",
        "open('/proc/self/environ')",
        "import os\nos.listdir('/root')",
        "import os\nos.listdir('/proc')",
        "open('/etc/passwd')",
        "import linecache\nif not linecache.getlines(PATH): raise OSError",
    ],
)
def test_nothing_outside_is_read_but_libraries(attempt, sentinel):
    assert verdict(f"PATH = {str(sentinel)!r}\n{attempt}") is not None
    assert verdict("import colorsys, zoneinfo, decimal, ctypes\nopen(colorsys.__file__).read()") is None


def test_the_directory_is_its_own_and_goes_away(tmp_path, monkeypatch):
    monkeypatch.setattr(execution.tempfile, "tempdir", str(tmp_path))
    program = """
import os, shutil, tempfile
assert os.listdir() == [] and os.getcwd() == os.environ["HOME"]
open("kept", "w").write("x")
with tempfile.TemporaryDirectory() as other:
    open(os.path.join(other, "f"), "w").write("y")
os.mkdir("tree"); open("tree/leaf", "w"); shutil.rmtree("tree")
open(os.devnull, "w").write("z")
os.mkdir("d"); open("d/f", "w"); os.chmod("d", 0); os.chmod(".", 0)
"""
    assert verdict(program) is None
    assert verdict(program + "while True: pass", timeout=0.5).startswith("timed out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_folders_nested_deeper_than_recursion_go_away_too(tmp_path, monkeypatch):
    monkeypatch.setattr(execution.tempfile, "tempdir", str(tmp_path))
    assert verdict("import os\nfor i in range(1100):\n    os.mkdir('d')\n    os.chdir('d')") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "attack",
    [
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: raise SystemExit",
        "import subprocess\nsubprocess.Popen(['sleep', '1000'], start_new_session=True)",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        "import os\nos.execv('/bin/sleep', ['sleep', '1000'])",
        "import threading\nwhile True: threading.Thread(target=threading.Event().wait).start()",
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
        "import socket\nsocket.create_connection(('127.0.0.1', 9))",
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
        "import socket\nsocket.socket(socket.AF_UNIX).connect('/run/docker.sock')",
        "import asyncio\nasyncio.run(asyncio.sleep(0))",
        "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), signal.SIGKILL)",
        "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
        "import os\nos.forkpty()",
        "import pty\npty.spawn('/bin/sh')",
        "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (9, 9))",
    ],
)
def test_no_processes_threads_signals_or_sockets(attack):
    found = verdict(attack)
    assert found is not None
    assert not found.startswith("timed out"), "refused at once"


def test_no_input_no_secrets_and_the_same_order_every_time(monkeypatch):
    monkeypatch.setenv("API_KEY", "secret")
    assert verdict("input()") == "EOFError: EOF when reading a line"
    program = "import sys, os\ndef f(): return sys.stdin.read(), dict(os.environ)"
    assert verdict(program, "text, names = f()\nassert text == '' and names and 'API_KEY' not in names") is None
    assert len({verdict("raise ValueError({'a', 'b', 'c', 'd', 'e', 'f', 'g'})") for _ in range(4)}) == 1


ATTEMPTS = """
import os, socket, sqlite3, sys, threading
sys.path.insert(0, {folder!r})
from plumbing import execution
execution.{other_line} = lambda *arguments: {without}
os.chdir({home!r})
landlock = execution._confine(1 << 30, 5)
path = {path!r}
above = os.open(os.path.dirname(path), os.O_PATH)
attempts = dict(
    fork=os.fork, thread=lambda: threading.Thread(target=print).start(), memory=lambda: bytearray(8 << 30),
    unlink=lambda: os.unlink(path), write=lambda: open(path, "w"), rename=lambda: os.rename(path, "mine"),
    create=lambda: open(path + ".new", "w"), execute=lambda: os.execv(sys.executable, ["python"]),
    mkdir=lambda: os.mkdir(path + ".d"), symlink=lambda: os.symlink("x", path + ".l"),
    link=lambda: os.link(path, "mine"), fchmod=lambda: os.chmod(os.open(path, os.O_RDONLY), 0),
    unlink_at=lambda: os.unlink("sentinel", dir_fd=above), mkdir_at=lambda: os.mkdir("d", dir_fd=above),
    rename_at=lambda: os.rename("sentinel", "mine", src_dir_fd=above), truncate=lambda: os.truncate(path, 0),
    connect=lambda: socket.create_connection(("127.0.0.1", 9)), signal=lambda: os.kill(os.getppid(), 0),
)
if landlock:
    attempts |= dict(
        fifo=lambda: os.mkfifo(path + ".f"), node=lambda: os.mknod(path + ".n"), memory_of=lambda: open("/proc/1/mem"),
        read=lambda: open(path), list=lambda: os.listdir("/"), open_at=lambda: os.open("sentinel", 2, dir_fd=above),
        sql=lambda: sqlite3.connect(path + ".s").execute("create table t (x)"),
    )
else:
    attempts |= dict(
        sql=lambda: sqlite3.connect(path + ".s"), mode=lambda: os.chmod(path, 0), datagram=lambda: socket.socket(type=2)
    )
new_in = dict(truncate=3, connect=4, signal=6)  # versions of Landlock
for name, attempt in attempts.items():
    if landlock and landlock < new_in.get(name, 1):
        continue
    try:
        attempt()
    except (OSError, MemoryError, RuntimeError, sqlite3.Error) as error:
        print("refused", name, error)
    else:
        print("DONE", name)
open("inside", "w").write("x")
print("uid", os.getuid())
"""


@pytest.mark.parametrize(
    ("other_line", "without"),
    [("_second_line", "lambda *event: None"), ("_landlock", "0")],
    ids=["the kernel's", "Python's"],
)
def test_each_line_holds_alone(other_line, without, tmp_path, sentinel):
    """The first: what a program would meet that got past the audit hook. The second: where there is no Landlock."""
    if other_line == "_second_line" and not landlock():
        pytest.skip("no Landlock here")
    home = Path(execution.tempfile.mkdtemp())
    places = {"folder": str(Path(execution.__file__).parent.parent), "home": str(home), "path": str(sentinel)}
    script = ATTEMPTS.format(**places, other_line=other_line, without=without)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    (home / "inside").unlink()
    home.rmdir()
    assert done.returncode == 0, done.stderr
    assert "DONE" not in done.stdout
    assert "refused fork" in done.stdout
    assert "uid 0" not in done.stdout


def test_failing_to_confine_is_an_error_and_no_verdict():
    with pytest.raises(OSError, match="cannot confine a generated program: prctl: not permitted"):
        execution._verdict(b'{"setup_error": "prctl: not permitted", "landlock": 0, "reason": null}')


def test_without_landlock_there_is_one_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        report = b'{"setup_error": "", "landlock": 0, "reason": "NameError"}'
        assert {execution._verdict(report) for _ in range(3)} == {"NameError"}
    assert ["no Landlock" in str(warning.message) for warning in caught] == [True]


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(execution.sys, "platform", "win32")
    with pytest.raises(OSError, match="Linux only"):
        execution.run("", "", "f")


def test_no_descriptor_or_process_is_left_behind():
    before = len(os.listdir("/proc/self/fd"))
    for program in ("x = 1", "import os\nos._exit(1)", "raise SystemExit", "while True: pass"):
        execution.run(program, "", "f", timeout=1)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
