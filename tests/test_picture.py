"""picture.py: frames are what the steps did, three pictures show them, and text cannot do anything but be seen."""

import io
import json
import re
import subprocess
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor, ImageDraw
from terminal import Terminal

from plumbing import picture
from plumbing.picture import DELETED, INSERTED, SUBSTITUTED, Cell, Trace, frames, outcome, show, write_gif, write_html
from ragged import DEL, GAP, KEEP, SUB, Ragged, apply_edits

WORDS = ["<bos>", "<mask>", "<pad>", " the", " cat", "s", ".", "\n", " sat", "  ", "é", " 中文字"]


def pieces(ids):
    return [WORDS[i] for i in ids]


def numbers(ids):
    """Pieces from which the tokens can be read again."""
    return [f" {i}" for i in ids]


def tokens(frame):
    return [int(cell.text) for cell in frame.cells]


class Tty(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def tensors(edits, n):
    """{position: (op, sub, ins)} to the three tensors of `apply_edits`."""
    rows = [edits.get(i, (KEEP, GAP, GAP)) for i in range(n)]
    op, sub, ins = (torch.tensor([row[k] for row in rows], dtype=torch.int64) for k in range(3))
    return op.to(torch.uint8), sub, ins


def record(start, steps, prompt_len=1, labels=None, pieces=pieces, **options):
    """A trace of one sequence under the given edits, and the states that it really went through."""
    trace, ids, states = Trace(prompt_len, pieces, mask_id=1, pad_id=2, **options), start, [start]
    for k, edits in enumerate(steps):
        x = Ragged.pack([ids])
        arguments = tensors(edits, len(ids))
        trace.on_step(k / len(steps), x, *arguments, labels[k] if labels else "")
        ids = apply_edits(x, *arguments).unpack()[0]
        states.append(ids)
    return trace.finish(ids), states


def one_of_each(**options):
    """The mask becomes " sat", " the" is inserted and then deleted."""
    edits = [{0: (KEEP, GAP, 3)}, {2: (SUB, 8, GAP)}, {1: (DEL, GAP, GAP)}]
    return record([0, 1], edits, **options)[0]


def two_phases():
    """Three masks become "the cats", a pad is dropped, then "cats" is repaired to "cat sat." in two edit passes."""
    trace = Trace(1, pieces, mask_id=1, pad_id=2)
    trace.on_step(0.0, Ragged.pack([[0, 1, 1, 1, 1]]), *tensors({1: (SUB, 3, GAP), 2: (SUB, 4, GAP)}, 5), "mask")
    trace.on_step(0.25, Ragged.pack([[0, 3, 4, 1, 1]]), *tensors({3: (SUB, 5, GAP), 4: (SUB, 2, GAP)}, 5), "mask")
    trace.on_step(0.5, Ragged.pack([[0, 3, 4, 5]]), *tensors({2: (KEEP, GAP, 8), 3: (SUB, 6, GAP)}, 4), "edit")
    trace.on_step(0.75, Ragged.pack([[0, 3, 4, 8, 6]]), *tensors({}, 5), "edit")
    return trace.finish([0, 3, 4, 8, 6])


# ---- recording and frames --------------------------------------------------------------------------------------------


@st.composite
def batches(draw):
    """A batch of sequences and, per step, the edit drawn for position i of any sequence (used modulo its length)."""
    token = st.integers(3, len(WORDS) - 1)
    sequences = draw(st.lists(st.lists(token, min_size=1, max_size=6), min_size=1, max_size=3))
    edit = st.tuples(st.sampled_from([KEEP, KEEP, SUB, DEL]), token, st.one_of(st.just(GAP), st.just(GAP), token))
    return sequences, draw(st.lists(st.lists(edit, min_size=7, max_size=7), max_size=6))


@given(batches())
@settings(max_examples=150, deadline=None)
def test_frames_are_the_true_states_and_mark_exactly_what_the_steps_did(batch):
    sequences, steps = batch
    trace = Trace(0, numbers)
    x, truth, columns = Ragged.pack(sequences), [], []
    for k, drawn in enumerate(steps):
        rows = [drawn[p % 7] for p in x.positions.tolist()]
        op, sub, ins = (torch.tensor([row[c] for row in rows], dtype=torch.int64) for c in range(3))
        trace.on_step(k / len(steps), x, op.to(torch.uint8), sub, ins, "")
        truth.append(x.unpack()[0])
        columns.append([c[: len(truth[-1])].tolist() for c in (op, sub, ins)])
        x = apply_edits(x, op.to(torch.uint8), sub, ins)
    truth.append(x.unpack()[0])
    shown = frames(trace.finish(truth[-1]))
    assert [tokens(frame) for frame in shown] == truth
    assert [frame.step for frame in shown] == list(range(len(steps) + 1))
    total = (0, 0, 0)
    for frame, (op, sub, ins), after in zip(shown, columns, shown[1:]):
        assert [DELETED in cell.mark for cell in frame.cells] == [o == DEL for o in op]
        marks = []
        for token, o, s, i in zip(tokens(frame), op, sub, ins):
            marks += [] if o == DEL else [SUBSTITUTED if o == SUB and s != token else ""]
            marks += [] if i == GAP else [INSERTED]
        assert [cell.mark.strip(DELETED) for cell in after.cells] == marks
        counts = (marks.count(INSERTED), marks.count(SUBSTITUTED), op.count(DEL))
        total = tuple(map(sum, zip(total, counts)))
        assert after.total == total


@given(batches(), st.integers(2, 5))
@settings(max_examples=60, deadline=None)
def test_a_selection_of_frames_still_leads_from_each_to_the_next(batch, limit):
    sequences, steps = batch
    trace, states = record(sequences[0], [dict(enumerate(drawn)) for drawn in steps], prompt_len=0, pieces=numbers)
    shown = frames(trace, limit)
    assert len(shown) <= limit
    assert (shown[0].step, shown[-1].step) == (0, len(steps))
    assert shown[-1].total == frames(trace)[-1].total
    for before, after in pairwise(shown):
        assert tokens(after) == states[after.step]
        stayed = sum(DELETED not in cell.mark for cell in before.cells)
        assert stayed == sum(INSERTED not in cell.mark for cell in after.cells)
        kept = [cell.text for cell in after.cells if not cell.mark.strip(DELETED)]
        assert set(kept) <= {cell.text for cell in before.cells}


def test_steps_that_change_nothing_are_merged_when_frames_are_limited():
    trace, _ = record([0, 1, 1], [{}, {}, {1: (SUB, 3, GAP)}, {}, {}, {2: (DEL, GAP, GAP)}, {}])
    assert [frame.step for frame in frames(trace, 100)] == [0, 3, 6, 7]
    assert [cell.mark for cell in frames(trace, 100)[1].cells] == ["", SUBSTITUTED, DELETED]
    assert len(frames(trace)) == 8


def test_phases_are_named_and_what_happens_between_them_is_carried_over():
    shown = frames(two_phases())
    assert [frame.phase for frame in shown] == ["t = 0.00", "mask pass 1", "mask pass 2", "edit pass 1", "edit pass 2"]
    assert [cell.text for cell in shown[2].cells] == ["<bos>", " the", " cat", "s"]
    assert [cell.mark for cell in shown[1].cells] == ["", "~", "~", "", DELETED]  # becomes a pad, is dropped
    assert [cell.kind for cell in shown[1].cells] == ["prompt", "text", "text", "mask", "mask"]
    assert shown[-1].total == (1, 5, 0)


def test_the_way_back_of_a_corrector_is_at_a_time():
    trace, _ = record([0, 1], [{1: (SUB, 3, GAP)}, {1: (SUB, 1, GAP)}], labels=["", "back"])
    assert [frame.phase for frame in frames(trace)] == ["t = 0.00", "t = 0.50", "t = 1.00"]
    assert frames(trace)[-1].cells[1] == Cell(" ░░", "mask", SUBSTITUTED)


def test_draft_and_repaired_text_are_compared():
    end = outcome(two_phases())
    assert end.draft == [Cell(" the"), Cell(" cat"), Cell("s", mark=DELETED)]
    assert end.cells == [Cell(" the"), Cell(" cat"), Cell(" sat", mark=INSERTED), Cell(".", mark=INSERTED)]
    end = outcome(record([0, 1], [{1: (SUB, 4, 5)}])[0])
    assert (end.draft, end.cells) == (None, [Cell("<bos>", "prompt"), Cell(" cat"), Cell("s")])


def test_the_sampler_may_say_what_the_text_ends_as():
    edits = {0: (KEEP, GAP, 4), 1: (SUB, 5, 6), 2: (DEL, GAP, 7)}
    x = Ragged.pack([[0, 3, 8, 9]])
    assert apply_edits(x, *tensors(edits, 4)).unpack()[0] == [0, 4, 5, 6, 7, 9]
    trace = Trace(1, pieces)
    trace.on_step(0.0, x, *tensors(edits, 4), "")
    assert [cell.mark for cell in frames(trace.finish([0, 4, 9, 3]))[-1].cells] == ["", INSERTED, "", INSERTED]


def test_edit_passes_of_other_sequences_are_left_out():
    trace, _ = record([0, 1], [{1: (SUB, 3, GAP)}, {1: (SUB, 4, GAP)}, {}, {}, {}], labels=["mask", *["edit"] * 4])
    assert [frame.phase for frame in frames(trace)] == ["t = 0.00", "mask pass 1", "edit pass 1", "edit pass 2"]


def test_a_saved_trace_comes_back_with_the_same_frames(tmp_path):
    trace = two_phases()
    trace.save(tmp_path / "t.json")
    again = Trace.load(tmp_path / "t.json")
    assert frames(again) == frames(trace)
    assert outcome(again) == outcome(trace)


def test_a_trace_saved_by_the_first_version_opens(tmp_path):
    step = {"t": 0.0, "label": "", "ids": [0, 1], "text": ["<bos>", "<mask>"], "edits": [[0, 0, -1, 3], [1, 1, 8, -1]]}
    old = {"format": "nanoedit trace", "prompt_len": 1, "mask_id": 1, "pad_id": 2, "steps": [step]}
    old["final"] = [[0, 3, 8], ["<bos>", " the", " sat"]]
    (tmp_path / "t.json").write_text(json.dumps(old))
    last = frames(Trace.load(tmp_path / "t.json"))[-1]
    assert last.cells == [Cell("<bos>", "prompt"), Cell(" the", mark=INSERTED), Cell(" sat", mark=SUBSTITUTED)]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"prompt_len": 1, "mask_id": 1, "pad_id": 2, "steps": 4}'])
def test_a_file_that_is_no_trace_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json: not a trace"):
        Trace.load(tmp_path / "x.json")


# ---- lines and terminal ----------------------------------------------------------------------------------------------


def test_wide_letters_take_two_columns_and_accents_none():
    assert [picture.columns(text) for text in ("ab ", "中文", "e\u0301")] == [3, 4, 1]


@given(st.lists(st.text("ab \nWé中\u0301", max_size=9), max_size=8), st.integers(4, 12))
@settings(max_examples=200, deadline=None)
def test_wrapped_lines_fit_and_lose_nothing_but_spaces_at_breaks(texts, width):
    lines = picture.wrap([Cell(text) for text in texts], width)
    assert all(picture.columns("".join(cell.text for cell in line)) <= width for line in lines)
    shown = "".join(cell.text for line in lines for cell in line)
    assert re.sub(r"[ \n]", "", shown) == re.sub(r"[ \n]", "", "".join(texts))
    assert len(lines) >= "".join(texts).count("\n") + 1


def test_the_page_in_view_has_the_first_change():
    def page(*changed):
        lines = [[Cell(str(n), mark=INSERTED if n in changed else "")] for n in range(20)]
        return [int(line[0].text) for line in picture.view(lines, 6)]

    assert page() == page(0, 19) == page(5) == [0, 1, 2, 3, 4, 5]
    assert page(6) == page(11, 12) == [6, 7, 8, 9, 10, 11]
    assert page(19) == [18, 19]


def test_without_a_terminal_there_are_no_escape_codes_and_every_mark_is_in_ascii():
    steps = [{0: (KEEP, GAP, 3)}, {0: (KEEP, GAP, 4), 2: (SUB, 8, GAP)}, {1: (DEL, GAP, GAP)}]
    file = io.StringIO()
    show(record([0, 1], steps)[0], file)
    text = file.getvalue()
    assert not re.search(r"[\x1b\r]", text)
    for marked in ("{+the+}", "{~sat~}", "[-cat-]"):
        assert marked in text
    assert text.count("step ") == 5
    assert text.endswith("\n\n<bos> the sat\n\n")  # in the end without marks


def test_an_ascii_file_gets_ascii():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    show(record([0, 1, 10], [{2: (KEEP, GAP, 7)}])[0], file)
    assert b"\n<bos> __?\n" in raw.getvalue()
    assert b"\n<bos> __?{+$+}\n" in raw.getvalue()
    assert b"t = 1.00  =====" in raw.getvalue()


def test_a_terminal_is_redrawn_in_place_and_no_color_keeps_the_marks(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    colored, plain = Tty(), Tty()
    show(one_of_each(), colored, delay=0)
    monkeypatch.setenv("NO_COLOR", "1")
    show(one_of_each(), plain, delay=0)
    assert colored.getvalue().count("\x1b[J") == 4
    assert "\x1b[1;4;32mthe" in colored.getvalue()
    for marked in ("\x1b[1;4mthe", "\x1b[9mthe", "\x1b[7msat"):
        assert marked in plain.getvalue()
    assert not re.search(r"\x1b\[[\d;]*3\dm", plain.getvalue())


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 12), (20, 10), (3, 6), (200, 3)])
def test_a_frame_takes_as_many_rows_as_are_redrawn_whatever_the_size_of_the_terminal(monkeypatch, width, height):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", str(height))
    steps = [{k: (SUB, 4, 11 if k % 3 else 7)} for k in range(1, 60)]
    file = Tty()
    show(record([0] + [1] * 100, steps)[0], file, delay=0)
    drawn = re.split(r"\x1b\[(\d+)F\x1b\[J", file.getvalue())
    assert len(drawn) == 2 * len(steps) + 3
    for picture_, up in zip(drawn[::2], drawn[1::2]):
        lines = re.sub(r"\x1b\[\??[\d;]*[mhl]", "", picture_).split("\n")[:-1]
        assert len(lines) == int(up) < height
        assert all(picture.columns(line) <= width for line in lines)


LONG = [" the", " cat", "s", " 中文字", " über", " e\u0301te\u0301", "。", " 한국어", " 😀", " seventeen", "!", "\n"]


@pytest.fixture
def terminal(monkeypatch):
    """Opens a terminal of so many columns and rows, into which a live trace can be drawn."""
    opened = []

    def start(columns, rows=24):
        opened.append(Terminal(columns, rows))
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setattr(sys, "__stdout__", opened[-1].file)  # whose window is asked for its size
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


@pytest.mark.parametrize("rows", [24, 7])
@pytest.mark.parametrize("columns", [40, 60, 80, 100, 200])
def test_after_every_step_the_screen_has_the_command_and_one_frame(terminal, columns, rows):
    screen, rng = terminal(columns, rows), np.random.default_rng(columns)
    pieces = lambda ids: [LONG[i] for i in ids]  # noqa: E731
    trace, x, above = Trace(2, pieces, live=screen.file), Ragged.pack([[0, 1]]), [f"line {n}" for n in range(30)]
    screen.print("\n".join(above) + "\n")
    for k in range(24):
        drawn = zip(rng.choice([KEEP, KEEP, SUB, DEL], len(x.ids)), rng.integers(2, len(LONG), (len(x.ids), 2)))
        made = {i: (op, sub, ins if ins % 3 == 0 else GAP) for i, (op, (sub, ins)) in enumerate(drawn) if i > 1}
        edits = tensors(made | {1: (KEEP, GAP, 2 + k % 10)}, len(x.ids))
        trace.on_step(k / 24, x, *edits)
        screen.sync()
        frame = picture.layout(picture._frame(trace, k, max(0, k - 1)), min(columns, 100), rows - 2)
        lines = ["".join(cell.text for cell in line).rstrip() for line in frame]
        *before, headline = screen.lines()[: len(above) + 1]
        assert before == above
        assert re.fullmatch(rf"t = 0\.\d\d  ━*─*  step {k}", headline)
        assert len(headline) == min(columns, 100)
        assert screen.text() == unicodedata.normalize("NFC", "\n".join(above + lines).rstrip())
        x = apply_edits(x, *edits)
    trace.finish(x.unpack()[0])
    screen.sync()
    assert screen.lines()[: len(above)] == above
    assert screen.text().count("step ") == 1


def test_letters_that_are_wider_than_thought_are_cut_off_and_do_not_wrap(terminal):
    """Flags, and the hexagrams of the I Ching, which became wide in Unicode 16."""
    screen, text = terminal(40), "🇩🇪" * 30 + "䷀" * 30
    trace = Trace(1, lambda ids: [text] * len(ids), live=screen.file)
    for k in range(30):
        trace.on_step(k / 30, Ragged.pack([[0, 1]]), *tensors({}, 2))
        screen.sync()
    assert len(screen.lines()) == 4 + 5  # twice 90 letters in lines of 40
    assert screen.text().count("step ") == 1


def test_what_is_seen_at_40_columns(terminal):
    screen = terminal(40)
    screen.print("$ python sample.py --show\n")
    record([0, 1, 4], [{}, {1: (SUB, 11, 3), 2: (DEL, GAP, 11)}, {}], live=screen.file)
    screen.sync()
    assert screen.lines() == [
        "$ python sample.py --show",
        "t = 1.00  ━━━━━━━━━━━━━━━━━━━━━━  step 3",
        "inserted 2   substituted 1   to be",
        "deleted 1",
        "",
        "<bos> 中文字 the 中文字",
    ]


def test_live_draws_each_step_and_the_end(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = Tty()
    trace = one_of_each(live=file)
    drawn = file.getvalue().split("\x1b[J")
    assert [re.search(r"step (\S+)\x1b", d)[1] for d in drawn] == ["0", "1", "2", "3"]
    assert "\x1b[9;31mthe" not in drawn[1]
    assert "\x1b[9;31mthe" in drawn[2]  # about to be deleted
    assert re.search("deleted.* 0", drawn[2])
    assert re.search("deleted.* 1", drawn[3])
    monkeypatch.setenv("TERM", "dumb")
    assert trace.screen
    assert Trace(1, pieces, live=file).screen is None


def test_text_of_a_model_cannot_steer_the_terminal():
    assert picture.printable("a\x1b[2Jb\x07\x9b\u202e\ud800") == "a␛[2Jb␇���"
    assert picture.printable("a\r\nb\u2028c\t\x00") == "a\nb\nc    ␀"


# ---- GIF and HTML ----------------------------------------------------------------------------------------------------


def gif_frames(path):
    """Size, and (duration in ms, grey levels) of every frame."""
    with Image.open(path) as image:
        shown = []
        for n in range(image.n_frames):
            image.seek(n)
            shown.append((image.info["duration"], np.asarray(image.convert("L"))))
        return image.size, shown


def test_a_gif_has_a_frame_per_change_and_holds_the_last_one(tmp_path):
    steps = [{}, {0: (KEEP, GAP, 3)}, {}, {}, {1: (DEL, GAP, GAP)}, {1: (SUB, 4, GAP)}]
    write_gif(record([0, 1], steps)[0], tmp_path / "a.gif")
    size, shown = gif_frames(tmp_path / "a.gif")
    assert len(shown) == 5  # the start, three changes, and the end without marks
    assert shown[-1][0] == 3000
    assert all(grey.shape == size[::-1] for _, grey in shown)
    with Image.open(tmp_path / "a.gif") as image:  # paper and the three marks, as in the legend, in their own colours
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
    assert {ImageColor.getrgb(c) for c in sum(picture.COLORS.values(), ())} <= colors
    write_gif(Trace(1, pieces).finish([0, 3]), tmp_path / "none.gif")
    assert len(gif_frames(tmp_path / "none.gif")[1]) == 1
    write_gif(two_phases(), tmp_path / "b.gif")
    assert len(gif_frames(tmp_path / "b.gif")[1]) == 6  # five states, then draft and repaired text


def test_a_long_decode_stays_a_short_and_small_gif(tmp_path):
    """130 tokens over 100 steps, in random order."""
    rng = np.random.default_rng(0)
    words = rng.choice([3, 4, 5, 6, 7, 8], size=(100, 2), p=[0.2, 0.2, 0.2, 0.1, 0.1, 0.2]).tolist()
    steps = [{int(rng.integers(1, 60)): (SUB, a, b if rng.random() < 0.66 else GAP)} for a, b in words]
    trace, _ = record([0] + [1] * 64, steps)
    write_gif(trace, tmp_path / "a.gif", max_frames=60)
    size, shown = gif_frames(tmp_path / "a.gif")
    assert len(shown) == 60
    assert size[1] < 1300  # 18 lines of text
    assert (tmp_path / "a.gif").stat().st_size < 1_000_000


def test_marks_can_be_told_apart_in_grey():
    """By where the ink is: lines of dark pixels under, through, or broken under the word."""
    profiles, u = {}, picture.U
    for mark in ("", INSERTED, SUBSTITUTED, DELETED):
        image = Image.new("L", (400, picture.ROW), 255)
        draw = ImageDraw.Draw(image)
        draw.font = picture.font()
        end = picture.draw_cell(draw, 10, 0, Cell("word", mark=mark))
        dark = np.asarray(image)[:, 14 : int(end) - 4] < 160
        profiles[mark] = dark.mean(axis=1)  # share of dark pixels per row
    under, through = slice(22 * u, 24 * u), slice(11 * u, 16 * u)
    assert profiles[""].max() < 0.7
    assert profiles[INSERTED][under].min() == 1
    assert 0.3 < profiles[SUBSTITUTED][under].mean() < 0.9
    assert profiles[DELETED][through].max() == 1
    assert profiles[DELETED][under].max() == profiles[""][under].max() == 0


@pytest.mark.parametrize("fonts", [picture.FONTS, ()])
def test_a_gif_is_drawn_with_any_font_and_any_text(tmp_path, monkeypatch, fonts):
    monkeypatch.setattr(picture, "FONTS", fonts)
    texts = ["<bos>", "中文 😀", "", "\n\n", "x" * 300, "\x1b[31m", "\ud800", " \t ", "\u200d"]
    trace = Trace(1, lambda ids: [texts[i] for i in ids], title="中 “title”")
    trace.on_step(0.0, Ragged.pack([[0]]), *tensors({0: (KEEP, GAP, 1)}, 1))
    trace.on_step(0.5, Ragged.pack([[0, 1]]), *tensors({1: (DEL, GAP, 4)}, 2))
    trace.finish([0, 1, 2, 3, 4, 5, 6, 7, 3, 8])
    write_gif(trace, tmp_path / "a.gif")
    assert len(gif_frames(tmp_path / "a.gif")[1]) == 4


def test_html_is_one_page_in_which_text_stays_text(tmp_path):
    hostile = ["</script><script>alert(1)</script>", "<!--", '"', "'", "\\", "&amp;", "{{data}}", "\ud800", "\u2028"]
    trace = Trace(0, lambda ids: [hostile[i] for i in ids], title='<b>"{{data}}"')
    trace.on_step(0.0, Ragged.pack([[0, 1, 2, 3, 4]]), *tensors({2: (DEL, GAP, 5)}, 5))
    trace.finish([0, 1, 5, 3, 4, 6, 7, 8])
    write_html(trace, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.count("</script>") == page.count("<script") == 2
    assert "alert(1)</script" not in page
    assert "<b>" not in page
    assert not re.search(r"https?://|src=|@import|url\(", page)
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1])
    shown = [*frames(trace), outcome(trace)]
    assert [[Cell(*cell) for cell in frame["cells"]] for frame in data] == [frame.cells for frame in shown]
    assert data[0]["cells"][2] == ['"', "text", DELETED]
    assert data[1]["total"] == [1, 0, 1]


def test_the_command_line_draws_saved_traces(tmp_path, capsys, monkeypatch):
    """With the headline that was recorded, unless told otherwise, into a file that is named."""
    trace = two_phases()
    trace.title = "A title"
    trace.save(tmp_path / "t.json")
    monkeypatch.chdir(tmp_path)
    for kind, write in (("gif", write_gif), ("html", write_html)):
        picture.main([kind, "t.json"])
        assert capsys.readouterr().err == f"decode written to decode_trace.{kind}\n"
        write(trace, "expected")
        picture.main([kind, "t.json", "-o", "other", "--title", "Another"])
        assert capsys.readouterr().err == "decode written to other\n"
        expected, drawn, other = (Path(name).read_bytes() for name in ("expected", f"decode_trace.{kind}", "other"))
        assert drawn == expected != other
    picture.main(["show", str(tmp_path / "t.json")])
    assert "draft:\n the cat[-s-]\n\nrepaired:\n the cat {+sat.+}\n" in capsys.readouterr().out
    command = [sys.executable, "-m", "plumbing.picture", "show", "no.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no.json" in done.stderr


# ---- charts ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def plot():
    import recipes.plot

    return recipes.plot


def write_metrics(folder: Path, values, tail=""):
    folder.mkdir()
    lines = [json.dumps({"step": 10 * k, "loss": v, "loss_sub": v / 2, "lr": 1e-3}) for k, v in enumerate(values)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 30, "eval_loss": 1.5}', tail]))
    return folder


def test_metrics_are_read_up_to_a_half_written_line(tmp_path, plot):
    run = write_metrics(tmp_path / "run", [3.0, 2.0], '{"step": 40, "lo')
    assert plot.read_losses(run) == {
        "loss": [(0, 3.0), (10, 2.0)], "loss_sub": [(0, 1.5), (10, 1.0)], "eval_loss": [(30, 1.5)],
    }  # fmt: skip
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: no loss"):
        plot.read_losses(run)
    command = [sys.executable, "recipes/plot.py", str(tmp_path / "none"), "-o", str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "none" in done.stderr


def test_charts_are_drawn_in_a_size_that_can_be_read(tmp_path, plot):
    runs = [write_metrics(tmp_path / name, np.linspace(high, 1, 200)) for name, high in (("a", 5), ("b", 9))]
    plot.plot_losses(runs[:1], tmp_path / "a.png")
    plot.plot_losses(runs, tmp_path / "ab.png")
    curves = {"one": ([1, 50, 90], [0, 2, 3]), "two": ([2, 60, 80], [1, 1, 1])}
    plot.plot_means(curves, (1, 2, 8), tmp_path / "means.png", title="t", xlabel="x", ylabel="y")
    for name in ("a", "ab", "means"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == (1520, 920)
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20
