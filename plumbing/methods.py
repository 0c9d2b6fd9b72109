"""The methods by name."""

from types import SimpleNamespace


import editflow
import medlm
import models
from plumbing import cli


def _model_flags(f) -> None:
    a = f.add_argument
    a("--x0_sampler", type=cli.spec(editflow.source),
      help="Edit Flows: where generation starts (default: the source's, else empty)")
    a("--schedule", type=cli.spec(editflow.schedule), help="Edit Flows: kappa (default: the source's, else cubic)")
    f.flag("--time_conditioned", help="Edit Flows: the model sees t, through an embedding that adds zero at first")


def _remember(args, stored: dict) -> dict:
    new = {
        "method": "editflow",
        "schedule": args.schedule or stored.get("schedule", "cubic"),
        "x0_sampler": args.x0_sampler or stored.get("x0_sampler", "empty"),
        "time_conditioned": bool(args.time_conditioned or stored.get("time_conditioned")),
    }
    editflow.schedule(new["schedule"])
    editflow.source(new["x0_sampler"])
    return new


class EditFlow(models.EditFlowModel):
    def init_heads(self, generator) -> None:
        if hasattr(self, "time_embed"):
            models.init_weights(self.time_embed, generator)
        models.init_new_heads(self, generator)
        if hasattr(self, "unigram"):
            self.unigram.fill_(1 / len(self.unigram))


class MEDLM(models.MEDLMModel):
    def init_heads(self, generator) -> None:
        pass


_METHODS = {
    "editflow": SimpleNamespace(
        Model=EditFlow, HEADS=("sub_logits", "ins_logits"), TOKENS=(), model_flags=_model_flags, remember=_remember
    ),
    "medlm": SimpleNamespace(
        Model=MEDLM, HEADS=("lm_head", "next_token_head"), TOKENS=("mask", "pad", "eos", "del"),
        model_flags=lambda f: None, remember=lambda args, stored: {"method": "medlm"},
    ),
}  # fmt: skip
NAMES = list(_METHODS)


def get(name: str):
    return _METHODS[name]
