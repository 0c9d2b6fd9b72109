"""evaluate.py: what counts as an answer, and that every sample is answered once, whatever happens to the run."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
import toy
from plumbing import checkpoints
from plumbing.tokenizer import train_tokenizer
from ragged import Generated

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


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    paths = {}
    for name, records in RECORDS.items():
        path = tmp_path / evaluate.TASKS[name].files[0]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        paths[name] = str(path)
    return paths


# ------------------------------------------------------------------------------------------------- finding answers


balanced = st.recursive(
    st.text(alphabet="abx+-^_ 0123.,()[]", max_size=8) | st.sampled_from(["\\{", "\\}", "\\\\", "\\frac", "\\left\\{"]),
    lambda inner: st.tuples(inner, inner).map(lambda p: p[0] + "{" + p[1] + "}") | st.tuples(inner, inner).map("".join),
    max_leaves=12,
)


@given(before=st.text(max_size=30), content=balanced, gap=st.sampled_from(["", " "]))
def test_boxed_returns_what_was_put_in_the_last_box(before, content, gap):
    text = f"{before}\\boxed{{7}} then {before}\\boxed{gap}{{{content}}} and {{"
    assert evaluate.boxed(text) == content.strip()


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{7} then \\boxed {\\frac{1}{2}} so {x}", "\\frac{1}{2}"),
        ("\\boxed{1", None),
        ("\\boxed{1} and \\boxed{2", "1"),
        ("\\boxed{\\left\\{1, 2\\right.}", "\\left\\{1, 2\\right."),
    ],
)
def test_boxed_by_example(text, content):
    assert evaluate.boxed(text) == content


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


NUMBERS = {
    "": None, "no number": None, "5 then #### none": None, "10-3 = 7": 7, "10-3": 3, "it fell by -3": -3,
    "-$1,234.50": Decimal("-1234.50"), "(1,2)": 2, "1{,}000": 1000, ".5": Decimal("0.5"), "so 1,000,000.": 1000000,
    "#### \\boxed{18}": 18, "#### 72.00": 72,
}  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_final_number_by_example(text):
    assert evaluate.final_number(text) == NUMBERS[text]


some_lines = st.sampled_from(["def f(x):", "    return x", "", "import re", "    print(x)", "y = '{'"])


@given(lines=st.lists(some_lines), prose=st.text(alphabet="abc \n."), tag=st.sampled_from(["", "python"]))
def test_code_returns_what_was_fenced(lines, prose, tag):
    program = "\n".join(lines)
    expected = program.rstrip() + "\n"
    assert evaluate.code(f"{prose}```{tag}\n{program}\n```{prose}") == expected
    assert evaluate.code(f"{prose}```{tag}\n{program}\n```{prose}\n```\nsecond\n```") == expected
    assert evaluate.code(f"{prose}```{tag}\n{program}") == expected
    assert evaluate.code(program) == expected


DEMONSTRATIONS = [
    "assert f(1) == 2", "print(f(1))", "print (f(1, 2))", "check(f)", "if __name__ == '__main__':\n    f()",
    "if True:\n    raise ValueError", "if(f(1)):\n    exit()",
]  # fmt: skip


@pytest.mark.parametrize("demo", DEMONSTRATIONS)
def test_code_leaves_demonstrations_out_behind_the_function(demo):
    program = "import sys\nif sys:\n    y = 1\ndef f(x):\n    assert x\n    if x:\n        print (x)\n    return x\n"
    assert evaluate.code(f"```\n{program}\n{demo}\nrest\n```") == program
    assert evaluate.code(f"    return x\n\n{demo}") == "    return x\n"


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("Here:\n```python\ndef f():\n    pass\n```\nDone.", "def f():\n    pass\n"),
        ("```\na = 1\n```\n```\nb = 2\n```", "a = 1\n"),
        ("first line\na = 1", "a = 1\n"),
        ("```python\nimport os\nif os:\n    pass\ndef f(): pass\n```", "import os\n"),
        ("```python\na = 1\nprinter = 2\n```", "a = 1\n"),
        ("```python\na = 1\n# Tests\nb = 2", "a = 1\n"),
        ("```python\na = 1\nchecker()\nb = 2", "a = 1\n"),
    ],
)
def test_published_code_ends_at_the_published_stops(response, program):
    assert evaluate.published_code(response) == program


# -------------------------------------------------------------------------------------------------------- verdicts


def right(task: str, record: dict, response: str, by: str = "right") -> bool:
    return evaluate.TASKS[task].check(record, response)[by]


published = partial(right, by=evaluate.PUBLISHED)


def test_gsm8k_and_math_verdicts():
    record = RECORDS["gsm8k"][3]
    assert right("gsm8k", record, record["answer"])
    assert right("gsm8k", record, "The answer is $4.00.")
    assert not right("gsm8k", record, "The answer is 5")
    assert not right("gsm8k", record, "")
    record = RECORDS["math500"][0]
    for answer in ("\\frac{1}{2}", "\\frac{1} {2}", "0.5", "\\dfrac12", "2/4"):
        assert right("math500", record, f"So it is \\boxed{{{answer}}}."), answer
    for response in ("\\frac{1}{2}", "\\boxed{2}", "\\boxed{}", "\\boxed{\\frac{", "\\boxed{\\text{half}}", ""):
        assert not right("math500", record, response), response


EQUAL = {  # reference: answer
    "50\\%": "50", "50": "50\\%", "25%": "25", "90^\\circ": "90", "90": "90^{\\circ}", "x=5": "5", "5": "x = 5",
    "\\$32": "32", "\\left( 3, \\frac{\\pi}{2} \\right)": "(3,\\frac{\\pi}{2})", "10\\text{ cm}": "10",
    "\\text{Evelyn}": "\\text{Evelyn}", "y = 2x + 3": "2x+3",
}  # fmt: skip


@pytest.mark.parametrize(("reference", "answer"), EQUAL.items())
def test_what_does_not_change_an_answer_of_math(reference, answer):
    record = {"answer": reference}
    assert right("math500", record, f"\\boxed{{{answer}}}")
    assert not right("math500", record, f"\\boxed{{{answer} + 1}}")
    assert not right("math500", record, "\\boxed{}")


def test_the_published_verdicts_are_stricter():
    record = RECORDS["gsm8k"][3]
    for response in ("\\boxed{4}", "\\boxed{\\$4.00}", "so \\boxed{x = 4}"):
        assert published("gsm8k", record, response), response
    for response in ("#### 4", "The answer is 4.", "\\boxed{3 + 1 = 4}", "\\boxed{5}", ""):
        assert not published("gsm8k", record, response), response
    answers = {"\\frac{1}{2}": (["0.5", "\\dfrac12", "1/2"], ["2/4", "\\frac{2}{4}"]), "4": (["4.0"], ["2^2", "8/2"])}
    for reference, (strict, lenient) in answers.items():
        for answer in strict + lenient:
            record, response = {"answer": reference}, f"\\boxed{{{answer}}}"
            assert right("math500", record, response), answer
            assert published("math500", record, response) == (answer in strict), answer
    record, body = RECORDS["humaneval"][1], "    return 2 * x\n"
    for response, holds in ((f"```python\n{PROMPT}{body}```", True), (body, False), (f"Sure:\n{body}", True)):
        assert published("humaneval", record, response) == holds, response
        assert right("humaneval", record, response) == (not response.startswith("Sure")), response


def test_the_tests_have_the_helpers_of_the_prompt_and_not_those_of_the_response():
    prompt = "def twice(x):\n    return 2 * x\n\ndef half(x):\n    'Undo twice.'\n"
    test = "def check(candidate):\n    for x in range(5):\n        assert candidate(twice(x)) == x\n"
    record = {"prompt": prompt, "entry_point": "half", "test": test}
    assert right("humaneval", record, "    return x // 2\n")
    assert not right("humaneval", record, "```\ndef twice(x):\n    return x\ndef half(x):\n    return x\n```")


def test_mbpp_finds_the_function_whatever_it_is_called():
    for asserts, response in (
        (["assert sum(10, 15) == 6"], "def sum(a, b):\n    return 6"),
        (["assert set(f((3, 4))) == set((4, 3))"], "def set(x):\n    return 1\ndef f(x):\n    return [4, 3]"),
        (["assert math.isclose(area(1), 3.14159, rel_tol=0.001)"], "import math\ndef area(r):\n    return math.pi * r"),
        (["assert (find(1))==(1)", "assert not find(0)"], "def find(x):\n    return x"),
    ):
        record = {"prompt": "", "test_list": asserts}
        assert right("mbpp", record, f"```\n{response}\n```"), asserts
    forged = "def set(x):\n    return 1\ndef f(x):\n    return [5]"
    assert not right("mbpp", {"prompt": "", "test_list": ["assert set(f(3)) == set((4, 3))"]}, forged)


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
    number = record["response"].rpartition("#### ")[2]
    answers = {record["response"]: (True, True), f"gibberish #### {number}": (True, False), "": (False, False)}
    for response, (is_right, is_valid) in answers.items():
        assert evaluate.TASKS["toy"].check(record, response) == {"right": is_right, "valid": is_valid}


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


def test_the_system_prompt_can_be_replaced_and_left_out_and_a_folder_gives_its_test_files(tmp_path, files):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "gsm8k_test.jsonl").rename(folder / "gsm8k_test.jsonl")
    (folder / "gsm8k_train.jsonl").write_text('{"question": "train", "answer": "#### 1"}\n')
    replaced = evaluate.load_samples("gsm8k", str(folder), None, 0, "Be brief.")
    assert len(replaced) == 7
    assert replaced[0].messages[0]["content"] == "Be brief."
    assert [m["role"] for m in evaluate.load_samples("gsm8k", str(folder), 1, 0, "")[0].messages] == ["user"]


def test_fields_of_question_and_answer_can_be_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"task": "2 + 2?", "solution": "4", "question": "no", "answer": "no"}')
    [sample] = evaluate.load_samples("gsm8k", str(path), None, 0, "", ("task", "solution"))
    assert sample.messages == [{"role": "user", "content": "2 + 2?"}]
    assert evaluate.gsm8k_check(sample.record, "4")["right"]
    with pytest.raises(ValueError, match=r"a\.jsonl:1: needs text in field 'nowhere'; --prompt_field and"):
        evaluate.load_samples("gsm8k", str(path), None, 0, "", ("nowhere", None))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "q"}', ":2: .*'answer'"),
        ('{"question": 1, "answer": "2"}', ":2: .*'question'"),
        ("{", ":2: .*not JSON"),
        ("[]", ":2: .*'question'"),
        ("", ": no record in it"),
    ],
)
def test_broken_records_are_named(tmp_path, text, message):
    path = tmp_path / "gsm8k_test.jsonl"
    path.write_text(json.dumps(RECORDS["gsm8k"][0]) + "\n" + text + "\n" if text else "\n")
    with pytest.raises(ValueError, match=f"gsm8k_test.jsonl{message}"):
        evaluate.load_samples("gsm8k", str(path), None, 0, None)


def test_the_key_covers_everything_an_answer_depends_on(files, tmp_path):
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(b"1")

    def keys(settings=None, seed=0, system=None, limit=None):
        samples = evaluate.load_samples("gsm8k", files["gsm8k"], limit, seed, system)
        evaluate.set_keys(samples, settings or {"a": 1}, weights.parent)
        return [sample.key for sample in samples]

    first = keys()
    assert len(set(first)) == 7
    (weights.parent / "summary.json").write_text("{}")  # results may be kept beside the weights
    assert keys() == first
    assert keys(limit=3) == first[:3]
    for other in (keys({"a": 2}), keys(seed=1), keys(system="")):
        assert not set(first) & set(other)
    weights.write_bytes(b"2")
    os.utime(weights, ns=(1, 1))
    assert not set(first) & set(keys())


# ---------------------------------------------------------------------------------------- rows, killing, going on


class StandIn:
    """Answers by rule, remembers what it was asked, and dies after `lifetime` samples."""

    def __init__(self, lifetime: int | None = None):
        self.asked, self.lifetime = [], lifetime

    def __call__(self, samples):
        if self.lifetime is not None and len(self.asked) + len(samples) > self.lifetime:
            raise KeyboardInterrupt
        self.asked += [sample.id for sample in samples]
        return [self.answer(sample) for sample in samples]

    def answer(self, sample) -> dict:
        number = int(sample.id.partition("/")[2])
        draft, response = f"#### {number + number % 2}", f"#### {number + 1 - number % 3}"
        passes = {"mask_passes": 4, "edit_passes": number}
        return {"response": response, "tokens": number, "draft": draft, "passes": passes}


def numbered_samples(n: int):
    asked = [{"role": "user", "content": "q"}]
    return [evaluate.Sample(f"Gsm8k/{i}", {"answer": f"#### {i + 1}"}, asked, seed=i, key=str(i)) for i in range(n)]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lives=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(1, 4)), max_size=4),
    tear=st.integers(0, 40),
)
def test_every_sample_is_answered_once_however_often_the_run_is_killed(tmp_path_factory, lives, tear):
    """Each life: killed after so many samples, on so many ranks, with such batches; a kill may tear the last line."""
    samples, asked = numbered_samples(12), []
    whole, out = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("out")
    evaluate.answer_samples("gsm8k", samples, StandIn(), whole)
    for lifetime, world, batch_size in [*lives, (99, 2, 3)]:
        for rank in range(world):
            model = StandIn(lifetime)
            try:
                evaluate.answer_samples("gsm8k", samples, model, out, rank, world, batch_size)
            except KeyboardInterrupt:
                with open(out / f"gsm8k.rank{rank}.jsonl", "ab") as file:
                    file.write(b'{"key": "' + b"x" * tear)
            asked += model.asked
    assert sorted(asked) == sorted(sample.id for sample in samples)
    rows, expected = (evaluate.judge("gsm8k", samples, folder) for folder in (out, whole))
    assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in expected]
    assert [row["id"] for row in rows] == [sample.id for sample in samples]
    assert lines(out / "gsm8k.jsonl") == rows


def test_a_last_line_without_its_newline_is_answered_again(tmp_path):
    samples, model = numbered_samples(3), StandIn()
    evaluate.answer_samples("gsm8k", samples, StandIn(), tmp_path)
    path = tmp_path / "gsm8k.rank0.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    evaluate.answer_samples("gsm8k", samples, model, tmp_path)
    assert model.asked == ["Gsm8k/2"]
    assert len(evaluate.judge("gsm8k", samples, tmp_path)) == 3


@pytest.mark.parametrize("line", ["{", "[1]", '{"task": "gsm8k"}', ""])
def test_a_broken_line_in_the_middle_is_an_error(tmp_path, line):
    evaluate.answer_samples("gsm8k", numbered_samples(2), StandIn(), tmp_path)
    path = tmp_path / "gsm8k.rank0.jsonl"
    path.write_text(path.read_text().replace("\n", f"\n{line}\n", 1))
    with pytest.raises(ValueError, match=r"gsm8k.rank0.jsonl:2: not a row"):
        evaluate.read_rows("gsm8k", tmp_path)


def test_code_is_judged_only_when_allowed_and_then_without_generating_again(tmp_path, files, monkeypatch):
    samples = evaluate.load_samples("humaneval", files["humaneval"], None, 0, None)
    evaluate.set_keys(samples, {}, tmp_path)

    def generate(batch):
        answer = {"response": "    return x + x", "tokens": 4, "draft": "    return 4", "passes": {"steps": 1}}
        return [answer for _ in batch]

    monkeypatch.setattr(evaluate.execution, "run", lambda *a: pytest.fail("must not run"))
    evaluate.answer_samples("humaneval", samples, generate, tmp_path)
    rows = evaluate.judge("humaneval", samples, tmp_path)
    assert rows[0]["verdicts"] == evaluate.summarise(rows)["verdicts"] == {}
    solutions = lines(tmp_path / "evalplus_humaneval_response.jsonl")
    assert [s["task_id"] for s in solutions] == ["HumanEval/0", "HumanEval/1", "HumanEval/2"]
    assert {s["solution"] for s in solutions} == {PROMPT + "    return x + x\n"}
    assert len((tmp_path / "evalplus_humaneval_draft.jsonl").read_text().splitlines()) == 3

    monkeypatch.undo()
    evaluate.answer_samples("humaneval", samples, None, tmp_path)
    rows = evaluate.judge("humaneval", samples, tmp_path, may_run=True)
    right = [(row["verdicts"]["draft right"], row["verdicts"]["response right"]) for row in rows]
    assert right == [(False, True), (False, True), (True, True)]


# --------------------------------------------------------------------------------------------------------- summary


def row(draft, right, edit_passes=2, tokens=10):
    verdicts, passes = {"draft right": draft, "response right": right}, {"mask_passes": 4, "edit_passes": edit_passes}
    return {"verdicts": verdicts, "passes": passes, "seconds": 0.5, "tokens": tokens}


def test_summary_arithmetic():
    rows = [row(False, True), row(False, False, edit_passes=6), row(True, True, tokens=30), row(False, True)]
    summary = evaluate.summarise(rows)
    assert summary["n"] == 4
    assert summary["verdicts"]["draft right"]["percent"] == 25
    error = pytest.approx(100 * (0.75 * 0.25 / 4) ** 0.5)
    assert summary["verdicts"]["response right"] == {"percent": 75, "standard_error": error}
    assert summary["passes"] == {"mask_passes": 4, "edit_passes": 3}
    assert summary["tokens_per_second"] == 30


def test_a_verdict_counts_where_there_is_something_to_judge():
    without_draft = row(False, True) | {"verdicts": {"response right": True}}
    found = evaluate.summarise([without_draft, row(True, True)])["verdicts"]["draft right"]
    assert found == {"percent": 100, "standard_error": 0}


# ------------------------------------------------------------------------------------------------------ the script


@pytest.fixture
def standing_in(monkeypatch, tmp_path):
    """main without a model: `run(flags)` gives the ids asked for and the summary."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    out = tmp_path / "out"

    def run(*flags):
        model = StandIn()
        monkeypatch.setattr(evaluate.checkpoints, "open_for_inference", lambda *a: (None, None))
        monkeypatch.setattr(evaluate, "prepare", lambda m, t, args, *a: ({"order": args.order}, model))
        evaluate.main(["--path", str(checkpoint), "--output_dir", str(out), *flags])
        return model.asked, json.loads((out / "summary.json").read_text())

    return run


def test_main_from_files_to_summary(standing_in, files, tmp_path, capsys):
    asked, summary = standing_in("--task", "gsm8k", "--data_dir", str(tmp_path), "--limit", "5", "--batch_size", "2")
    assert asked == [f"Gsm8k/{i}" for i in range(5)]
    result = summary["tasks"]["gsm8k"]
    assert (result["n"], result["verdicts"]["response right"]["percent"]) == (5, 40)
    assert summary["args"]["data"]["gsm8k"] == files["gsm8k"]
    assert "####" in result["judge"]
    assert summary["settings"] == {"gsm8k": {"order": None}}
    assert re.sub(r" \S+ tokens/s", "", capsys.readouterr().out).splitlines() == [
        "gsm8k, 5 samples:   4.0 mask passes   2.0 edit passes  ",
        "    draft right            40.0 ± 21.9 %",
        "    draft as published      0.0 ± 0.0 %",
        "    response right         40.0 ± 21.9 %",
        "    response as published   0.0 ± 0.0 %",
        f"answers, verdicts and summary written to {tmp_path}/out",
    ]

    more, _ = standing_in("--task", "gsm8k", "--data", f"gsm8k={files['gsm8k']}", "--batch_size", "8")
    assert more == ["Gsm8k/5", "Gsm8k/6"]
    others, _ = standing_in("--task", "gsm8k", "--data_dir", str(tmp_path), "--order", "random")
    assert len(others) == 7
    again, _ = standing_in("--task", "gsm8k", "--data_dir", str(tmp_path), "--tau", "0.5")  # no setting of this method
    assert again == []


def test_evalplus_is_asked_where_it_is_installed(standing_in, files, tmp_path, monkeypatch, capsys):
    package = tmp_path / "site" / "evalplus"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    stand_in = "import sys\nassert sys.argv[1:3] == ['--dataset', 'humaneval']\nassert open(sys.argv[4]).read()\n"
    (package / "evaluate.py").write_text(stand_in + "print('pass@1:\\t0.250\\npass@1:\\t0.125')\n")
    flags = ("--task", "humaneval", "--data_dir", str(tmp_path))
    standing_in(*flags)
    assert "programs were written to" in capsys.readouterr().out

    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.syspath_prepend(package.parent)
    result = standing_in(*flags, "--allow_code_execution")[1]["tasks"]["humaneval"]
    assert result["evalplus"] == {kind: {"base": 0.25, "plus": 0.125} for kind in evaluate.TEXTS}
    (package / "evaluate.py").write_text("raise SystemExit('no network')")
    result = standing_in(*flags, "--allow_code_execution")[1]["tasks"]["humaneval"]
    assert result["evalplus"]["response"] == "failed: no network"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "gsm8k", "--data_dir", "nowhere"], "nowhere/gsm8k_test.jsonl: no such file"),
        (["--task", "gsm8k", "--data", "gsm8k=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--task", "toy", "--output_dir", "/proc/nowhere"], "--output_dir /proc/nowhere: cannot be written"),
        (["--task", "toy", "--path", "/nowhere"], "/nowhere: no such directory"),
    ],
)
def test_errors_are_one_line_and_come_before_the_model(flags, message, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.checkpoints, "open_for_inference", lambda *a: pytest.fail("loaded a model"))
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as caught:
        evaluate.main(["--path", str(tmp_path), "--output_dir", str(tmp_path / "out"), *flags])
    assert "\n" not in str(caught.value)


def test_the_published_folder_of_data(standing_in, tmp_path, capsys):
    """Its GSM8K has bare answers, its HumanEval no tests: evalplus has them."""
    for name, record in (
        ("math/gsm8k", {"question": "What is 0 + 1?", "solution": "#### 1", "answer": "1"}),
        ("code/humaneval", {"task_id": "HumanEval/0", "prompt": PROMPT}),
    ):
        file = tmp_path / "data" / f"{name}.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(record) + "\n")
    flags = ("--data_dir", str(tmp_path / "data"), "--task", "gsm8k", "humaneval", "--allow_code_execution")
    tasks = standing_in(*flags)[1]["tasks"]
    assert tasks["gsm8k"]["verdicts"]["response right"]["percent"] == 100
    assert tasks["humaneval"]["verdicts"] == {}
    assert "evalplus has" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ likelihood


class Uniform:
    """A method that gives every token 4 bits; its estimates are one bit off, to either side."""

    TITLE, TOKENS, seen = "Uniform", (), ()

    def likelihood(self, model, examples, settings, rng):
        self.seen = [*self.seen, *examples]
        noise = 0 if hasattr(self, "EXACT") else torch.randint(0, 2, (len(examples),), generator=rng) * 2 - 1
        bits = torch.tensor([4.0 * len(e.response) for e in examples], dtype=torch.float64)
        return (bits + noise) * torch.tensor(2.0, dtype=torch.float64).log()


@pytest.fixture
def uniform(monkeypatch, tmp_path):
    """`run(text, flags)` gives the summary of the task; a token is a byte."""
    tokenizer = train_tokenizer([], 300)
    model = checkpoints.new_model("editflow", "tiny", tokenizer.vocab_size)
    method = Uniform()
    monkeypatch.setattr(evaluate.checkpoints, "open_for_inference", lambda *a: (model, tokenizer))
    monkeypatch.setattr(evaluate.methods, "of", lambda model: method)

    def run(text: str, *flags, name="a=text.txt"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        flags = ["--data", str(tmp_path / name), "--output_dir", str(tmp_path / "out"), *flags]
        evaluate.main(["--path", str(tmp_path), "--task", "likelihood", *flags])
        return json.loads((tmp_path / "out/summary.json").read_text())["tasks"]["likelihood"]

    run.method, run.tokenizer = method, tokenizer
    return run


def test_likelihood_of_a_text_in_bits_per_byte(uniform, capsys):
    text = "Ä text of 1000 bytes, or so.\n" * 40
    size = len(text.encode())
    found = uniform(text, "--draws", "64", "--max_length", "11", "--batch_size", "7")
    pieces = -(-(size + 1) // 10)
    assert found["pieces"] == pieces == len(uniform.method.seen) / 64
    assert (found["bytes"], found["left_out"], found["draws"]) == (size, 0, 64)
    expected = 4 * (size + 1) / size  # the end of the text is a token, too
    assert abs(found["bits_per_byte"] - expected) < 5 * found["standard_error"]
    assert found["standard_error"] == pytest.approx(pieces**0.5 / size / 8, rel=0.4)
    assert re.search(r"from 64 draws, at most 4\.00\d\d ± 0\.00\d\d bits per byte", capsys.readouterr().out)
    uniform.method.EXACT = True
    found = uniform(text)
    assert (found["bits_per_byte"], found["standard_error"], found["draws"]) == (pytest.approx(expected), 0, 1)
    assert "exactly 4.0" in capsys.readouterr().out


def test_likelihood_of_records_is_that_of_their_responses(uniform):
    records = [{"prompt": "Ann", "response": "abcd"}, {"prompt": "Ben", "response": "x" * 400}, {"text": "abc"}]
    uniform.method.EXACT = True
    text = "".join(json.dumps(record) + "\n" for record in records)
    found = uniform(text, "--max_length", "256", name="records.jsonl")
    assert (found["bytes"], found["pieces"], found["left_out"]) == (7, 2, 1)
    assert found["bits_per_byte"] == pytest.approx(4 * (5 + 4) / 7)
    assert uniform(text, "--limit", "1", name="records.jsonl")["bytes"] == 4
    assert [uniform.tokenizer.decode(e.response) for e in uniform.method.seen] == ["abcd", "abc", "abcd"]


def test_likelihood_names_what_is_wrong(uniform, monkeypatch, tmp_path):
    for text in ("", " \n"):
        with pytest.raises(ValueError, match=r"a=text.txt: no record in it"):
            uniform(text)
    with pytest.raises(ValueError, match=r"b.jsonl:1: .*'text'"):
        uniform('{"text": 1}', name="b.jsonl")
    with pytest.raises(ValueError, match="no record fits into 8 tokens; raise --max_length"):
        uniform('{"prompt": "Ann", "response": "123456789"}', "--max_length", "8", name="b.jsonl")
    monkeypatch.setattr(evaluate.methods, "of", lambda model: SimpleNamespace(TITLE="Edit"))
    with pytest.raises(ValueError, match="--task likelihood: Edit"):
        uniform("text")
    monkeypatch.setattr(evaluate.methods, "of", lambda model: uniform.method)
    monkeypatch.setattr(uniform.tokenizer, "decode", lambda ids: "I go homf.")
    with pytest.raises(ValueError, match=r"c.txt: .* give the text back, from 'e\.' on"):
        uniform("I go home.", name="c.txt")


@pytest.mark.parametrize("tasks", ["likelihood", "likelihood gsm8k --data likelihood=x"])
def test_likelihood_stands_alone_and_needs_a_file(tasks, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--path", "p", "--task", *tasks.split()])
    assert "--task likelihood stands alone and needs --data FILE" in capsys.readouterr().err


@pytest.mark.parametrize("data", ["gsm8k", "gsm8k=", "sudoku=x", "mbpp=x", "toy=x", "gsm8k=x gsm8k=y"])
def test_data_goes_to_a_task_that_reads_it(data, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--path", "p", "--task", "gsm8k", "toy", "--data", *data.split()])
    assert f"--data {data}: expected TASK=PATH" in capsys.readouterr().err


def test_a_missing_judge_is_found_before_the_model(monkeypatch, files, tmp_path):
    monkeypatch.setitem(evaluate.TASKS, "math500", replace(evaluate.TASKS["math500"], package="no_such"))
    with pytest.raises(ValueError, match="--task math500 needs no_such to judge answers: pip install no_such"):
        evaluate.main(["--path", str(tmp_path), "--task", "math500", "--data_dir", str(tmp_path)])


def test_any_method_is_asked_in_the_same_way(monkeypatch):
    """A method's counts of passes bear its own names; what its answers depend on includes what the task says."""

    def generate(model, prompts, settings, seeds, drafts=None, suffixes=None):
        texts = [ids[1:] for ids in prompts]
        return [Generated(ids, ids, {"leaps": seed}, draft=ids[:1]) for ids, seed in zip(texts, seeds)]

    method = SimpleNamespace(TOKENS=(), start_length=lambda settings: settings.init_num, generate=generate)
    monkeypatch.setattr(evaluate.methods, "of", lambda model: method)
    tokenizer = toy.tokenizer()
    model = checkpoints.new_model("editflow", "tiny", tokenizer.vocab_size)
    args = evaluate.parse_args(["--path", "x", "--task", "toy", "--top_k", "7"])
    samples = evaluate.load_samples("toy", "", 3, 0, None)
    settings, answer = evaluate.prepare(model, tokenizer, args, "toy", samples)
    assert (settings["init_num"], settings["temperature"], settings["top_k"]) == (24, 0.0, 7)
    prompt = samples[2].messages[0]["content"]
    assert answer(samples)[2] == {
        "response": prompt, "tokens": 7, "draft": prompt.split()[0], "passes": {"leaps": 2},
    }  # fmt: skip


@pytest.mark.parametrize("method", ["medlm", "editflow"])
def test_real_models_of_both_methods(method, tmp_path, capsys):
    tokenizer = toy.tokenizer()
    options = {"schedule": "linear", "x0_sampler": "masks[length:4]"} if method == "editflow" else {}
    checkpoints.save(checkpoints.new_model(method, "tiny", tokenizer.vocab_size, **options), str(tmp_path / "model"))
    tokenizer.save(tmp_path / "model")
    flags = ["--path", str(tmp_path / "model"), "--task", "toy", "--limit", "2", "--output_dir", str(tmp_path / "out")]
    evaluate.main([*flags, "-m", "2", "-e", "2", "--init_num", "4", "--tau", "0.5", "--show_answers", "1"])
    rows = lines(tmp_path / "out/toy.jsonl")
    assert len(rows) == 2
    for line in rows:
        assert line["prompt"] in toy.prompts("test")
        assert (line["draft"] is None) == ("draft right" not in line["verdicts"]) == (method == "editflow")
        assert line["passes"]["mask_passes" if method == "medlm" else "steps"] == 2
    out = capsys.readouterr().out
    assert f"{rows[0]['prompt']}  ->  {rows[0]['response']}" in out
    assert f"\n    {toy.explain(rows[0]['prompt'], rows[0]['response'])}\n" in out
    assert out.endswith(f"written to {tmp_path}/out\n")
    assert ("draft right" in out) == ("mask passes" in out) == (method == "medlm")
    with pytest.raises(ValueError, match=r"question Toy/0"):
        evaluate.main([*flags, "--system_prompt", "Ann " * 5000])


def test_repairs_start_from_the_corrupted_responses_and_both_are_judged(tmp_path):
    tokenizer = toy.tokenizer()
    model = checkpoints.new_model("editflow", "tiny", tokenizer.vocab_size, schedule="linear", x0_sampler="draft")
    torch.nn.init.constant_(model.rate_heads[0].bias, -60.0)  # nothing is edited
    checkpoints.save(model, tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    flags = ["--path", str(tmp_path / "model"), "--task", "toy-repair", "--limit", "20", "--steps", "2"]
    evaluate.main([*flags, "--output_dir", str(tmp_path / "out")])
    rows = lines(tmp_path / "out/toy-repair.jsonl")
    assert [row["response"] for row in rows] == [row["draft"] for row in rows]
    assert [row["verdicts"]["response valid"] for row in rows] == [row["verdicts"]["draft valid"] for row in rows]
    assert not all(row["verdicts"]["draft valid"] for row in rows)


RANK = """
import os, sys
sys.path[:0] = {paths!r}
import evaluate, test_evaluate
model = test_evaluate.StandIn()
evaluate.checkpoints.open_for_inference = lambda *a: (None, None)
evaluate.prepare = lambda *a: (dict(), model)
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=one_thread)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"asked \d", done.stdout)) == ["asked 3", "asked 4"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["tasks"]["gsm8k"]["n"] == 7
    assert len(list((tmp_path / "out").glob("gsm8k.rank*.jsonl"))) == 2
