"""A third method in one file: every token of a text is drawn by itself, from the frequencies of tokens in general.

It offers what plumbing/methods.py asks for and no more. tests/test_house.py registers it and runs the scripts with it.
"""

import torch
from torch import nn

from ragged import Generated, Ragged, weighted_nll

TITLE, HEADS, TOKENS, PACKED = "Unigrams", ("token_head",), ("eos",), False


class Model(nn.Module):
    def __init__(self, backbone, D: int, V: int, bias: bool = False, stored: dict | None = None):
        super().__init__()
        self.model, self.token_head = backbone, nn.Linear(D, V, bias=bias)

    def forward(self, x: Ragged):
        return self.model(x)

    def init_heads(self, generator): ...


def training_flags(f): ...
def sampling_flags(f): ...
def model_flags(f): f.integer("--answer_length", low=1, help="tokens of an answer (default: the checkpoint's, or 24)")
def remember(args, stored): return {"answer_length": args.answer_length or stored.get("answer_length", 24)}
def passes(settings): return 1
def start_length(settings): return settings.answer_length


def prepare(model, examples, settings, progress, rng, shared_rng) -> Ragged:
    return Ragged.pack([[e.prompt[0], *e.response] for e in examples])


def loss(model, x: Ragged):
    """The head sees the first token of a text alone, and answers for all others."""
    first = x.positions == 0
    hidden = model(Ragged.from_lengths(x.ids[first], torch.ones_like(x.lengths)))
    row, token = x.batch[~first], x.ids[~first]
    return weighted_nll(hidden, model.token_head, row, token, torch.full(row.shape, 1 / len(row))), {}


@torch.no_grad()
def generate(model, prompts, settings, seeds, drafts=None, on_step=None):
    x = Ragged.pack([prompt[:1] for prompt in prompts], device=next(model.parameters()).device)
    frequencies = model.token_head(model(x)).float().softmax(-1).cpu()
    texts, eos = [], settings.tokens["eos"]
    for p, seed in zip(frequencies, seeds):
        generator = torch.Generator().manual_seed(seed)
        tokens = p.multinomial(start_length(settings), replacement=True, generator=generator).tolist()
        response = tokens[: tokens.index(eos)] if eos in tokens else tokens
        texts.append(Generated(response, tokens, {"passes": 1}))
    return texts
