"""edit_distance.c under AddressSanitizer and UndefinedBehaviorSanitizer: its property tests, run once more.

The extension is built with the sanitizers in a folder of its own. Python itself is not built with them, so their
run-time library is loaded ahead of it; from then on every array that C touches lies between guarded bytes. Two planted
bugs show that the alarm works.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"
PROPERTY_TESTS = "canonical_one or any_int32 or borders or long_pair or batch or labels_agree or empty_sequences"


@pytest.fixture
def sanitized(tmp_path):
    """A copy of the sources, and how to build and run a command in it under the sanitizers."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.fail("gcc not found: edit_distance.c cannot be checked for memory errors (Debian: apt install gcc)")
    for name in ["edit_distance.c", "edit_distance.py", "build_ext.py"]:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copy(ROOT / "tests" / "test_edit_distance.py", tmp_path)
    constants = re.findall(r"^(?:KEEP|GAP)\b.*$", (ROOT / "ragged.py").read_text(), re.MULTILINE)
    (tmp_path / "ragged.py").write_text("\n".join(constants))  # torch is not welcome under the sanitizers

    def run(*arguments):
        build = os.environ | {"CC": compiler, "CFLAGS": FLAGS}
        subprocess.run([sys.executable, "build_ext.py"], cwd=tmp_path, env=build, check=True, capture_output=True)
        runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
        environment = os.environ | {
            "LD_PRELOAD": runtime.stdout.strip(),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own, at exit
            "PYTHONMALLOC": "malloc",  # small arrays get guards, too
        }
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return tmp_path, run


@pytest.mark.slow
def test_property_tests_are_clean_under_the_sanitizers(sanitized):
    _, run = sanitized
    options = ["-q", "-W", "error:edit distance", "-p", "no:cacheprovider", "-k", PROPERTY_TESTS]
    result = run("-m", "pytest", *options, "test_edit_distance.py")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert " passed" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("correct", "planted", "complaint"),
    [
        ("malloc(needed)", "malloc(needed - 1)", "heap-buffer-overflow"),
        ("(uint64_t)1 << r % 64", "(uint64_t)1 << (r % 64 + 64)", "runtime error"),
    ],
)
def test_the_alarm_works(sanitized, correct, planted, complaint):
    folder, run = sanitized
    source = (folder / "edit_distance.c").read_text()
    assert source.count(correct) == 1
    (folder / "edit_distance.c").write_text(source.replace(correct, planted))
    code = "import edit_distance as e; e.edit_script([1, 2, 3, 4] * 9, [5, 6, 7, 8] * 9)"
    result = run("-W", "error", "-c", code)
    assert result.returncode != 0
    assert complaint in result.stderr
