import io
import json
import re
import trace as tr
from itertools import pairwise

import frames as fr
import numpy as np
import plot
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor, ImageDraw

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
    assert fr.printable("a\x1b[2Jb\x07\x9b\u202e\ud800") == "a␛[2Jb␇���"
    assert fr.printable("a\r\nb\u2028c\t") == "a\nb\nc    "


@given(st.lists(st.text("ab \nWé中\u0301", max_size=9), max_size=8), st.integers(4, 12))
@settings(max_examples=200, deadline=None)
def test_wrapped_lines_fit_and_lose_nothing_but_spaces_at_breaks(texts, width):
    cells = [tr.Cell(0, text, "text") for text in texts]
    lines = tr.wrap(cells, width, fr._columns, fr.UNICODE)
    assert all(span.x + fr._columns(span.text) <= width for line in lines for span in line if len(span.text) > 1)
    shown = "".join(span.text for line in lines for span in line)
    assert re.sub(r"[ \n]", "", shown) == re.sub(r"[ \n]", "", "".join(texts))
    assert len(lines) >= "".join(texts).count("\n") + 1


def test_finish_takes_what_the_last_step_leaves_unless_told_otherwise():
    edits = {0: (KEEP, GAP, 4), 1: (SUB, 5, 6), 2: (DEL, GAP, 7)}
    x = Ragged.pack([[0, 3, 8, 9]])
    trace = tr.Trace(1, pieces)
    with pytest.raises(ValueError, match="nothing was recorded"):
        trace.finish()
    trace.on_step(0.0, x, *tensors(edits, 4), "")
    assert trace.finish().final[0] == apply_edits(x, *tensors(edits, 4)).unpack()[0]
    assert trace.finish(Ragged.pack([[0, 5]])).final == ([0, 5], ["<bos>", "s"])
    assert trace.finish([0, 6]).final == ([0, 6], ["<bos>", "."])


def test_edit_passes_of_other_sequences_are_left_out():
    trace, _ = record([0, 1], [{1: (SUB, 3, GAP)}, {1: (SUB, 4, GAP)}, {}, {}, {}], labels=["mask", *["edit"] * 4])
    assert [frame.phase for frame in tr.frames(trace)] == ["", "mask pass 1/1", "edit pass 1/2", "edit pass 2/2"]


def test_a_view_follows_the_changes_and_otherwise_rests():
    plain, changed = (fr.Span(0, "a", tr.Cell(0, "a", "text", mark)) for mark in ("", "+"))

    def lines(*busy):
        return [[changed if n in busy else plain] for n in range(20)]

    assert fr.window(lines(), 5, 7) == 7
    assert fr.window(lines(8, 10), 5, 7) == 7
    assert fr.window(lines(12), 5, 7) == 8
    assert fr.window(lines(3, 5), 5, 7) == 3
    assert fr.window(lines(8, 19), 5, 7) == 7  # too far apart: some of it is in view
    assert fr.window(lines(0, 19), 5, 7) == 0
    assert fr.window(lines(19), 5, 99) == 15


# ---- pictures --------------------------------------------------------------------------------------------------------


def gif_frames(path):
    """Size, and (duration in ms, grey levels) of every frame."""
    with Image.open(path) as image:
        shown = []
        for n in range(image.n_frames):
            image.seek(n)
            shown.append((image.info["duration"], np.asarray(image.convert("L"))))
        return image.size, shown


def test_a_gif_has_a_frame_per_change_and_holds_the_last_one(tmp_path):
    steps = [{}, {0: (KEEP, GAP, 3)}, {}, {}, {1: (SUB, 4, GAP)}, {1: (DEL, GAP, GAP)}]
    trace, _ = record([0, 1], steps)
    tr.write_gif(trace, tmp_path / "a.gif")
    size, shown = gif_frames(tmp_path / "a.gif")
    assert len(shown) == 5  # the start, three changes, and the end without marks
    assert shown[-1][0] == 3000
    assert all(grey.shape == size[::-1] for _, grey in shown)
    tr.write_gif(tr.Trace(1, pieces).finish([0, 3]), tmp_path / "none.gif")
    assert len(gif_frames(tmp_path / "none.gif")[1]) == 1
    tr.write_gif(two_phases(), tmp_path / "b.gif")
    assert len(gif_frames(tmp_path / "b.gif")[1]) == 6  # five states, then draft and repaired text


def test_a_long_decode_stays_a_short_and_small_gif(tmp_path):
    """130 tokens over 100 steps, in random order."""
    rng = np.random.default_rng(0)
    words = rng.choice([3, 4, 5, 6, 7, 8], size=(100, 2), p=[0.2, 0.2, 0.2, 0.1, 0.1, 0.2]).tolist()
    steps = [{int(rng.integers(1, 60)): (SUB, a, b if rng.random() < 0.66 else GAP)} for a, b in words]
    trace, _ = record([0] + [1] * 64, steps)
    tr.write_gif(trace, tmp_path / "a.gif", max_frames=60)
    assert len(gif_frames(tmp_path / "a.gif")[1]) == 60
    tr.write_gif(trace, tmp_path / "b.gif")
    assert (tmp_path / "b.gif").stat().st_size < 1_500_000


def test_marks_can_be_told_apart_in_grey():
    """By where the ink is: lines of dark pixels under, through, or broken under the word."""
    face, profiles = plot.font(15 * tr.U), {}
    for name, cell in [
        ("kept", tr.Cell(0, "", "text")),
        ("inserted", tr.Cell(0, "", "text", tr.INSERTED)),
        ("substituted", tr.Cell(0, "", "text", tr.SUBSTITUTED)),
        ("leaving", tr.Cell(0, "", "text", "", True)),
    ]:
        image = Image.new("L", (400, tr.ROW), 255)
        tr.draw_span(ImageDraw.Draw(image), 10, 0, tr.Span(0, "word", cell), face)
        dark = np.asarray(image)[:, 14 : 6 + int(face.getlength("word"))] < 160
        profiles[name] = dark.mean(axis=1)  # share of dark pixels per row
    under, through = slice(22 * tr.U, 24 * tr.U), slice(11 * tr.U, 16 * tr.U)
    assert profiles["kept"].max() < 0.7
    assert profiles["inserted"][under].min() == 1
    assert 0.3 < profiles["substituted"][under].mean() < 0.9
    assert profiles["leaving"][through].max() == 1
    assert profiles["leaving"][under].max() == profiles["kept"][under].max() == 0


def test_a_gif_is_drawn_with_any_font_and_any_text(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "FONTS", [])
    plot.font.cache_clear()
    texts = ["<bos>", "中文 😀", "", "\n\n", "x" * 300, "\x1b[31m", "\ud800", " \t "]
    trace = tr.Trace(1, lambda ids: [texts[i] for i in ids])
    trace.on_step(0.0, Ragged.pack([[0]]), *tensors({0: (KEEP, GAP, 1)}, 1))
    trace.on_step(0.5, Ragged.pack([[0, 1]]), *tensors({1: (DEL, GAP, 4)}, 2))
    trace.finish([0, 1, 2, 3, 4, 5, 6, 7])
    tr.write_gif(trace, tmp_path / "a.gif", title="中 “title”")
    assert len(gif_frames(tmp_path / "a.gif")[1]) == 4
    assert plot.fit("“é—↵”", plot.font(20)) == "“e-\\n”"
    plot.font.cache_clear()


def test_html_is_one_page_in_which_text_stays_text(tmp_path):
    hostile = ["</script><script>alert(1)</script>", "<!--", '"', "'", "\\", "&amp;", "{{data}}", "\ud800", "\u2028"]
    trace = tr.Trace(0, lambda ids: [hostile[i] for i in ids])
    trace.on_step(0.0, Ragged.pack([[0, 1, 2, 3, 4]]), *tensors({2: (DEL, GAP, 5)}, 5))
    trace.finish([0, 1, 5, 3, 4, 6, 7, 8])
    tr.write_html(trace, tmp_path / "a.html", title='<b>"{{data}}"')
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.count("</script>") == page.count("<script") == 2
    assert "alert(1)</script" not in page
    assert "<b>" not in page
    assert not re.search(r"https?://|src=|@import|url\(", page)
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1])
    cells = [[(row + ["text", "", False][len(row) - 1 :]) for row in frame["cells"]] for frame in data["frames"]]
    assert [[row[0] for row in frame] for frame in cells] == [[c.text for c in f.cells] for f in tr.frames(trace)]
    assert cells[0][2] == ['"', "text", "", True]
    assert data["frames"][1]["edits"] == {"inserted": 1, "substituted": 0, "deleted": 1}


# ---- charts and command line -----------------------------------------------------------------------------------------


def write_metrics(folder, values, tail=""):
    folder.mkdir()
    lines = [json.dumps({"step": 10 * k, "loss": v, "loss_sub": v / 2, "lr": 1e-3}) for k, v in enumerate(values)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 30, "eval_loss": 1.5}', tail]))
    return folder


def test_metrics_are_read_up_to_a_half_written_line(tmp_path):
    run = write_metrics(tmp_path / "run", [3.0, float("nan"), 2.0], '{"step": 40, "lo')
    curves = plot.read_metrics(run / "metrics.jsonl")
    assert [v.tolist() for v in curves["loss"]] == [[0, 20], [3.0, 2.0]]
    assert [v.tolist() for v in curves["eval_loss"]] == [[30], [1.5]]
    tr.main(["plot", str(run), "-o", str(tmp_path / "a.png")])
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1520, 920)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"ste\n{"step": 2, "loss": 2}\n')
    with pytest.raises(SystemExit, match=r"metrics\.jsonl, line 2: expected a JSON object"):
        tr.main(["plot", str(run), "-o", str(tmp_path / "b.png")])


def test_runs_are_compared_in_colours_of_their_own(tmp_path):
    runs = [write_metrics(tmp_path / name, np.linspace(high, 1, 200)) for name, high in (("a", 5), ("b", 9))]
    tr.main(["plot", *map(str, runs), "-o", str(tmp_path / "ab.png")])
    with Image.open(tmp_path / "ab.png") as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
    assert {ImageColor.getrgb(plot.BLUE), ImageColor.getrgb(plot.VERMILLION)} <= colors
    assert ImageColor.getrgb(plot.GREEN) not in colors


def test_a_chart_of_nothing_says_so(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.line_chart([plot.Series("a", [1], [float("inf")])], tmp_path / "a.png", "t", "x", "y")
    plot.line_chart([plot.Series("a", [1], [2])], tmp_path / "a.png", "t", "x", "y")
    assert (tmp_path / "a.png").exists()


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 9))
@example(1.0, 400400401.0, 2)
def test_ticks_are_round_and_inside(low, span, count):
    high = low + span
    if high - low > 1e-9 * abs(low):
        ticks = plot._ticks(low, high, count)
        slack = 1e-6 * (high - low)
        assert 1 <= len(ticks) <= count + 1
        assert all(low - slack <= tick <= high + slack for tick in ticks)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=300))
def test_smoothing_is_a_moving_mean(values):
    half = len(values) // 80
    slow = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    np.testing.assert_allclose(plot.smooth(np.array(values)), slow, atol=1e-9)


def test_the_command_line_draws_saved_traces(tmp_path, capsys):
    two_phases().save(tmp_path / "t.json")
    for kind in ("gif", "html"):
        tr.main([kind, str(tmp_path / "t.json"), "-o", str(tmp_path / f"a.{kind}")])
        assert (tmp_path / f"a.{kind}").stat().st_size > 1000
    tr.main(["show", str(tmp_path / "t.json")])
    assert "draft:\n   the cat[-s-]\n\nrepaired:\n   the cat {+sat.+}\n" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"no\.json"):
        tr.main(["show", str(tmp_path / "no.json")])
