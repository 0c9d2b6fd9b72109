import io
import re
import trace as tr
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ragged import DEL, GAP, KEEP, SUB, Ragged, apply_edits

WORDS = ["<bos>", "<mask>", "<pad>", " the", " cat", "s", ".", "\n", " sat", "  ", "é"]


def pieces(ids):
    return [WORDS[i] for i in ids]


class Tty(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def tensors(edits, n):
    """{position: (op, sub, ins)} to the three tensors of `apply_edits`."""
    rows = [edits.get(i, (KEEP, GAP, GAP)) for i in range(n)]
    op, sub, ins = (torch.tensor([row[k] for row in rows], dtype=torch.int64) for k in range(3))
    return op.to(torch.uint8), sub, ins


def record(start, steps, prompt_len=1, labels=None, **options):
    """A trace of one sequence under the given edits, and the states that it really went through."""
    trace, ids, states = tr.Trace(prompt_len, pieces, mask_id=1, pad_id=2, **options), start, [start]
    for k, edits in enumerate(steps):
        x = Ragged.pack([ids])
        arguments = tensors(edits, len(ids))
        trace.on_step(k / len(steps), x, *arguments, labels[k] if labels else "")
        ids = apply_edits(x, *arguments).unpack()[0]
        states.append(ids)
    return trace.finish(ids), states


def two_phases():
    """Three masks become "the cats", a pad is dropped, then "cats" is repaired to "cat sat." in two edit passes."""
    trace = tr.Trace(1, pieces, mask_id=1, pad_id=2)
    trace.on_step(0.0, Ragged.pack([[0, 1, 1, 1, 1]]), *tensors({1: (SUB, 3, GAP), 2: (SUB, 4, GAP)}, 5), "mask")
    trace.on_step(0.5, Ragged.pack([[0, 3, 4, 1, 1]]), *tensors({3: (SUB, 5, GAP), 4: (SUB, 2, GAP)}, 5), "mask")
    trace.on_step(0.0, Ragged.pack([[0, 3, 4, 5]]), *tensors({2: (KEEP, GAP, 8), 3: (SUB, 6, GAP)}, 4), "edit")
    trace.on_step(0.5, Ragged.pack([[0, 3, 4, 8, 6]]), *tensors({}, 5), "edit")
    return trace.finish()


@st.composite
def batches(draw):
    """A batch of sequences and, per step, the edit drawn for position i of any sequence (used modulo its length)."""
    token = st.integers(3, len(WORDS) - 1)
    sequences = draw(st.lists(st.lists(token, min_size=1, max_size=6), min_size=1, max_size=3))
    edit = st.tuples(st.sampled_from([KEEP, KEEP, SUB, DEL]), token, st.one_of(st.just(GAP), st.just(GAP), token))
    return sequences, draw(st.lists(st.lists(edit, min_size=7, max_size=7), max_size=6))


@given(batches(), st.integers(0, 2))
@settings(max_examples=150, deadline=None)
def test_frames_are_the_true_states_and_mark_exactly_what_the_steps_did(batch, index):
    sequences, steps = batch
    index %= len(sequences)
    trace = tr.Trace(0, pieces, index=index)
    x, truth, columns = Ragged.pack(sequences), [], []
    for k, drawn in enumerate(steps):
        rows = [drawn[p % 7] for p in x.positions.tolist()]
        op, sub, ins = (torch.tensor([row[c] for row in rows], dtype=torch.int64) for c in range(3))
        trace.on_step(k / len(steps), x, op.to(torch.uint8), sub, ins, "")
        a, b = x.cu_seqlens[index : index + 2].tolist()
        truth.append(x.unpack()[index])
        columns.append([c[a:b].tolist() for c in (op, sub, ins)])
        x = apply_edits(x, op.to(torch.uint8), sub, ins)
    truth.append(x.unpack()[index])
    shown = tr.frames(trace.finish(x))
    assert [[cell.id for cell in frame.cells] for frame in shown] == truth
    assert [frame.step for frame in shown] == list(range(len(steps) + 1))
    total = (0, 0, 0)
    for frame, (op, sub, ins), after in zip(shown, columns, shown[1:]):
        assert [cell.leaving for cell in frame.cells] == [o == DEL for o in op]
        marks = []
        for cell, o, s, i in zip(frame.cells, op, sub, ins):
            marks += [] if o == DEL else [tr.SUBSTITUTED if o == SUB and s != cell.id else ""]
            marks += [] if i == GAP else [tr.INSERTED]
        assert [cell.mark for cell in after.cells] == marks
        counts = (marks.count(tr.INSERTED), marks.count(tr.SUBSTITUTED), op.count(DEL))
        assert tuple(after.edits) == counts
        total = tuple(map(sum, zip(total, counts)))
        assert tuple(after.total) == total


@given(batches(), st.integers(2, 5))
@settings(max_examples=60, deadline=None)
def test_a_selection_of_frames_still_leads_from_each_to_the_next(batch, limit):
    sequences, steps = batch
    edits = [{i: e for i, e in enumerate(drawn)} for drawn in steps]
    trace, states = record(sequences[0], edits, prompt_len=0)
    shown = tr.frames(trace, limit)
    assert len(shown) <= limit
    assert (shown[0].step, shown[-1].step) == (0, len(steps))
    assert shown[-1].total == tr.frames(trace)[-1].total
    for before, after in pairwise(shown):
        assert [cell.id for cell in after.cells] == states[after.step]
        stayed = sum(not cell.leaving for cell in before.cells)
        assert stayed == sum(cell.mark != tr.INSERTED for cell in after.cells)
        kept = [cell.id for cell in after.cells if cell.mark == ""]
        assert all(token in states[before.step] for token in kept)


def test_steps_that_change_nothing_are_merged_when_frames_are_limited():
    trace, _ = record([0, 1, 1], [{}, {}, {1: (SUB, 3, GAP)}, {}, {}, {2: (DEL, GAP, GAP)}, {}])
    assert [frame.step for frame in tr.frames(trace, 100)] == [0, 3, 6, 7]
    assert [cell.leaving for cell in tr.frames(trace, 100)[1].cells] == [False, False, True]
    assert len(tr.frames(trace)) == 8


def test_phases_are_named_and_what_happens_between_them_is_carried_over():
    shown = tr.frames(two_phases())
    assert [frame.phase for frame in shown] == ["", "mask pass 1/2", "mask pass 2/2", "edit pass 1/2", "edit pass 2/2"]
    assert [cell.id for cell in shown[2].cells] == [0, 3, 4, 5]
    assert [cell.leaving for cell in shown[1].cells] == [False, False, False, False, True]  # becomes a pad, is dropped
    assert [cell.kind for cell in shown[1].cells] == ["prompt", "text", "text", "mask", "mask"]
    assert str(shown[-1].total) == "+1 ~5 -0"


def test_draft_and_repaired_text_are_compared():
    draft, repaired = tr.comparison(two_phases())
    assert [(cell.text, cell.leaving) for cell in draft] == [(" the", False), (" cat", False), ("s", True)]
    assert [(cell.text, cell.mark) for cell in repaired] == [(" the", ""), (" cat", ""), (" sat", "+"), (".", "+")]
    assert tr.comparison(record([0], [{}])[0]) is None


def test_a_saved_trace_comes_back_with_the_same_frames(tmp_path):
    trace = two_phases()
    trace.save(tmp_path / "t.json")
    again = tr.Trace.load(tmp_path / "t.json")
    assert tr.frames(again) == tr.frames(trace)
    assert tr.comparison(again) == tr.comparison(trace)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"prompt_len": 1, "mask_id": 1, "pad_id": 2, "steps": 4}'])
def test_a_file_that_is_no_trace_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json: not a trace"):
        tr.Trace.load(tmp_path / "x.json")


def test_without_a_terminal_there_are_no_escape_codes_and_every_mark_is_in_ascii():
    steps = [{0: (KEEP, GAP, 3)}, {0: (KEEP, GAP, 4), 2: (SUB, 8, GAP)}, {1: (DEL, GAP, GAP)}]
    file = io.StringIO()
    tr.show(record([0, 1], steps)[0], file)
    text = file.getvalue()
    assert not re.search(r"[\x1b\r]", text)
    for marked in ("{+the+}", "{~sat~}", "[-cat-]"):
        assert marked in text
    assert text.count("step ") == 4


def test_an_ascii_file_gets_ascii():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    tr.show(record([0, 1, 10], [{2: (KEEP, GAP, 7)}])[0], file)
    file.flush()
    assert b"__" in raw.getvalue()
    assert b"{+\\n+}" in raw.getvalue()


def test_a_terminal_is_redrawn_in_place_and_no_color_keeps_the_marks(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    trace, _ = record([0, 1], [{0: (KEEP, GAP, 3)}, {2: (SUB, 8, GAP)}, {1: (DEL, GAP, GAP)}])
    colored, plain = Tty(), Tty()
    tr.show(trace, colored, delay=0)
    monkeypatch.setenv("NO_COLOR", "1")
    tr.show(trace, plain, delay=0)
    assert colored.getvalue().count("\x1b[J") == 3
    assert "\x1b[1;4;32mthe" in colored.getvalue()
    for marked in ("\x1b[1;4mthe", "\x1b[9mthe", "\x1b[7msat"):
        assert marked in plain.getvalue()
    assert not re.search(r"\x1b\[[\d;]*3\dm", plain.getvalue())


def test_live_draws_each_step_and_the_end(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = Tty()
    record([0, 1], [{0: (KEEP, GAP, 3)}, {2: (SUB, 8, GAP)}, {1: (DEL, GAP, GAP)}], live=file)
    drawn = file.getvalue().split("\x1b[J")
    assert len(drawn) == 4
    assert [re.search(r"step (\S+) ", d)[1] for d in drawn] == ["0", "1", "2", "3/3"]
    assert "total +1 ~1 -0" in drawn[2]
    assert "total +1 ~1 -1" in drawn[3]


def test_text_of_a_model_cannot_steer_the_terminal():
    assert tr.printable("a\x1b[2Jb\x07\x9b\u202e\ud800") == "a␛[2Jb␇���"
    assert tr.printable("a\r\nb\u2028c\t") == "a\nb\nc    "


@given(st.lists(st.text("ab \nWé中\u0301", max_size=9), max_size=8), st.integers(4, 12))
@settings(max_examples=200, deadline=None)
def test_wrapped_lines_fit_and_lose_nothing_but_spaces_at_breaks(texts, width):
    cells = [tr.Cell(0, text, "text") for text in texts]
    lines = tr.wrap(cells, width, tr._columns, tr.UNICODE)
    assert all(span.x + tr._columns(span.text) <= width for line in lines for span in line if len(span.text) > 1)
    shown = "".join(span.text for line in lines for span in line)
    assert re.sub(r"[ \n]", "", shown) == re.sub(r"[ \n]", "", "".join(texts))
    assert len(lines) >= "".join(texts).count("\n") + 1
