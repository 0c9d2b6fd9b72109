"""The toy task: arithmetic word problems whose answers vary in phrasing, order and length and can still be checked.

    Ann has 3 apples, gets 4:      ->      Start with 3, add 4, get 7. So now Ann has 7 apples. #### 7

8 tokens of prompt (with bos), 6 to 22 of response, 18 right responses to every prompt. A model that decides about
several positions at once mixes the phrasings up; editing can put that right.
"""

import hashlib
import re
from difflib import SequenceMatcher
from itertools import product

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from plumbing.tokenizer import NEW_CONFIG, SPECIAL_TOKENS, Tokenizer

SOURCES = ("toy", "toy-repair", "toy-infill")  # names in a dataset spec; with drafts, with the middle missing
HELD_OUT = 304  # of 1008 prompts
PROMPT = "{name} has {a} apples, {verb} {b}:"
NAMES = ("Ann", "Ben", "Cora", "Dan", "Eva", "Finn", "Gil", "Hana")
STEPS = {
    "gets": (
        "{a} + {b} = {c}.", "{c} = {b} + {a}.", "That makes {c}.", "{a} and {b} more make {c}.",
        "Adding {b} to {a} gives {c}.", "Start with {a}, add {b}, get {c}.",
    ),
    "loses": (
        "{a} - {b} = {c}.", "{c} + {b} = {a}.", "That leaves {c}.", "{a} less {b} makes {c}.",
        "Taking {b} from {a} leaves {c}.", "Start with {a}, take {b}, get {c}.",
    ),
}  # fmt: skip
ENDINGS = ("#### {c}", "The answer is {c}. #### {c}", "So now {name} has {c} apples. #### {c}")


def prompts(split: str) -> list[str]:
    """The prompts to train on ("train") or those held out ("test"), always the same, in an order that means nothing."""
    every = [
        PROMPT.format(name=name, a=a, verb=verb, b=b)
        for name, verb, a, b in product(NAMES, STEPS, range(1, 10), range(1, 10))
        if verb == "gets" or b <= a
    ]
    every.sort(key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    return every[:HELD_OUT] if split == "test" else every[HELD_OUT:]


def _parse(prompt: str) -> tuple[dict, list[str]]:
    """(what to put into a template of this problem, the 18 templates)"""
    match = re.fullmatch(r"\s*(?P<name>\w+) has (?P<a>\d) apples, (?P<verb>gets|loses) (?P<b>\d):\s*", prompt)
    if not match:
        raise ValueError(f"not a prompt of the toy task: {prompt!r}; one is 'Ann has 3 apples, gets 4:'")
    problem, sign = match.groupdict(), 1 if match["verb"] == "gets" else -1
    problem["c"] = int(match["a"]) + sign * int(match["b"])
    return problem, [f"{step} {ending}" for step in STEPS[match["verb"]] for ending in ENDINGS]


def valid_responses(prompt: str) -> set[str]:
    """The 18 right responses."""
    problem, templates = _parse(prompt)
    return {template.format(**problem) for template in templates}


def _whole(prompt: str, response: str, suffix: str) -> tuple[str, str]:
    """The problem, and the whole response, of which some may stand in prompt and suffix."""
    problem, colon, beginning = prompt.partition(":")
    parts = f"{beginning} {response} {suffix}"
    return problem + colon, text(words(parts)) if beginning or suffix else response


def check(prompt: str, response: str, suffix: str = "") -> tuple[bool, bool]:
    """(the number after #### is right, the whole response is one of the right ones). A prompt may hold the beginning of
    the response, behind its colon, and the suffix the end."""
    prompt, response = _whole(prompt, response, suffix)
    answer = re.search(r".*####\s*(\d+)", response, re.DOTALL)
    right = bool(answer) and int(answer[1]) == _parse(prompt)[0]["c"]
    return right, " ".join(response.split()) in valid_responses(prompt)


CHANGES = {"replace": "{0!r} should be {1!r}", "delete": "{0!r} is too much", "insert": "{1!r} is missing"}


def explain(prompt: str, response: str, suffix: str = "") -> str:
    """What is wrong with a response: its differences from the most similar right one, or "" if it is valid."""
    prompt, response = _whole(prompt, response, suffix)
    said, right = response.split(), sorted(map(str.split, valid_responses(prompt)))
    match = max((SequenceMatcher(None, said, words) for words in right), key=SequenceMatcher.ratio)
    changes = [(how, said[a:b], match.b[c:d]) for how, a, b, c, d in match.get_opcodes() if how != "equal"]
    return ", ".join(CHANGES[how].format(" ".join(old), " ".join(new)) for how, old, new in changes)


def records(split: str, n: int | None, seed: int, kind: str = "toy") -> list[dict]:
    """n records (None: 20,000, or as many as are held out): prompts of the split in random order, all different while
    there are enough, random right responses. kind: one of SOURCES. "toy-repair" adds a draft, the response with
    something wrong in it: in one of four every mention of the result is the same wrong number, in the others 1 to 4
    words are replaced, inserted or deleted. "toy-infill" leaves a stretch of the response to be written: what stands
    before it goes to the prompt, what stands behind it, at least a word, is the suffix."""
    rng = np.random.default_rng([seed, split == "test", SOURCES.index(kind)])
    asked, made = prompts(split), []
    for i in range({"train": 20_000, "test": HELD_OUT}[split] if n is None else n):
        if i % len(asked) == 0:
            order = rng.permutation(len(asked))
        prompt = asked[order[i % len(asked)]]
        problem, templates = _parse(prompt)
        template = str(rng.choice(templates))
        draft = _draft(template, problem, rng) if kind == "toy-repair" else None
        record = {"response": template.format(**problem), "draft": draft}
        if kind == "toy-infill":
            whole = words(record["response"])
            begin, end = sorted(rng.choice(len(whole), 2, replace=False))
            prompt = f"{prompt} {text(whole[:begin])}".strip()
            record |= {"response": text(whole[begin:end]), "suffix": text(whole[end:])}
        made.append({"messages": [{"role": "user", "content": prompt}]} | record)
    return made


def _draft(template: str, problem: dict, rng: np.random.Generator) -> str:
    if rng.random() < 0.25:
        return template.format(**problem | {"c": (problem["c"] + int(rng.integers(1, 19))) % 19})
    draft = words(template.format(**problem))
    for _ in range(rng.integers(1, 5)):
        at, kind = int(rng.integers(len(draft))), rng.choice(["replace", "insert", "delete"])
        new = [] if kind == "delete" else [str(rng.choice(VOCABULARY))]
        draft[at : at + (kind != "insert")] = new
    return text(draft)


def words(text: str) -> list[str]:
    """The words as the toy tokenizer sees them: digits and marks are words of their own ("apples," is one)."""
    return re.findall(r"\d|[.:,]|[^\s\d.:,]+,?", text)


def text(words: list[str]) -> str:
    """The words as the toy tokenizer writes them."""
    return re.sub(r" (?=[.:])|(?<=\d) (?=[\d,])", "", " ".join(words))


_TEXT = " ".join([PROMPT, *STEPS["gets"], *STEPS["loses"], *ENDINGS])
VOCABULARY = sorted({*"0123456789", *NAMES, *STEPS, *words(re.sub(r"\{\w+\}", " ", _TEXT))})


def tokenizer() -> Tokenizer:
    """One token per word, digit or mark of the toy task: 50 or so. In the text no space stands before . and :, between
    digits, or before a comma behind a digit; so any row of tokens is written as a text that is read as the same tokens.
    """
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS.values(), "<|unk|>", *VOCABULARY])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    backend.add_special_tokens(list(SPECIAL_TOKENS.values()))
    marks = pre_tokenizers.Split(Regex(r"\d|(?<=\d),|[.:]"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), marks])
    spaces = decoders.WordPiece(prefix="\0", cleanup=False)  # no word begins with its "continued" mark: always a space
    no_space = decoders.Replace(Regex(r" (?=[.:])|(?<=\d) (?=[\d,])"), "")
    backend.decoder = decoders.Sequence([spaces, decoders.Fuse(), no_space])
    return Tokenizer(backend, NEW_CONFIG | {"unk_token": "<|unk|>"})
