"""The README keeps its word: its commands parse, its links lead somewhere, and what it gives to copy runs by itself."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import convert
import evaluate
import sample
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "RESULTS.md")}
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README.split("## Copy and paste")[1], re.MULTILINE | re.DOTALL)
WITH_EVERY_METHOD = ("ragged.py", "edit_distance.py", "edit_distance.c", "build_ext.py")
ALPHABET = "a b c d e f g h i j k l m n o p q r s t u v w x y z"


@pytest.mark.parametrize(("method", "snippet"), [("editflow.py", 1), ("medlm.py", 2)])
def test_what_is_copied_trains_and_writes(method, snippet, tmp_path):
    program = SNIPPETS[0] + SNIPPETS[snippet]
    assert len(program.splitlines()) <= 45
    for name in (*WITH_EVERY_METHOD, method):
        shutil.copy(ROOT / name, tmp_path)
    environment = os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    losses = [float(value) for value in re.findall(r"loss (.*)", run.stdout)]
    assert len(losses) > 3
    assert losses[-1] < 0.5 * losses[0]
    texts = [line for line in run.stdout.splitlines() if "loss" not in line]
    assert len(texts) == 26
    right = [text for text in texts if text == ALPHABET[ALPHABET.index(text[0]) :][:11]]
    assert len(right) > 13, texts


def commands(page: str) -> list[list[str]]:
    """The calls of our own scripts, as lists of words, the script first; what stands in for more flags left out."""
    blocks = re.findall(r"^```shell\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    calls = [re.search(r"\b(train|sample|convert|evaluate)\.py .*", line) for line in lines]
    words = [shlex.split(call[0], comments=True) for call in calls if call]
    return [call[:-1] if call[-1] == "..." else call for call in words]


@pytest.mark.parametrize("command", [call for page in PAGES.values() for call in commands(page)], ids=" ".join)
def test_commands_parse(command):
    script = {"train.py": train, "sample.py": sample, "convert.py": convert, "evaluate.py": evaluate}[command[0]]
    script.parse_args(command[1:])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGES[page]) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
    assert not [line for line in PAGES[page].splitlines() if len(line) > 130 and not line.startswith("|")]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200
