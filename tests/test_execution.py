"""execution.py: good programs pass, everything else is a failure and leaves no trace."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from plumbing import execution

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")

PATIENCE = 60.0  # seconds, so that no verdict depends on how busy the machine is

# Problems in HumanEval's format: a signature with a docstring, a body, and a `check` that takes the function.
PROBLEMS = [
    {
        "prompt": 'from typing import List\n\n\ndef rotate(items: List, k: int) -> List:\n    """Rotate left."""\n',
        "solution": "    if not items:\n        return []\n    k %= len(items)\n    return items[k:] + items[:k]\n",
        "wrong": "    return items[k:] + items[:k]\n",
        "test": "def check(f):\n    assert f([], 3) == []\n    assert f([1, 2, 3], 4) == [2, 3, 1]\n\ncheck(rotate)\n",
    },
    {
        "prompt": "import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: 'int'\n\ndef total(ps):\n    'Sum.'\n",
        "solution": "    return sum(p.x for p in ps)\n",
        "wrong": "    return sum(ps)\n",
        "test": "def check(f):\n    assert f([P(1), P(2)]) == 3\n\ncheck(total)\n",
    },
]


def verdict(program: str, tests: str = "", timeout: float = PATIENCE) -> str:
    return execution.run(program, tests, timeout)


@pytest.fixture
def sentinel(tmp_path):
    """A file that anybody may change, so that only the confinement protects it."""
    tmp_path.chmod(0o777)
    path = tmp_path / "sentinel"
    path.write_text("still here")
    path.chmod(0o666)
    yield path
    assert path.read_text() == "still here"
    assert path.stat().st_mode & 0o777 == 0o666
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_solutions_pass_and_wrong_ones_fail(problem):
    assert verdict(problem["prompt"] + problem["solution"], problem["test"]) == "passed"
    assert verdict(problem["prompt"] + problem["wrong"], problem["test"]) != "passed"
    assert verdict(problem["prompt"], problem["test"]) != "passed"


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("def f(:\n", "SyntaxError"),
        ("\0", "SyntaxError"),
        ("x = '\ud800'", "UnicodeEncodeError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", "ended before its tests did"),
        ("raise ValueError('y' * 10**6 + '\\nsecond line')", "ValueError: " + "y" * 100),
        ("raise ValueError('\\U0001f600' * 10**6)", "ValueError: " + "\U0001f600" * 100),
    ],
)
def test_broken_programs_fail_with_a_short_reason(program, expected):
    found = verdict(program)
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


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)",
        "exit()",
        "import os, sys\nsys.stdout.write('passed')\nsys.stdout.flush()\nos._exit(0)",
        "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)",
    ],
)
def test_leaving_before_the_tests_is_failing(program):
    assert verdict(program) in ("SystemExit: 0", "SystemExit: None", "ended before its tests did")


@pytest.mark.parametrize(
    "program",
    [
        "import builtins\nbuiltins.AssertionError = builtins.exec = builtins.compile = print",
        "import sys\nsys.excepthook = lambda *a: None\nsys.settrace(lambda *a: None)",
        "import json, os\nos._exit = os.write = lambda *a: None\njson.dumps = lambda *a: '{}'",
        'import os\nfor fd in range(1, 64):\n    try: os.write(fd, b\'{"token": "", "verdict": "passed"}\\n\')\n'
        "    except OSError: pass",
        "import os\nos.closerange(0, 64)",
    ],
)
def test_replacing_what_judges_does_not_pass(program):
    assert verdict(program, "def check(f): assert f\ncheck(0)\n") != "passed"


def test_memory_and_files_are_bounded():
    assert verdict("x = bytearray(8 << 30)").startswith("MemoryError")
    slowly = execution.run("x = []\nwhile True: x.append(bytearray(1 << 22))", "", PATIENCE, memory=1 << 28)
    assert slowly.startswith("MemoryError")
    assert verdict("x = bytearray(64 << 20)", "assert len(x) == 64 << 20") == "passed"
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
    ],
)
def test_files_outside_survive(attack, sentinel):
    assert verdict(f"PATH = {str(sentinel)!r}\n{attack}") != "passed"


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
    assert verdict(program) == "passed"
    assert verdict(program + "while True: pass", timeout=0.5).startswith("timed out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_folders_nested_deeper_than_recursion_go_away_too(tmp_path, monkeypatch):
    monkeypatch.setattr(execution.tempfile, "tempdir", str(tmp_path))
    assert verdict("import os\nfor i in range(1100):\n    os.mkdir('d')\n    os.chdir('d')") == "passed"
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
    ],
)
def test_no_processes_threads_signals_or_sockets(attack):
    found = verdict(attack)
    assert found != "passed"
    assert not found.startswith("timed out"), "refused at once"


def test_no_input_no_secrets_and_the_same_order_every_time(monkeypatch):
    monkeypatch.setenv("API_KEY", "secret")
    assert verdict("input()") == "EOFError: EOF when reading a line"
    assert verdict("import sys, os", "assert sys.stdin.read() == '' and 'API_KEY' not in os.environ") == "passed"
    assert len({verdict("raise ValueError({'a', 'b', 'c', 'd', 'e', 'f', 'g'})") for _ in range(4)}) == 1


def test_numpy_works_where_it_is_installed():
    assert verdict("import numpy as np\nx = np.ones((9, 9)) @ np.ones((9, 9))", "assert x.sum() == 729") == "passed"


# What a program would meet that got past the audit hook: only the kernel's limits are set up here.
FIRST_LINE = """
import os, socket, sys, threading
sys.path.insert(0, {folder!r})
from plumbing import execution
os.chdir({home!r})
landlock = execution._confine(1 << 30, 5)
path = {path!r}
attempts = dict(
    fork=os.fork, thread=lambda: threading.Thread(target=print).start(), memory=lambda: bytearray(8 << 30),
)
if landlock:
    attempts |= dict(
        unlink=lambda: os.unlink(path), write=lambda: open(path, "w"), rename=lambda: os.rename(path, "mine"),
        create=lambda: open(path + ".new", "w"), execute=lambda: os.execv(sys.executable, ["python"]),
        mkdir=lambda: os.mkdir(path + ".d"), link=lambda: os.symlink("x", path + ".l"),
    )
if landlock >= 3:
    attempts |= dict(truncate=lambda: os.truncate(path, 0))
if landlock >= 4:
    attempts |= dict(connect=lambda: socket.create_connection(("127.0.0.1", 9)))
if landlock >= 6:
    attempts |= dict(signal=lambda: os.kill(os.getppid(), 0))
for name, attempt in attempts.items():
    try:
        attempt()
    except (OSError, MemoryError, RuntimeError) as error:
        print("refused", name, error)
    else:
        print("DONE", name)
open("inside", "w").write("x")
print("uid", os.getuid())
"""


def test_the_first_line_holds_alone(tmp_path, sentinel):
    home = Path(execution.tempfile.mkdtemp())
    folder = str(Path(execution.__file__).parent.parent)
    script = FIRST_LINE.format(folder=folder, home=str(home), path=str(sentinel))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    (home / "inside").unlink()
    home.rmdir()
    assert done.returncode == 0, done.stderr
    assert "DONE" not in done.stdout
    assert "refused fork" in done.stdout
    assert "uid 0" not in done.stdout


def test_failing_to_confine_is_an_error_and_no_verdict():
    with pytest.raises(OSError, match="cannot confine a generated program: prctl: not permitted"):
        execution._verdict(b't{"setup_error": "prctl: not permitted", "landlock": 0, "verdict": ""}', "t")


def test_without_landlock_there_is_one_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        report = b't{"setup_error": "", "landlock": 0, "verdict": "passed"}'
        assert {execution._verdict(report, "t") for _ in range(3)} == {"passed"}
    assert ["no Landlock" in str(warning.message) for warning in caught] == [True]


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(execution.sys, "platform", "win32")
    with pytest.raises(OSError, match="Linux only"):
        execution.run("", "")


def test_no_descriptor_or_process_is_left_behind():
    before = len(os.listdir("/proc/self/fd"))
    for program in ("x = 1", "import os\nos._exit(1)", "raise SystemExit", "while True: pass"):
        execution.run(program, "", timeout=1)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
