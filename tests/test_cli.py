"""The command line: flags, and errors in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from plumbing import cli

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train.py", "sample.py", "evaluate.py", "convert.py")


@pytest.mark.parametrize("text", ["True", "yes", "1", "t"])
def test_yes(text):
    assert cli.boolean(text) is True


@pytest.mark.parametrize("text", ["False", "no", "0", "F"])
def test_no(text):
    assert cli.boolean(text) is False


def test_flags_stand_alone_or_with_a_value():
    f = cli.Flags("x")
    f.flag("--bf16", help="")
    assert [f.parse_args(argv.split()).bf16 for argv in ("", "--bf16", "--bf16 True", "--bf16 False")] == [
        False, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "x", "1e999", ""])
def test_numbers_out_of_bounds(text, capsys):
    f = cli.Flags("x")
    f.add_argument("--n", type=cli.number(low=0, high=10))
    with pytest.raises(SystemExit) as end:
        f.parse_args(["--n", text])
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert "--n" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_unknown_flags(script):
    run = lambda *flags: subprocess.run([sys.executable, script, *flags], cwd=ROOT, capture_output=True, text=True)  # noqa: E731
    assert run("--help").returncode == 0
    wrong = run("--no_such_flag")
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 1
    assert wrong.stderr.startswith(f"{script}: error: ")
