"""The left-to-right twin: the same backbone and the same tokens, read with a causal mask, for comparison.

A text is written one token at a time, each drawn from what the model expects after everything before it:

    log p(response | prompt) = sum_i log p(token i | prompt, tokens before i)

Lay this file beside medlm.py and editflow.py, which have the same functions in the same order, and see what changes:

    here                                ME-DLM                              Edit Flows
    every token sees those before it    every token sees all                every token sees all
    the label is the next token         masked tokens, or edit labels       the edits that remain on the way from x0
    one head                            two: become what, followed by what  two, and three rates: how soon
    one pass writes one token           a pass fills or edits many          a pass inserts, deletes, substitutes many
    what is written stays               masks: stays; edits: may change     may change in every step
    the likelihood is exact             an upper bound of its negative      an upper bound of its negative

There is no cache of keys and values: every step reads the texts again, as the two others must.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from editflow import draw_token
from ragged import GAP, KEEP, Generated, Ragged, apply_edits, frozen_text, uniform_noise, weighted_nll

# ---------------------------------------------------------------------------------------------------- head and loss


class Model(nn.Module):
    """One vocabulary head over a backbone, a module that turns a ragged batch into hidden states [T, D]."""

    def __init__(self, backbone: nn.Module, D: int, V: int, bias: bool = False, stored: dict | None = None):
        super().__init__()
        self.model = backbone
        self.next_logits = nn.Linear(D, V, bias=bias)  # which token comes next

    def init_heads(self, generator: torch.Generator) -> None:
        """The head starts from a pretrained output matrix, or like any other matrix."""

    def forward(self, x: Ragged) -> Tensor:
        """Hidden states [T, D], each of which has seen its own token and those before it."""
        return self.model(replace(x, causal=True))


@dataclass(frozen=True)
class Batch:
    """Texts, and the token that follows each row at which the head is supervised."""

    x: Ragged
    row: Tensor  # int64 [N]: the rows in front of response tokens
    token: Tensor  # int64 [N]: these response tokens

    def to(self, device) -> "Batch":
        return Batch(self.x.to(device), self.row.to(device), self.token.to(device))


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict]:
    """Cross-entropy in nats per response token: (scalar, detached metrics)."""
    weight = torch.full_like(batch.row, 1 / max(len(batch.row), 1), dtype=torch.float32)
    nll = weighted_nll(model(batch.x), model.next_logits, batch.row, batch.token, weight)
    return nll, {"loss": nll.detach()}


def next_tokens(examples: list) -> Batch:
    """Examples, with token ids in .prompt and .response, as a batch."""
    x = Ragged.pack([[*e.prompt, *e.response] for e in examples])
    prompt_len = torch.tensor([len(e.prompt) for e in examples])
    row = (x.positions >= prompt_len[x.batch]).nonzero()[:, 0]
    return Batch(x, row - 1, x.ids[row])


@torch.no_grad()
def likelihood(model: nn.Module, examples: list, settings, rng: torch.Generator) -> Tensor:
    """The sum of -log p(response | prompt), in nats, float64 scalar: exact."""
    batch = next_tokens(examples).to(next(model.parameters()).device)
    return loss(model, batch)[0].double() * len(batch.row)


# ---------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def sample(
    model: nn.Module, prompts: list, *, length: int, seeds: list[int] | None = None, temperature: float = 1.0,
    top_k: int = 0, top_p: float = 1.0, eos_id: int | None = None, max_length: int | None = None, on_step=None,
) -> list[Generated]:  # fmt: skip
    """Write up to `length` tokens behind each prompt, prompts (B lists of token ids) in one batch.

    A text that has ended in eos_id, or has max_length tokens, leaves the batch. Each sequence draws from its own
    counter-based noise, so its text depends on its seed and not on its neighbours. on_step(t, x, op, sub_token,
    ins_token, "") is called before tokens are appended. Raises ValueError for an empty prompt.
    """
    if not prompts:
        return []
    device = next(model.parameters()).device
    x = frozen_text(prompts, [[]] * len(prompts), device=device)
    seed = torch.tensor([s for _, s in zip(prompts, seeds or range(len(prompts)), strict=True)], device=device)
    active, steps = torch.ones_like(seed, dtype=torch.bool), torch.zeros_like(seed)
    for step in range(length):
        active &= x.lengths < (max_length or torch.inf)
        if not active.any():
            break
        reading = x.select(active)
        hidden = model(reading)[reading.cu_seqlens[1:].long() - 1]
        u = uniform_noise(seed[active], step, torch.zeros_like(seed[active]), 0)
        token = draw_token(model.next_logits(hidden), u, temperature, top_k, top_p)
        ins_token = torch.full_like(x.ids, GAP).index_copy(0, x.cu_seqlens[1:][active].long() - 1, token)
        edits = torch.full_like(x.ids, KEEP, dtype=torch.uint8), x.ids, ins_token
        if on_step is not None:
            on_step(step / length, x, *edits, "")
        x, steps = apply_edits(x, *edits), steps + active
        if eos_id is not None:
            active[active.clone()] = token != eos_id
    texts = []
    for ids, prompt, n in zip(x.unpack(), prompts, steps.tolist()):
        tokens = ids[len(prompt) :]
        response = tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens
        texts.append(Generated(response, tokens, {"steps": n}))
    return texts


# ------------------------------------------------------------- what the scripts ask for (plumbing/methods.py)

TITLE = "left to right"
HEADS = ("next_logits",)
TOKENS = ("eos",)
PACKED = False
EXACT = True  # its likelihood is no bound


def model_flags(f) -> None:
    """Nothing to remember."""


def training_flags(f) -> None:
    """Nothing of its own."""


def sampling_flags(f) -> None:
    """Nothing of its own: --init_num is the longest answer."""


def remember(args, stored: dict) -> dict:
    return {}


def check_example(example, settings) -> None:
    if example.suffix:
        raise ValueError("a model that writes from left to right cannot be trained to write in front of a suffix")


def prepare(model, examples: list, settings, progress: float, rng, shared_rng) -> Batch:
    return next_tokens(examples)


def passes(settings) -> int:
    return settings.init_num


def start_length(settings) -> int:
    return 1


def generate(model, prompts: list, settings, seeds: list[int], drafts=None, suffixes=None, keep=None, on_step=None):
    """Raises ValueError for a draft or a suffix."""
    if drafts or suffixes:
        raise ValueError("--draft and --suffix are for models that edit; this one writes from left to right")
    return sample(
        model, prompts, length=settings.init_num, seeds=seeds, temperature=settings.temperature, top_k=settings.top_k,
        top_p=settings.top_p, eos_id=settings.tokens["eos"], max_length=settings.max_positions, on_step=on_step,
    )  # fmt: skip
