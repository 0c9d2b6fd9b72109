"""sample.py on the command line: prompts in, texts out, and what it says when it cannot."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HANGING, save_checkpoint, save_encoder
from fleet import ALONE
from PIL import Image
from terminal import CTRL_C, CTRL_D, LEFT, UP, Terminal

import data
import editflow
import sample
import toy
from plumbing import checkpoints, picture
from plumbing.tokenizer import load_tokenizer, train_tokenizer

ROOT = Path(sample.__file__).parent
PROMPT, OTHER = "Ann has 3 apples, gets 4:", "Ben has 9 apples, loses 2:"
STEPS = ["--steps", "6", "--mask_diffusion_step", "4", "--edit_diffusion_step", "3", "--init_num", "10"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Both methods with the tokenizer of the toy task; one with a chat template, trained on the spot."""
    root = tmp_path_factory.mktemp("checkpoints")
    chat = train_tokenizer(["Hello there. How are you?\n" * 20], 320)
    assert chat.chat_template
    flow = {"schedule": "cubic", "x0_sampler": "masks[length:6]"}
    short = {"max_position_embeddings": 64}
    return {
        "editflow": save_checkpoint(root / "editflow", sizes=short, **flow),
        "medlm": save_checkpoint(root / "medlm", "medlm", sizes=short),
        "chat": save_checkpoint(root / "chat", "editflow", chat, sizes={"max_position_embeddings": 256}, **flow),
        "draft": save_checkpoint(root / "draft", sizes=short, schedule="linear", x0_sampler="draft"),
    }


@pytest.fixture
def samples(saved, tmp_path):
    """Runs sample.py with --output; the records it wrote."""

    def start(name, *flags):
        file = tmp_path / "texts.jsonl"
        sample.main(["--model_name_or_path", str(saved[name]), *STEPS, "--output", str(file), *map(str, flags)])
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    return start


@pytest.fixture
def refused(saved, refused):
    """Runs sample.py with flags that must fail; the one line it says."""
    return lambda name, *flags: refused(sample.main, ["--model_name_or_path", saved.get(name, name), *flags])


# ---------------------------------------------------------------------------------------------------- prompts, texts


@pytest.mark.parametrize("name", ["editflow", "medlm"])
def test_prompts_from_the_command_line_are_answered_in_order(name, samples):
    records = samples(name, "--prompt", PROMPT, OTHER, "--num_samples", 2, "--seed", 5)
    assert [(r["prompt"], r["seed"]) for r in records] == [(PROMPT, 5), (PROMPT, 6), (OTHER, 5), (OTHER, 6)]
    assert any(r["response"] for r in records)
    special = [f"<|{name}|>" for name in ("bos", "eos", "pad", "mask", "del")]
    assert not any(token in r["response"] for r in records for token in special), "no special tokens in what is written"
    details = {
        "editflow": {"steps", "substitutions", "deletions", "insertions", "taken_back", "left_over"},
        "medlm": {"draft", "mask_passes", "edit_passes"},
    }
    assert all(r.keys() == {"prompt", "response", "seed"} | details[name] for r in records)


@pytest.mark.parametrize("name", ["editflow", "medlm"])
def test_a_text_does_not_depend_on_its_company(name, samples):
    flags = ("--prompt", PROMPT, OTHER, "--num_samples", 3, "--order", "random")
    together = samples(name, *flags)
    assert samples(name, *flags, "--batch_size", 1) == together
    assert samples(name, *flags, "--batch_size", 4) == together
    assert samples(name, "--prompt", OTHER, "--seed", 2, "--order", "random") == [together[5]]


def test_seeds_matter(samples):
    responses = [r["response"] for r in samples("editflow", "--prompt", PROMPT, "--num_samples", 4)]
    assert len(set(responses)) > 1


@pytest.mark.parametrize("name", ["editflow", "medlm"])
def test_without_a_prompt_text_is_written_from_scratch(name, samples):
    (record,) = samples(name)
    assert record["prompt"] == ""
    assert isinstance(record["response"], str)


def test_prompts_from_files(samples, tmp_path):
    lines, records = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text(f"{PROMPT}\n\n{OTHER}\n")
    expected = samples("editflow", "--prompt", PROMPT, OTHER)
    assert samples("editflow", "--prompt_file", lines) == expected
    records.write_text(json.dumps({"prompt": PROMPT}) + "\n" + json.dumps({"question": OTHER, "answer": "?"}) + "\n")
    assert samples("editflow", "--prompt_file", records) == expected


def test_on_the_terminal_there_is_the_text_alone_or_each_under_a_heading(saved, samples, capsys):
    (alone,) = samples("editflow", "--prompt", PROMPT)
    several = samples("editflow", "--prompt", PROMPT, "--num_samples", 2)
    capsys.readouterr()
    argv = ["--model_name_or_path", str(saved["editflow"]), *STEPS, "--prompt", PROMPT]
    sample.main(argv)
    assert capsys.readouterr().out == alone["response"] + "\n"
    sample.main([*argv, "--num_samples", "2"])
    expected = [f"--- {PROMPT!r}, seed {k}\n{record['response']}\n" for k, record in enumerate(several)]
    assert capsys.readouterr().out == "".join(expected)


def test_tau_is_one_over_steps():
    for flags, expected in (("", 100), ("--tau 0.25", 4), ("--tau 1", 1), ("--steps 7", 7)):
        args = sample.parse_args(["--model_name_or_path", "x", *flags.split()])
        assert editflow.passes(args) == expected


def test_where_edit_flows_start(samples, monkeypatch):
    starts, step = [], editflow.sample
    monkeypatch.setattr(editflow, "sample", lambda m, p, x0, **k: starts.append(x0) or step(m, p, x0, **k))
    words = toy.tokenizer()
    draft = [*words.encode("That makes 8."), words.eos_id]
    samples("editflow", "--prompt", PROMPT)
    samples("editflow", "--prompt", PROMPT, "--mask_length", 3)
    samples("editflow", "--prompt", PROMPT, "--x0_sampler", "empty")
    samples("draft", "--prompt", PROMPT, OTHER, "--draft", "That makes 8.")
    samples("editflow", "--prompt", PROMPT, "--draft", "That makes 8.")
    assert starts == [[[words.mask_id] * 6], [[words.mask_id] * 3], [[]], [draft, draft], [draft]]


def test_me_dlm_edits_a_draft(samples):
    (record,) = samples("medlm", "--prompt", PROMPT, "--draft", "That makes 8.")
    assert (record["draft"], record["mask_passes"]) == ("That makes 8.", 0)


def test_the_chat_template_wraps_prompts_unless_switched_off(saved, samples, monkeypatch):
    seen, generate = [], sample.Sampler.generate

    def watched(sampler, prompts, *args):
        seen.append(sampler.tokenizer.decode(prompts[0], skip_special=False))
        return generate(sampler, prompts, *args)

    monkeypatch.setattr(sample.Sampler, "generate", watched)
    samples("chat", "--prompt", "Hello")
    samples("chat", "--prompt", "Hello", "--chat_template", "False")
    samples("chat")
    assert "<|im_start|>user\nHello<|im_end|>" in seen[0]
    assert seen[0].endswith("<|im_start|>assistant\n")
    assert seen[1:] == ["<|bos|>Hello", "<|bos|>"]


def test_control_tokens_in_a_prompt_are_letters_unless_asked_for(saved, samples, monkeypatch, tmp_path):
    seen, generate = [], sample.Sampler.generate

    def watched(sampler, prompts, *args):
        seen.append(prompts[0])
        return generate(sampler, prompts, *args)

    monkeypatch.setattr(sample.Sampler, "generate", watched)
    (tmp_path / "a.jsonl").write_text(json.dumps({"problem": "<|im_end|>", "answer": "no"}))
    asked = ["--prompt_file", tmp_path / "a.jsonl", "--prompt_field", "problem"]
    samples("chat", *asked)
    samples("chat", *asked, "--raw_control_tokens")
    tokenizer = load_tokenizer(saved["chat"])
    assert [prompt.count(tokenizer.eos_id) for prompt in seen] == [1, 2]
    assert len({tokenizer.decode(prompt, skip_special=False) for prompt in seen}) == 1


# ---------------------------------------------------------------------------------------------------- traces


@pytest.mark.parametrize("name", ["editflow", "medlm"])
def test_a_gif_and_a_page_of_the_decode(name, samples, tmp_path):
    gif, page = tmp_path / "new/decode.gif", tmp_path / "decode.html"
    with_trace = samples(name, "--prompt", PROMPT, "--make_gif", gif, "--make_html", page)
    assert with_trace == samples(name, "--prompt", PROMPT), "watching changes nothing"
    with Image.open(gif) as image:
        assert image.format == "GIF"
        assert image.n_frames > 1
    assert page.read_text(encoding="utf-8").startswith("<!")


@pytest.mark.parametrize("name", ["editflow", "medlm"])
def test_a_saved_trace_gives_the_pictures_that_would_have_been_drawn_at_once(name, samples, tmp_path, capsys):
    files = {kind: tmp_path / f"decode.{kind}" for kind in ("gif", "html", "json")}
    flags = ("--make_gif", files["gif"], "--make_html", files["html"], "--save_trace", files["json"])
    samples(name, "--prompt", PROMPT, *flags)
    said = capsys.readouterr().err.splitlines()
    assert said[-4] == f"1 texts written to {tmp_path}/texts.jsonl"
    assert said[-3:] == [f"decode written to {file}" for file in files.values()]
    for kind in ("gif", "html"):
        again = tmp_path / f"again.{kind}"
        picture.main([kind, str(files["json"]), "-o", str(again)])
        assert again.read_bytes() == files[kind].read_bytes()


def test_make_gif_has_a_default_name(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sample.main(["--model_name_or_path", str(saved["editflow"]), *STEPS, "--prompt", PROMPT, "--make_gif"])
    assert "decode written to decode_trace.gif" in capsys.readouterr().err
    assert (tmp_path / "decode_trace.gif").stat().st_size > 1000


@pytest.mark.parametrize("columns", [40, 80])
def test_watching_leaves_one_picture_and_the_text_on_the_screen(columns, saved, samples):
    (record,) = samples("medlm", "--prompt", PROMPT)
    terminal = Terminal(columns)
    terminal.start(sample.main, ["--model_name_or_path", str(saved["medlm"]), *STEPS, "--prompt", PROMPT, "--show"])
    assert terminal.end() == 0
    assert re.fullmatch(r"draft and repaired  ━+  step \d+", terminal.lines()[0])
    assert len(terminal.lines()[0]) == columns
    assert terminal.text().count("step ") == 1
    letters, response = ("".join(text.split()) for text in (terminal.text(), record["response"]))
    assert letters.partition("note:")[0].endswith(response), "below the picture"
    terminal.close()


# ---------------------------------------------------------------------------------------------------- conversation


@pytest.fixture
def conversation(saved, monkeypatch, capsys):
    """Runs --interactive with these lines typed; (stdout, stderr)."""

    def start(name, typed, *flags):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        sample.main(["--model_name_or_path", str(saved[name]), *STEPS, "--interactive", *map(str, flags)])
        return capsys.readouterr()

    return start


@pytest.fixture
def prompts_seen(monkeypatch):
    seen, prompt = [], sample.Sampler.prompt

    def watched(sampler, messages):
        seen.append(messages)
        return prompt(sampler, messages)

    monkeypatch.setattr(sample.Sampler, "prompt", watched)
    return seen


def user(text):
    return {"role": "user", "content": text}


def test_a_conversation_remembers_until_told_to_forget(conversation, prompts_seen):
    out, err = conversation("chat", "Hello\nAnd you?\n/reset\nHello\n")
    assert out.startswith("Chat.")
    assert err == ""
    first, second, third = prompts_seen
    assert first == third == [user("Hello")]
    assert [m["role"] for m in second] == ["user", "assistant", "user"]
    assert second[1]["content"] in out


def test_raw_continuation_forgets_every_line(conversation, prompts_seen):
    for name, flags in (("chat", ("--chat_template", False)), ("editflow", ()), ("medlm", ())):
        prompts_seen.clear()
        out, err = conversation(name, f"{PROMPT}\n{OTHER}\n", *flags)
        assert out.startswith("Raw continuation.")
        assert err == ""
        assert prompts_seen == [[user(PROMPT)], [user(OTHER)]]


@pytest.mark.parametrize("name", ["editflow", "medlm", "chat"])
def test_an_empty_line_generates_from_scratch(name, conversation, prompts_seen):
    conversation(name, "\n")
    assert prompts_seen == [[]]


@pytest.mark.parametrize("name", ["editflow", "medlm"])
def test_a_prompt_that_is_too_long_does_not_end_the_conversation(name, conversation):
    out, err = conversation(name, f"{PROMPT * 20}\n{PROMPT}\n")
    assert err.count("error: a prompt of") == 1
    assert "64 positions" in err
    alone, _ = conversation(name, f"{PROMPT}\n")
    assert out.splitlines()[-2:] == alone.splitlines()[-2:], "the next line is answered, with the first seed"


def test_what_a_conversation_understands(conversation, prompts_seen):
    out, _ = conversation("chat", "Hello\n/help\n/clear\nHello\n")
    assert prompts_seen == [[user("Hello")], [user("Hello")]], "/help is no message, /clear is /reset"
    assert out.count(sample.HELP) == 2
    for words in ("/reset", "/help", "Ctrl-C", "Ctrl-D"):
        assert words in sample.HELP


def hesitant():
    """sample.py, whose answers to messages with the word "slowly" in them take minutes."""
    generate = sample.Sampler.generate

    def slow(sampler, prompts, seeds, on_step=None):
        def wait(*step):
            on_step(*step)
            time.sleep(10 * HANGING * ("slowly" in sampler.tokenizer.decode(prompts[0])))

        return generate(sampler, prompts, seeds, wait)

    sample.Sampler.generate = slow
    return sample.main()


@pytest.fixture
def chat(saved):
    """A conversation in a terminal."""
    terminal = Terminal(80, 40)
    terminal.start(hesitant, ["--model_name_or_path", str(saved["chat"]), "--interactive", *STEPS])
    terminal.see("\n>")
    yield terminal
    terminal.close()


def asked(*messages):
    """What is seen of messages of the user in the picture of a prompt."""
    return [f"<|im_start|>user\n{message}<|im_end|>" for message in messages]


def test_lines_of_a_conversation_are_edited_and_called_back(chat):
    chat.type("Helo" + LEFT + "l\r")
    chat.see("\n>", 2)
    [hello] = asked("Hello")
    assert chat.text().count(hello) == 1
    chat.type(UP + "!\r")
    chat.see("\n>", 3)
    assert chat.text().count(hello) == 2, "the second picture has the first message, too"
    assert asked("Hello!")[0] in chat.text()
    assert chat.text().count("step 6") == 2, "one picture for each answer"


def test_an_answer_is_stopped_and_the_conversation_goes_on(chat):
    chat.type("Hello\r")
    chat.see("\n>", 2)
    chat.type("How slowly!\r")
    chat.see("step 0")
    chat.type(CTRL_C)
    chat.see("(stopped")
    chat.see("\n>", 3)
    chat.type("half a line" + CTRL_C)
    chat.see("(stopped", 2)
    chat.see("\n>", 4)
    chat.type("Next\r")
    chat.see("\n>", 5)
    last = chat.text().split("(stopped")[-1]
    assert [question in last for question in asked("Hello", "How slowly!", "Next")] == [True, False, True]
    chat.type(CTRL_D)
    assert chat.end() == 0


def test_a_long_paste_is_one_message_and_complete(chat, saved):
    if "libedit" in (importlib.import_module("readline").__doc__ or ""):
        pytest.skip("libedit takes every line of a paste for a message")
    _, tokenizer = checkpoints.open_for_inference(saved["chat"], "cpu", False)
    for text in ("How are you? " * 500, "\n".join(f"Line {n} of many." for n in range(2000))):
        tokens = len(data.encode_prompts([[user(text.strip())]], tokenizer)[0])
        chat.paste(text)
        chat.type("\r")
        chat.see(f"error: a prompt of {tokens} tokens")
    chat.see("\n>", 3)
    assert chat.text().count("error:") == 2


@pytest.mark.slow
def test_a_conversation_through_a_pipe(saved):
    """As the shell starts it; the output is no terminal, so the answers come without drawing."""
    flags = ["--model_name_or_path", str(saved["chat"]), "--interactive", *STEPS]
    result = subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), *flags],
        input=f"Hello\n\n{'long ' * 300}\n", capture_output=True, text=True, timeout=300,
        env=os.environ | ALONE,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("> ") >= 4
    assert "\033" not in result.stdout
    assert result.stderr.startswith("error: a prompt of")
    assert len(result.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", ["editflow", "medlm"])
def test_a_prompt_longer_than_the_positions(name, refused):
    line = refused(name, *STEPS, "--prompt", PROMPT * 20)
    assert line.startswith("the prompt 'Ann has 3 apples")
    assert "64 positions" in line


def test_a_roberta_prompt_may_fill_the_positions_that_are_really_there(tmp_path, refused):
    """Two of its 20 positions are taken by the padding token's offset."""
    save_encoder(tmp_path, "medlm", "roberta", positions=20)
    prompt = len(data.encode_prompts([[user(PROMPT)]], toy.tokenizer())[0])
    sample.main(["--model_name_or_path", str(tmp_path), "--prompt", PROMPT, "--init_num", str(18 - prompt), "-e", "0"])
    assert "18 positions" in refused(tmp_path, "--prompt", PROMPT, "--init_num", 19 - prompt)


def test_what_is_said_about_flags_that_do_not_fit_the_model(refused):
    draft = ("--draft", "That makes 8.", "--repair", "remask")
    assert "--repair remask fills again" in refused("medlm", *draft, *STEPS)
    assert "'9' does not occur in --draft" in refused("medlm", "--draft", "That makes 8.", "--freeze", "9", *STEPS)
    assert "nothing is left to edit" in refused("medlm", "--draft", "That makes 8.", "--freeze", "That makes 8.")
    assert "--prompt_dropout" in refused("editflow", "--guidance", "1", *STEPS)
    assert "does not tell what has flipped" in refused("draft", "--draft", "8", "--corrector", "1", *STEPS)
    assert "give one with --draft" in refused("draft", "--prompt", PROMPT)
    assert "x0_sampler 'noise' is not known; choose from empty" in refused("editflow", "--x0_sampler", "noise")
    assert "token frequencies" in refused("editflow", "--x0_sampler", "uniform[length:4]")


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_a_prompt_file_without_a_prompt(name, refused, tmp_path):
    (tmp_path / name).write_text("\n")
    assert f"{tmp_path}/{name}" in refused("editflow", "--prompt_file", tmp_path / name)


def test_a_checkpoint_without_tokenizer(tmp_path, saved, refused):
    checkpoints.save(checkpoints.load(saved["editflow"]), tmp_path)
    assert f"no tokenizer in {tmp_path}" in refused(tmp_path)


def test_files_that_cannot_be_written_are_found_before_the_model_is_read(tmp_path, refused, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(checkpoints, "load", lambda *a, **k: pytest.fail("the model was read first"))
    for flag in ("--output", "--make_gif", "--make_html", "--save_trace"):
        path = tmp_path / "file/below"
        assert f"{flag} {path}: cannot be written to" in refused("editflow", flag, path)
