"""The house: which files there are, who may import whom, and that a third method needs one file and one line."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import third_method
from conftest import save_checkpoint

import convert
import evaluate
import sample
import train
from plumbing import checkpoints, methods

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ROWS = [line for line in README.split("\n## Files\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
TABLE = re.findall(r"`([\w/]+\.py)`", "\n".join(ROWS))  # the Python files of the table, from top to bottom
SCRIPTS = ["train.py", "sample.py", "convert.py", "evaluate.py"]
PLACES = ("*.py", "*.c", "*.md", "plumbing/*.*", "recipes/*.*")
PROJECT = [str(file.relative_to(ROOT)) for place in PLACES for file in ROOT.glob(place)]


def imported(source: str) -> set[str]:
    """The files of this repository that a program imports, inside functions, too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {name.replace(".", "/") + ".py" for name in names}
    return {file for file in files if (ROOT / file).is_file()}


def test_imports_are_found_wherever_they_stand():
    program = "import torch, data\ndef f():\n    from plumbing import cli, feed\n    from ragged import KEEP"
    assert imported(program) == {"data.py", "plumbing/cli.py", "plumbing/feed.py", "ragged.py"}


def test_the_table_has_every_file_once():
    files = [name for name in PROJECT if name.endswith(".py")]
    assert sorted(TABLE) == sorted(files)
    assert len([name for name in files if "/" not in name]) <= 16


def test_no_file_hides_a_module_of_the_standard_library():
    assert not {Path(name).stem for name in TABLE} & sys.stdlib_module_names


@pytest.mark.parametrize("file", TABLE)
def test_a_file_imports_only_files_above_it(file):
    """Where all comes together, in the scripts, what stands below them, too; no one else imports a script."""
    above = TABLE[: TABLE.index(file)]
    may = set(above) - set(SCRIPTS)
    if file in SCRIPTS:
        may = {name for name in TABLE if not name.startswith(("bench", "recipes/"))} - set(SCRIPTS) | {"sample.py"}
    assert imported((ROOT / file).read_text()) - {file} <= may


def test_no_concept_imports_plumbing():
    concepts = TABLE[: TABLE.index("train.py")]
    assert {"ragged.py", "edit_distance.py", "models.py", "editflow.py", "medlm.py"} <= set(concepts)
    for file in concepts:
        assert not any(name.startswith("plumbing/") for name in imported((ROOT / file).read_text())), file


def test_nobody_asks_which_method_it_is():
    asks = re.compile(r"method *==|method *!=|is_medlm|METHODS\[")
    others = [name for name in PROJECT if name != "plumbing/methods.py"]
    assert not [name for name in others if asks.search((ROOT / name).read_text(encoding="utf-8"))]


# ---------------------------------------------------------------------------------------------------- a third method


@pytest.fixture
def third(monkeypatch, tiny_is_even_smaller):
    assert len(Path(third_method.__file__).read_text().splitlines()) <= 60
    monkeypatch.setitem(methods.METHODS, "third", third_method)


def run(out, flags: str) -> None:
    common = "--method third --dataset_args toy[train:64,test:8] --max_length 64 --per_device_train_batch_size 8"
    common += " --learning_rate 1e-2 --lr_scheduler_type constant --logging_steps 1 --eval_samples 1"
    assert train.main(f"{common} --answer_length 12 --output_dir {out} {flags}".split()) == 0


def losses(out) -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_third_method_trains_and_goes_on(third, tmp_path):
    run(tmp_path / "whole", "--max_steps 40")
    assert losses(tmp_path / "whole")[-1] < 0.9 * losses(tmp_path / "whole")[0]
    for steps in (20, 40):
        run(tmp_path / "parts", f"--max_steps {steps} --eval_strategy no")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_third_method_is_sampled_and_evaluated(third, tmp_path, capsys):
    out = tmp_path / "out"
    run(out, "--max_steps 4 --eval_strategy no")
    answers = {}
    for name, prompts in (("alone", ["Ann"]), ("together", ["Ben has", "Ann"])):
        file = tmp_path / f"{name}.jsonl"
        flags = ["--model_name_or_path", str(out), "--output", str(file), "--make_html", str(tmp_path / "a.html")]
        sample.main([*flags, "--prompt", *prompts])
        answers[name] = [json.loads(line) for line in file.read_text().splitlines()][-1]
    assert answers["alone"] == answers["together"]
    assert answers["alone"]["passes"] == 1
    assert len(answers["alone"]["response"].split()) <= 12, "what the checkpoint remembers"

    evaluate.main(f"--path {out} --task toy --limit 6 --output_dir {tmp_path}/evaluation".split())
    summary = json.loads((tmp_path / "evaluation/summary.json").read_text())["tasks"]["toy"]
    assert summary["n"] == 6
    assert summary["passes"] == {"passes": 1}
    assert len(summary["verdicts"]) == 2, "right and valid, of a response without a draft"


def test_a_third_method_is_made_from_and_becomes_other_checkpoints(third, tmp_path):
    source = save_checkpoint(tmp_path / "flow")
    convert.main(f"--to third -i {source} -o {tmp_path}/third --answer_length 5".split())
    model = checkpoints.load(str(tmp_path / "third"))
    assert model.config.nanoedit == {"method": "third", "answer_length": 5}
    assert model.token_head.weight.equal(checkpoints.load(str(source)).sub_logits.weight)
    convert.main(f"--to medlm -i {tmp_path}/third -o {tmp_path}/medlm".split())
    rows = len(model.token_head.weight)  # the vocabulary has grown by a few behind these
    assert checkpoints.load(str(tmp_path / "medlm")).lm_head.weight[:rows].equal(model.token_head.weight)
