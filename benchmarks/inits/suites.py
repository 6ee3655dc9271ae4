"""What the benchmark compares on which model: suites of options for `deus_merge.api.compare`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deus_merge import api

#: every init whose outputs are zero; copies at exactly the places of opt_deus are the control
INITS = (
    "llama_pro",
    "copy_next",
    "opt_deus",
    "opt_deus_paper",
    "opt_deus_script",
    "lesa{zero_init: true}",
    "random_zero",
    "calibrated:llama_pro",
    "calibrated:opt_deus",
)
OPTIMIZERS = ("adamw", "adamw:3", "muon")
PLACES = ("top", "middle", "bottom", "even", "sandwich")


@dataclass(frozen=True)
class Model:
    """A base model of the benchmark.

    Attributes:
        summary: What it is.
        far, near: Texts unlike and like its own: ``code``, ``prose`` or ``docs``.
        watched: Whether it is measured how much of the near one is forgotten.
        insert: Where its new layers go.
        half: The layers that ``top_half`` adds.
        tokens: Training tokens of a run.
        batch: Windows of a step.
        held_out: Windows on which losses are measured.
    """

    summary: str
    far: str
    near: str
    watched: bool
    insert: object
    half: int
    tokens: int
    batch: int
    held_out: int


TOP, EVEN = {"count": 4, "where": "top"}, {"count": 4, "where": "even"}
_SMOLLM2, _LARGE = "SmolLM2-135M-Instruct", "trained here on technical documentation, 521 M parameters"
MODELS = {
    "tiny": Model("the model of the package, 0.8 M parameters", "prose", "docs", True, "top_half", 3, 49_152, 2, 16),
    "small": Model("trained here on the prose, 10.5 M parameters", "code", "prose", True, "top_half", 6, 32_768, 2, 16),
    "smollm2": Model(_SMOLLM2, "code", "prose", False, TOP, 15, 20_480, 2, 8),
    "smollm2-40k": Model(_SMOLLM2, "code", "prose", True, EVEN, 15, 40_960, 4, 16),
    "large": Model(_LARGE, "code", "docs", True, EVEN, 14, 40_960, 4, 16),
}


@dataclass(frozen=True)
class Suite:
    """One comparison.

    Attributes:
        question: What it answers.
        options: For a model.
        near: Whether the text is like the base's.
    """

    question: str
    options: Callable[[Model], api.CompareOptions]
    near: bool = False


def _grid(model: Model) -> api.CompareOptions:
    return _options(model, inits=INITS, without_growing=("all", "top", "lora"), seeds=5)


def _near(model: Model) -> api.CompareOptions:
    return _options(model, inits=("llama_pro", "opt_deus", "calibrated:llama_pro"))


def _long(model: Model) -> api.CompareOptions:
    return _options(model, inits=("llama_pro", "opt_deus"), tokens=524_288)


def _places(model: Model) -> api.CompareOptions:
    count = model.insert["count"] if isinstance(model.insert, dict) else 3
    few = ({"count": count, "where": where} for where in PLACES)
    inserts = ("top_half", {"count": model.half, "where": "even"}, "all", *few)
    return _options(model, inits=("llama_pro", "opt_deus"), inserts=inserts, optimizers=("adamw", "muon"))


def _options(model: Model, **more) -> api.CompareOptions:
    usual = {"inserts": (model.insert,), "optimizers": OPTIMIZERS, "tokens": model.tokens}
    usual |= {"batch": model.batch, "held_out": model.held_out}
    return api.CompareOptions(**(usual | more))


SUITES = {
    "grid": Suite(
        "Every init with every optimizer, and the base trained without growing, on a text unlike the base's", _grid
    ),
    "near": Suite("The same for the main inits, on a text like the base's", _near, near=True),
    "long": Suite("The main inits on more than half a million tokens", _long),
    "places": Suite("Where new layers go", _places),
}
