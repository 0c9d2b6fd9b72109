"""The methods by name, and what each offers. A third method is one file and one line here.

A method is a module with

    Model           nn.Module(backbone, D, V, bias, stored): its heads over a backbone that gives hidden states [T, D];
                    `init_heads(generator)` initialises what no pretrained checkpoint has
    prepare         (model, examples, settings, progress, rng, shared_rng) -> batch with `.to(device)`: x_t, masks, or a
                    rollout. progress of the training: 0 to 1. rng: this micro-batch's own generator; shared_rng: one in
                    the same state on every process, for what decides how many forward passes are made
    loss            (model, batch) -> (scalar, metrics for the log)
    generate        (model, prompts, settings, seeds, drafts=None, suffixes=None, keep=None, on_step=None) -> list of
                    ragged.Generated: texts between prompt and suffix, from drafts of which the tokens in keep stay
    likelihood      (model, examples, settings, rng) -> float64: an unbiased estimate, in nats, of an upper bound of
                    -log p(response | prompt, suffix), one for each example or their sum; exact where EXACT is true
    passes          (settings): the most forward passes that a batch takes
    start_length    (settings): the tokens that a response starts with

    model_flags     (parser): flags of what a checkpoint remembers; `remember(args, stored)` makes of them, and of what
                    an older checkpoint remembers, a dict for the "nanoedit" block of config.json
    training_flags, sampling_flags
                    (parser)
    TITLE           for people
    HEADS           names of its vocabulary heads; a conversion makes them copies of the pretrained output matrix
    TOKENS          roles of the special tokens that it cannot do without
    PACKED          whether a micro-batch is made of packed rows of --max_length tokens, rather than of examples

and, where there is need of them,

    PUBLISHED       settings for checkpoints of the published system, which remember none
    check_flags     (args): raises ValueError for training flags that do not go together
    check_example   (example, settings): raises ValueError now for what would be raised in the middle of a step
    start           (model, settings, examples, resumed): before the first step, with examples of the training data

`settings` is a namespace: the flags, what the checkpoint remembers, `tokens` (the ids of mask, pad, del and eos; None
where there is none), and for `generate` also `max_positions`.
"""

import argparse
from types import SimpleNamespace

import ar
import editflow
import medlm
from plumbing import cli

METHODS = {"editflow": editflow, "medlm": medlm, "ar": ar}


def get(name: str):
    """The module of a method. Raises ValueError for an unknown name."""
    if name not in METHODS:
        raise ValueError(f"method {name!r} is not known; one of {', '.join(METHODS)}")
    return METHODS[name]


def of(model):
    """The module of a model's method."""
    return get(model.config.nanoedit["method"])


def complete(stored: dict) -> dict:
    """What a checkpoint remembers, with defaults for what it does not say. Raises ValueError for what cannot be."""
    f, method = cli.Flags(""), get(str(stored["method"]))
    method.model_flags(f)
    silent = f.parse_args([])
    for name, default in method.remember(silent, {}).items():
        kinds = {type(default), type(stored.get(name, default))}
        if len(kinds) > 1 and default is not None and kinds != {int, float}:
            raise ValueError(f"field 'nanoedit.{name}' must be of the kind of {default!r}, found {stored[name]!r}")
    return stored | method.remember(silent, stored)


def published(name: str) -> dict:
    """The settings that go with a checkpoint of the published system."""
    return getattr(get(name), "PUBLISHED", {})


def recognise(tensor_names) -> str | None:
    """The method whose heads are among the tensors of a checkpoint that does not say."""
    fitting = (name for name, m in METHODS.items() if all(f"{head}.weight" in tensor_names for head in m.HEADS))
    return next(fitting, None)


def training_flags(f) -> None:
    """The flags of all methods, for train.py. f: a cli.Flags."""
    for method in METHODS.values():
        f.group(method.TITLE)
        method.model_flags(f)
        method.training_flags(f)


def sampling_flags(f, temperature: float | None = None) -> None:
    """How to decode, for sample.py and evaluate.py."""
    f.group("decoding")
    f.number("--temperature", low=0, default=temperature,
             help="of the token distributions; 0 takes the likeliest (default: the checkpoint's, else 1)")
    f.integer("--top_k", low=0, default=0, help="draw from the k most likely tokens (0: all)")
    f.number("--top_p", above=0, high=1, default=1.0, help="draw from the likeliest tokens that hold this probability")
    f.integer("--init_num", "-n", low=1, help="the longest possible answer in tokens (default: 512)")
    for method in METHODS.values():
        f.group(method.TITLE)
        method.sampling_flags(f)


def default_sampling(**changed) -> argparse.Namespace:
    """What `sampling_flags` parses to when nothing is said, apart from what is given here."""
    f = cli.Flags("")
    sampling_flags(f)
    return argparse.Namespace(**vars(f.parse_args([])) | changed)


def training_settings(method, args, model, tokenizer) -> SimpleNamespace:
    return SimpleNamespace(**vars(args) | model.config.nanoedit, tokens=special_tokens(method, tokenizer))


def sampling_settings(method, args, model, tokenizer) -> SimpleNamespace:
    """All that an answer depends on, beside checkpoint, prompt and seed. It can be written as JSON."""
    flags = {name: getattr(args, name) for name in vars(default_sampling())}
    given = {name: value for name, value in flags.items() if value is not None}
    settings = SimpleNamespace(**flags | {"init_num": 512, "temperature": 1.0} | model.config.nanoedit | given)
    settings.tokens, settings.max_positions = special_tokens(method, tokenizer), model.config.max_positions
    return settings


def special_tokens(method, tokenizer) -> dict[str, int | None]:
    """Ids by role. Raises ValueError if the tokenizer lacks one that the method needs."""
    tokens = {role: getattr(tokenizer, f"{role}_id") for role in ("mask", "pad", "del", "eos")}
    if missing := [role for role in method.TOKENS if tokens[role] is None]:
        name = next(name for name, module in METHODS.items() if module is method)
        raise ValueError(f"the tokenizer has no {' and no '.join(missing)} token; `convert.py --to {name}` adds them")
    return tokens


def check_lengths(
    method, prompts: list, settings, drafts: list | None = None, suffixes: list | None = None,
    names: list[str] | None = None,
) -> None:  # fmt: skip
    """Raises ValueError for the first prompt that, with the start of a response and the suffix, would exceed the
    model's positions."""
    for i, prompt in enumerate(prompts):
        length = max(1, len(drafts[i])) if drafts else method.start_length(settings)
        length += len(suffixes[i]) if suffixes else 0
        if len(prompt) + length > settings.max_positions:
            raise ValueError(
                f"{names[i] if names else 'a prompt'} of {len(prompt)} tokens and {length} to start from exceed the "
                f"model's {settings.max_positions} positions; shorten it, or start from fewer (--init_num, "
                "--mask_length)"
            )
