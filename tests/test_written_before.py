"""Checkpoints that an earlier version of this repository wrote still open: they go on, and decode, as they did then.

tests/written_before holds, for each method, the checkpoint of step 2 of a run of 4 steps, adapters on such a model, and
what the earlier version made of them: the losses of all steps, and texts.
"""

import json
import shutil
from pathlib import Path

import pytest

import sample
import train

HERE = Path(__file__).parent / "written_before"
EXPECTED = json.loads((HERE / "expected.json").read_text())
COMMON = "--dataset_args toy[train:32,test:4] --max_length 64 --learning_rate 1e-2 --logging_steps 1 --save_steps 2"
COMMON += " --eval_strategy no --max_steps 4 --seed 7"
FLAGS = {
    "editflow": "--method editflow --x0_sampler masks[length:8] --schedule linear --normalize length "
    "--per_device_train_batch_size 8",
    "medlm": "--method medlm --pad_len 8 --per_device_train_batch_size 2 --intermediate_ratio 0.5 "
    "--max_diffusion_steps 3 --min_t 0.1 --loss_norm samples",
}


@pytest.mark.parametrize("kind", FLAGS)
def test_a_run_goes_on_with_the_losses_it_would_have_had(kind, tmp_path, signals_as_before):
    shutil.copytree(HERE / kind, tmp_path / "run/checkpoint-2")
    assert not train.main(f"{COMMON} {FLAGS[kind]} --output_dir {tmp_path}/run".split())
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(EXPECTED[kind]["losses"][2:], rel=1e-4)


@pytest.mark.parametrize("kind", EXPECTED)
def test_texts_are_what_they_were(kind, tmp_path, monkeypatch):
    for name in ("base", kind):
        shutil.copytree(HERE / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)  # adapters name their base by a relative path
    flags = f"--model_name_or_path {kind} --prompt Ann --num_samples 4 --steps 8 -n 12 -m 4 -e 2 --output texts.jsonl"
    sample.main(flags.split())
    lines = Path("texts.jsonl").read_text().splitlines()
    assert [json.loads(line)["response"] for line in lines] == EXPECTED[kind]["texts"]
