"""evaluate.py: what counts as an answer, and that every sample is answered once, whatever happens to the run."""

import json
import os
import random
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
import models
import toy
from evaluate import Answer

PROMPT = 'def double(x):\n    """Twice x.\n    >>> double(2)\n    4\n    """\n'
RECORDS = {
    "gsm8k": [{"question": f"What is {i} + 1?", "answer": f"<<{i}+1={i + 1}>>\n#### {i + 1}"} for i in range(7)],
    "math500": [{"problem": "Half of 1?", "answer": "\\frac{1}{2}", "unique_id": "a/1.json"}],
    "humaneval": [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": PROMPT,
            "entry_point": "double",
            "test": f"def check(f):\n    assert f({i}) == {2 * i}\n",
        }
        for i in range(3)
    ],
    "mbpp": [{"task_id": 2, "prompt": '"""\nWrite a function to negate.\nassert neg(2) == -2\n"""\n'}],
}


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    paths = {}
    for name, records in RECORDS.items():
        path = tmp_path / evaluate.TASKS[name].file
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        paths[name] = str(path)
    return paths


# ------------------------------------------------------------------------------------------------- finding answers


balanced = st.recursive(
    st.text(alphabet="abx+-^_ 0123.,()[]", max_size=8) | st.sampled_from(["\\{", "\\}", "\\\\", "\\frac", "\\left\\{"]),
    lambda inner: st.tuples(inner, inner).map(lambda p: p[0] + "{" + p[1] + "}") | st.tuples(inner, inner).map("".join),
    max_leaves=12,
)


@given(before=st.text(max_size=30), content=balanced, after=st.text(max_size=30), gap=st.sampled_from(["", " "]))
def test_boxed_returns_what_was_put_in_the_last_box(before, content, after, gap):
    after = after.replace("\\boxed", "")
    text = f"{before}\\boxed{{7}} then {before}\\boxed{gap}{{{content}}}{after}"
    assert evaluate.boxed(text) == content.strip()


@given(st.text(alphabet="\\boxed{}12 ", max_size=60))
def test_boxed_agrees_with_a_character_by_character_reading(text):
    assert evaluate.boxed(text) == boxed_by_hand(text)


def boxed_by_hand(text: str) -> str | None:
    found = None
    for start in range(len(text)):
        if not text.startswith("\\boxed", start):
            continue
        at = start + len("\\boxed")
        while at < len(text) and text[at].isspace():
            at += 1
        if text[at : at + 1] != "{":
            continue
        depth, at = 1, at + 1
        opened = at
        while at < len(text):
            if text[at] == "\\":
                at += 2
                continue
            depth += (text[at] == "{") - (text[at] == "}")
            if depth == 0:
                found = text[opened:at].strip()
                break
            at += 1
    return found


def test_an_unclosed_box_does_not_count():
    assert evaluate.boxed("no box") is None
    assert evaluate.boxed("\\boxed{1") is None
    assert evaluate.boxed("\\boxed{1} and \\boxed{2") == "1"
    assert evaluate.boxed("\\boxed{\\left\\{1, 2\\right.}") == "\\left\\{1, 2\\right."


amounts = st.decimals(min_value=-(10**9), max_value=10**9, places=2) | st.integers(-(10**9), 10**9).map(Decimal)
ways_to_write = st.sampled_from(["{}", "{:,}", "${}", "${:,}", "{}.", "{} dollars", "**{}**", "{}%", "\\({}\\)"])
prose = st.text(alphabet="abc 12.,$-=\n(){}", max_size=40)


@given(before=prose, amount=amounts, way=ways_to_write, after=prose)
def test_final_number_behind_the_mark(before, amount, way, after):
    assert evaluate.final_number(f"{before} #### 5 {before} #### {way.format(amount)} {after}") == amount


@given(before=prose, amount=amounts, way=ways_to_write, after=st.text(alphabet="abc .,!", max_size=20))
def test_final_number_without_a_mark(before, amount, way, after):
    after = f" {after.replace('.', '')}"
    assert evaluate.final_number(f"{before} {way.format(amount)}{after}") == amount
    assert evaluate.final_number(f"7 \\boxed{{{way.format(amount)}}} costs 3 more") == amount


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", None),
        ("no number", None),
        ("5 then #### none", None),
        ("10-3 = 7", 7),
        ("10-3", 3),
        ("it fell by -3", -3),
        ("-$1,234.50", Decimal("-1234.50")),
        ("(1,2)", 2),
        ("1{,}000", 1000),
        (".5", Decimal("0.5")),
        ("so 1,000,000.", 1000000),
        ("#### \\boxed{18}", 18),
        ("#### 72.00", 72),
    ],
)
def test_final_number_by_example(text, number):
    assert evaluate.final_number(text) == number


@given(st.text(max_size=200))
def test_extraction_takes_any_text(text):
    evaluate.boxed(text), evaluate.final_number(text)
    assert evaluate.code(text).endswith("\n")


some_lines = st.sampled_from(["def f(x):", "    return x", "", "import re", "    print(x)", "y = '{'"])


@given(lines=st.lists(some_lines), prose=st.text(alphabet="abc \n."), tag=st.sampled_from(["", "python"]))
def test_code_returns_what_was_fenced(lines, prose, tag):
    program = "\n".join(lines)
    expected = program.rstrip() + "\n"
    assert evaluate.code(f"{prose}```{tag}\n{program}\n```{prose}") == expected
    assert evaluate.code(f"{prose}```{tag}\n{program}\n```{prose}\n```\nsecond\n```") == expected
    assert evaluate.code(f"{prose}```{tag}\n{program}") == expected
    assert evaluate.code(program) == expected


def test_code_leaves_demonstrations_out():
    for demo in ("assert f(1) == 2", "print(f(1))", "check(f)", "if __name__ == '__main__':\n    f()"):
        assert evaluate.code(f"```\ndef f(x):\n    assert x\n    return x\n\n{demo}\nrest\n```") == (
            "def f(x):\n    assert x\n    return x\n"
        )


# -------------------------------------------------------------------------------------------------------- verdicts


def right(task: str, record: dict, response: str) -> bool:
    return evaluate.TASKS[task].checks["right"](record, response)


def test_gsm8k_verdict():
    record = RECORDS["gsm8k"][3]
    assert right("gsm8k", record, record["answer"])
    assert right("gsm8k", record, "The answer is $4.00.")
    assert not right("gsm8k", record, "The answer is 5")
    assert not right("gsm8k", record, "")


def test_math_verdict():
    record = RECORDS["math500"][0]
    for answer in ("\\frac{1}{2}", "\\frac{1} {2}", "0.5", "\\dfrac12", "2/4"):
        assert right("math500", record, f"So it is \\boxed{{{answer}}}."), answer
    for response in ("\\frac{1}{2}", "\\boxed{2}", "\\boxed{}", "\\boxed{\\frac{", "\\boxed{\\text{half}}", ""):
        assert not right("math500", record, response), response


def test_humaneval_verdict_for_every_way_to_answer():
    record = RECORDS["humaneval"][2]
    whole = PROMPT + "    return 2 * x\n"
    for response in (
        "    return 2 * x\n",
        f"```python\n{whole}```",
        f"Here:\n```python\n{whole}\nassert double(1) == 3\n```\nIt doubles.",
        "```python\n    return 2 * x\n```",
        "```\ndef double(x):\n    return x + x",
    ):
        assert right("humaneval", record, response), response
    for response in ("", "    return x\n", "```python\nexit(0)\n```", "```\ndef other(x):\n    return 2 * x\n```"):
        assert not right("humaneval", record, response), response


def test_mbpp_verdict_uses_the_asserts_of_the_record():
    record = RECORDS["mbpp"][0]
    almost = "```python\ndef neg(x):\n    return -2\n```"
    assert right("mbpp", record, almost)
    tests = ["assert neg(2) == -2", "assert neg(e) == -e"]
    more = record | {"test_list": tests, "test_imports": ["from math import e"]}
    assert not right("mbpp", more, almost)
    assert right("mbpp", more, "```python\ndef neg(x):\n    return -x\n```")


def test_toy_verdicts():
    record = toy.records("test", 1, 0)[0]
    checks = evaluate.TASKS["toy"].checks
    number = record["response"].rpartition("#### ")[2]
    assert [check(record, record["response"]) for check in checks.values()] == [True, True]
    assert [check(record, f"gibberish #### {number}") for check in checks.values()] == [True, False]
    assert [check(record, "") for check in checks.values()] == [False, False]


# --------------------------------------------------------------------------------------------------------- samples


def test_prompts_are_the_published_ones(files):
    first = {name: evaluate.load_samples(name, path, None, 0, None)[0] for name, path in files.items()}
    assert first["gsm8k"].messages == [
        {"role": "system", "content": "Please reason step by step, and put your final answer within \\boxed{}."},
        {"role": "user", "content": "What is 0 + 1?"},
    ]
    assert first["humaneval"].messages[1]["content"] == f"```python\n{PROMPT.strip()}\n```"
    assert first["mbpp"].messages[1]["content"] == (
        "Write a function to negate.\n"
        "Your code should satisfy the following assertion:\n```python\nassert neg(2) == -2\n```"
    )
    assert [first[name].id for name in files] == ["Gsm8k/0", "a/1.json", "HumanEval/0", "Mbpp/2"]


def test_the_system_prompt_can_be_replaced_and_left_out(files):
    assert evaluate.load_samples("gsm8k", files["gsm8k"], 1, 0, "Be brief.")[0].messages[0]["content"] == "Be brief."
    assert [m["role"] for m in evaluate.load_samples("gsm8k", files["gsm8k"], 1, 0, "")[0].messages] == ["user"]


def test_a_folder_gives_its_test_files(tmp_path, files):
    (tmp_path / "gsm8k_train.jsonl").write_text('{"question": "train", "answer": "#### 1"}\n')
    (tmp_path / "other").mkdir()
    for name in ("gsm8k_test.jsonl", "gsm8k_train.jsonl"):
        (tmp_path / name).rename(tmp_path / "other" / name)
    assert len(evaluate.load_samples("gsm8k", str(tmp_path / "other"), None, 0, None)) == 7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q"}', "'answer'"),
        ('{"question": 1, "answer": "2"}', "'question'"),
        ("{", "not JSON"),
        ("[]", "'question'"),
    ],
)
def test_broken_records_are_named(tmp_path, line, message):
    path = tmp_path / "gsm8k_test.jsonl"
    path.write_text(json.dumps(RECORDS["gsm8k"][0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"gsm8k_test.jsonl:2: .*{message}"):
        evaluate.load_samples("gsm8k", str(path), None, 0, None)


def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "gsm8k_test.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"gsm8k_test.jsonl: no record"):
        evaluate.load_samples("gsm8k", str(tmp_path / "gsm8k_test.jsonl"), None, 0, None)


def test_the_key_covers_everything_an_answer_depends_on(files, tmp_path):
    def keys(settings=None, seed=0, system=None, limit=None):
        samples = evaluate.load_samples("gsm8k", files["gsm8k"], limit, seed, system)
        evaluate.set_keys(samples, settings or {"a": 1})
        return [sample.key for sample in samples]

    assert len(set(keys())) == 7
    assert keys() == keys()
    assert keys(limit=3) == keys()[:3]
    for other in (keys({"a": 2}), keys(seed=1), keys(system="")):
        assert not set(keys()) & set(other)

    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    before = evaluate.fingerprint(tmp_path)
    (tmp_path / "summary.json").write_text("{}")  # results may be kept beside the weights
    assert before == evaluate.fingerprint(tmp_path)
    weights.write_bytes(b"2")
    os.utime(weights, ns=(1, 1))
    assert before != evaluate.fingerprint(tmp_path)


# ---------------------------------------------------------------------------------------- rows, killing, going on


class StandIn:
    """Answers by rule, remembers what it was asked, and dies after `lifetime` samples."""

    def __init__(self, lifetime: int | None = None):
        self.asked, self.lifetime = [], lifetime

    def __call__(self, samples, init_num=0):
        if self.lifetime is not None and len(self.asked) + len(samples) > self.lifetime:
            raise KeyboardInterrupt
        self.asked += [sample.id for sample in samples]
        return [self.answer(sample) for sample in samples]

    def answer(self, sample) -> Answer:
        number = int(sample.id.partition("/")[2])
        draft, response = f"#### {number + number % 2}", f"#### {number + 1 - number % 3}"
        return Answer(response, tokens=number, draft=draft, mask_passes=4, edit_passes=number)


def toy_samples(n: int):
    records = [{"question": "q", "answer": f"#### {i + 1}"} for i in range(n)]
    samples = [evaluate.Sample(f"Gsm8k/{i}", r, [{"role": "user", "content": "q"}], i) for i, r in enumerate(records)]
    evaluate.set_keys(samples, {})
    return samples


def without_times(value):
    timed = ("seconds", "tokens_per_second")
    return {k: v for k, v in value.items() if k not in timed}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 12), world=st.integers(1, 5), batch_size=st.integers(1, 4))
def test_every_sample_is_answered_once_by_some_rank(tmp_path_factory, n, world, batch_size):
    out, samples, models_ = tmp_path_factory.mktemp("out"), toy_samples(n), [StandIn() for _ in range(world)]
    for rank in random.sample(range(world), world):
        evaluate.answer_samples("gsm8k", samples, models_[rank], out, rank=rank, world=world, batch_size=batch_size)
    assert sorted(id for model in models_ for id in model.asked) == sorted(sample.id for sample in samples)
    rows = evaluate.merge("gsm8k", samples, out)
    assert [row["id"] for row in rows] == [sample.id for sample in samples]
    assert [json.loads(line) for line in (out / "gsm8k.jsonl").read_text().splitlines()] == rows


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lives=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 3), st.integers(1, 4)), max_size=4),
    tear=st.integers(0, 40),
)
def test_a_killed_run_goes_on_where_it_stopped(tmp_path_factory, lives, tear):
    """Each life: killed after so many samples, on so many ranks, with such batches; a kill may tear the last line."""
    samples = toy_samples(12)
    whole, out = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("out")
    evaluate.answer_samples("gsm8k", samples, StandIn(), whole)
    expected = evaluate.summarise("gsm8k", evaluate.merge("gsm8k", samples, whole))

    asked = []
    for lifetime, world, batch_size in [*lives, (99, 2, 3)]:
        for rank in range(world):
            model = StandIn(lifetime)
            try:
                evaluate.answer_samples("gsm8k", samples, model, out, rank=rank, world=world, batch_size=batch_size)
            except KeyboardInterrupt:
                with open(out / f"gsm8k.rank{rank}.jsonl", "ab") as file:
                    file.write(b'{"key": "' + b"x" * tear)
            asked += model.asked
    assert sorted(asked) == sorted(sample.id for sample in samples)
    summary = evaluate.summarise("gsm8k", evaluate.merge("gsm8k", samples, out))
    assert without_times(summary) == without_times(expected)


def test_a_torn_last_line_is_answered_again(tmp_path):
    samples = toy_samples(3)
    evaluate.answer_samples("gsm8k", samples, StandIn(), tmp_path)
    path = tmp_path / "gsm8k.rank0.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    model = StandIn()
    evaluate.answer_samples("gsm8k", samples, model, tmp_path)
    assert model.asked == ["Gsm8k/2"]
    assert len(evaluate.merge("gsm8k", samples, tmp_path)) == 3


@pytest.mark.parametrize("line", ["{", "[1]", '{"task": "gsm8k"}', ""])
def test_a_broken_line_in_the_middle_is_an_error(tmp_path, line):
    (tmp_path / "gsm8k.rank0.jsonl").write_text('{"key": "a"}\n' + line + '\n{"key": "b"}\n')
    with pytest.raises(ValueError, match=r"gsm8k.rank0.jsonl:2: not a row"):
        evaluate.all_rows("gsm8k", tmp_path)


def test_too_few_answers_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="zip"):
        evaluate.answer_samples("gsm8k", toy_samples(3), lambda samples: [], tmp_path)


def test_code_is_judged_only_when_allowed_and_then_without_generating_again(tmp_path, files, monkeypatch):
    samples = evaluate.load_samples("humaneval", files["humaneval"], None, 0, None)
    evaluate.set_keys(samples, {})

    def generate(batch):
        return [Answer("    return x + x", 4, draft="    return 4") for _ in batch]

    monkeypatch.setattr(evaluate.execution, "run", lambda *a: pytest.fail("must not run"))
    evaluate.answer_samples("humaneval", samples, generate, tmp_path)
    rows = evaluate.merge("humaneval", samples, tmp_path)
    assert {(row["draft_right"], row["right"]) for row in rows} == {(None, None)}
    summary = evaluate.summarise("humaneval", rows)
    assert summary["right"] is None
    assert "-" in evaluate.table({"humaneval": summary})
    solutions = [json.loads(line) for line in (tmp_path / "evalplus_humaneval.jsonl").read_text().splitlines()]
    assert [s["task_id"] for s in solutions] == ["HumanEval/0", "HumanEval/1", "HumanEval/2"]
    assert {s["solution"] for s in solutions} == {PROMPT + "    return x + x\n"}
    assert len((tmp_path / "evalplus_humaneval_draft.jsonl").read_text().splitlines()) == 3

    monkeypatch.undo()
    for rank in (1, 0):  # another number of ranks than before
        evaluate.answer_samples("humaneval", samples, None, tmp_path, rank=rank, world=2, may_run=True)
    rows = evaluate.merge("humaneval", samples, tmp_path)
    assert [(row["draft_right"], row["right"]) for row in rows] == [(False, True), (False, True), (True, True)]


# --------------------------------------------------------------------------------------------------------- summary


def row(draft, right, **other):
    verdicts = {"draft_right": draft, "right": right}
    return verdicts | {"mask_passes": 4, "edit_passes": 2, "seconds": 0.5, "tokens": 10} | other


def test_summary_arithmetic():
    rows = [row(False, True), row(False, False, edit_passes=6), row(True, True, tokens=30), row(False, True)]
    summary = evaluate.summarise("gsm8k", rows)
    assert summary["n"] == 4
    assert summary["draft_right"] == 0.25
    assert summary["right"] == 0.75
    assert summary["right_standard_error"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert (summary["mask_passes"], summary["edit_passes"]) == (4, 3)
    assert (summary["tokens"], summary["seconds"], summary["tokens_per_second"]) == (60, 2.0, 30.0)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
def test_the_standard_error_is_that_of_a_mean(verdicts):
    summary = evaluate.summarise("gsm8k", [row(*pair) for pair in verdicts])
    values = [pair[1] for pair in verdicts]
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    assert summary["right_standard_error"] == pytest.approx((variance / len(values)) ** 0.5)


def test_table():
    toy = row(None, True, draft_valid=None, valid=False, seconds=0.0)
    text = evaluate.table(
        {
            "gsm8k": evaluate.summarise("gsm8k", [row(False, True), row(False, False)] * 50),
            "toy": evaluate.summarise("toy", [toy]),
        }
    )
    assert text.splitlines() == [
        "task   verdict    n      draft       edited  mask passes  edit passes  tokens/s",
        "gsm8k  right    100  0.0 ± 0.0   50.0 ± 5.0          4.0          2.0      20.0",
        "toy    right      1          -  100.0 ± 0.0          4.0          2.0         -",
        "toy    valid      1          -    0.0 ± 0.0          4.0          2.0         -",
    ]


# ------------------------------------------------------------------------------------------------------ the script


@pytest.fixture
def standing_in(monkeypatch, tmp_path):
    """main without a model: `run(flags)` gives the ids asked for and the summary."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    out = tmp_path / "out"

    def run(*flags):
        model = StandIn()
        monkeypatch.setattr(evaluate, "load", lambda args, path: (model, lambda *_: None, "medlm"))
        evaluate.main(["--path", str(checkpoint), "--output_dir", str(out), *flags])
        return model.asked, json.loads((out / "summary.json").read_text())

    return run


def test_main_from_files_to_summary(standing_in, files, tmp_path, capsys):
    asked, summary = standing_in("--task", "gsm8k", "--data_dir", str(tmp_path), "--limit", "5", "--batch_size", "2")
    assert asked == [f"Gsm8k/{i}" for i in range(5)]
    result = summary["tasks"]["gsm8k"]
    assert (result["n"], result["draft_right"], result["right"]) == (5, 0.4, 0.4)
    assert result["data"] == files["gsm8k"]
    assert "####" in result["judge"]
    assert summary["settings"]["mask_diffusion_step"] == 48
    assert "gsm8k" in capsys.readouterr().out

    more, _ = standing_in("--task", "gsm8k", "--data", f"gsm8k={files['gsm8k']}", "--batch_size", "8")
    assert more == ["Gsm8k/5", "Gsm8k/6"]
    others, _ = standing_in("--task", "gsm8k", "--data_dir", str(tmp_path), "--edit_diffusion_step", "0")
    assert len(others) == 7
    again, _ = standing_in("--task", "gsm8k", "--data_dir", str(tmp_path), "--tau", "0.5")  # no setting of this method
    assert again == []


def test_main_says_when_code_was_not_run(standing_in, files, tmp_path, capsys):
    standing_in("--task", "humaneval", "--data_dir", str(tmp_path))
    assert "humaneval: programs were written to" in capsys.readouterr().out


def test_evalplus_is_asked_where_it_is_installed(standing_in, files, tmp_path, monkeypatch):
    package = tmp_path / "site" / "evalplus"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    stand_in = "import sys\nassert sys.argv[1:3] == ['--dataset', 'humaneval']\nassert open(sys.argv[4]).read()\n"
    (package / "evaluate.py").write_text(stand_in + "print('pass@1:\\t0.250\\npass@1:\\t0.125')\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setattr(evaluate, "installed", lambda package: "1.0" if package == "evalplus" else None)
    flags = ("--task", "humaneval", "--data_dir", str(tmp_path), "--allow_code_execution")
    result = standing_in(*flags)[1]["tasks"]["humaneval"]
    assert result["evalplus"] == result["evalplus_draft"] == {"base": 0.25, "plus": 0.125}
    (package / "evaluate.py").write_text("raise SystemExit('no network')")
    assert standing_in(*flags)[1]["tasks"]["humaneval"]["evalplus"] == "failed: no network"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "gsm8k", "--data_dir", "nowhere"], "--data_dir: no file nowhere/gsm8k_test.jsonl"),
        (["--task", "gsm8k", "--data", "gsm8k=nowhere.jsonl"], "nowhere.jsonl"),
        (["--task", "toy", "--output_dir", "/proc/nowhere"], "--output_dir /proc/nowhere: cannot write there"),
        (["--task", "toy", "--path", "/nowhere"], "/nowhere: no such directory"),
    ],
)
def test_errors_are_one_line_and_come_before_the_model(flags, message, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda *a: pytest.fail("loaded a model"))
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as caught:
        evaluate.main(["--path", str(tmp_path), "--output_dir", str(tmp_path / "out"), *flags])
    assert "\n" not in str(caught.value)


def test_a_missing_judge_is_found_before_the_model(monkeypatch, files, tmp_path):
    monkeypatch.setattr(evaluate, "installed", lambda package: None)
    with pytest.raises(ValueError, match="pip install math-verify"):
        evaluate.main(["--path", str(tmp_path), "--task", "math500", "--data_dir", str(tmp_path)])


@pytest.mark.parametrize("method", ["medlm", "editflow"])
def test_real_models_of_both_methods(method, tmp_path, capsys):
    tokenizer = toy.tokenizer()
    options = {"schedule": "linear", "x0_sampler": "masks[length:4]"} if method == "editflow" else {}
    models.save(models.build(method, "tiny", tokenizer.vocab_size, **options), str(tmp_path / "model"))
    tokenizer.save(tmp_path / "model")
    flags = ["--path", str(tmp_path / "model"), "--task", "toy", "--limit", "2", "--output_dir", str(tmp_path / "out")]
    evaluate.main([*flags, "-m", "2", "-e", "2", "--init_num", "4", "--tau", "0.5"])
    rows = [json.loads(line) for line in (tmp_path / "out" / "toy.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for line in rows:
        assert line["prompt"] in toy.prompts("test")
        assert (line["draft"] is None) == (line["draft_right"] is None) == (method == "editflow")
        assert line["mask_passes"] == (2 if method == "medlm" else 0)
    assert "toy" in capsys.readouterr().out


RANK = """
import os, sys, tempfile
sys.path[:0] = {paths!r}
import evaluate, test_evaluate
model = test_evaluate.StandIn()
evaluate.load = lambda args, path: (model, lambda *_: None, "medlm")
evaluate.main(["--path", {folder!r}, "--task", "gsm8k", "--data_dir", {folder!r}, "--output_dir", {out!r}])
print("asked", len(model.asked))
"""


@pytest.mark.slow
def test_two_ranks_under_torchrun(tmp_path, files):
    paths = [str(Path(evaluate.__file__).parent), str(Path(__file__).parent)]
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(paths=paths, folder=str(tmp_path), out=str(tmp_path / "out")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=one_thread)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"asked \d", done.stdout)) == ["asked 3", "asked 4"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["tasks"]["gsm8k"]["n"] == 7
    assert len(list((tmp_path / "out").glob("gsm8k.rank*.jsonl"))) == 2


def test_repairs_start_from_the_corrupted_responses_and_both_are_judged(tmp_path):
    tokenizer = toy.tokenizer()
    model = models.build("editflow", "tiny", tokenizer.vocab_size, schedule="linear", x0_sampler="draft")
    torch.nn.init.constant_(model.rate_heads[0].bias, -60.0)  # nothing is edited
    models.save(model, tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    flags = ["--path", str(tmp_path / "model"), "--task", "toy-repair", "--limit", "20", "--steps", "2"]
    evaluate.main([*flags, "--output_dir", str(tmp_path / "out")])
    rows = [json.loads(line) for line in (tmp_path / "out/toy-repair.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows] == [row["draft"] for row in rows]
    assert [row["valid"] for row in rows] == [row["draft_valid"] for row in rows]
    assert not all(row["draft_valid"] for row in rows)
