"""What is compared: how new layers begin, where they are and how they train; and models that do not grow."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...core.errors import TrainingError, nearest
from ...core.located import Plain, locate
from ...core.yaml_text import parse
from ...recipe.presets import PRESETS
from ...recipe.reader import read_recipe, recipe_from
from ...recipe.types import Recipe
from ..optimizers import KINDS

RANDOM = "random_zero"
CALIBRATED = "calibrated:"
#: what trains without growing -> in words
UNGROWN = {"all": "all parameters of the base", "top": "its top layers", "lora": "a LoRA adapter of all linear layers"}


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of a comparison.

    Attributes:
        kind: ``adamw`` or ``muon``.
        output_ratio: As for `training.optimizer`.
    """

    kind: str
    output_ratio: float = 1.0

    def __str__(self) -> str:
        return self.kind if self.output_ratio == 1.0 else f"{self.kind}:{self.output_ratio:g}"


@dataclass(frozen=True)
class Candidate:
    """One thing that is compared; it runs at several learning rates, and with several seeds.

    Attributes:
        init: A preset, also with parameters as in ``lesa{zero_init: true}``, a recipe's file, either of them with
            ``calibrated:`` in front, or ``random_zero``; or, without growing, ``all``, ``top:N`` or ``lora:R``.
        insert: The places of new layers, in a recipe's form as JSON; empty for recipes and models that do not grow.
        optimizer: The optimizer.
    """

    init: str
    insert: str
    optimizer: str

    @property
    def grown(self) -> bool:
        return self.init.partition(":")[0] not in UNGROWN

    @property
    def places(self) -> Plain:
        """``insert`` as a value."""
        return json.loads(self.insert) if self.insert else None

    @property
    def parsed_optimizer(self) -> Optimizer:
        return parse_optimizer(self.optimizer)

    @property
    def calibrated(self) -> bool:
        return self.init.startswith(CALIBRATED)

    def __str__(self) -> str:
        places = f" {insert_text(self.places)}" if self.insert else ""
        return f"{self.init}{places}, {self.optimizer}"


def insert_text(insert: Plain) -> str:
    """The places of new layers in a few characters: ``{"count": 4, "where": "top"}`` -> ``4 top``."""
    if not isinstance(insert, Mapping):
        return str(insert)
    if "count" in insert:
        return f"{insert['count']} {insert.get('where', 'top')}"
    name, value = next(iter(insert.items()))
    return f"{name} {', '.join(map(str, value)) if isinstance(value, list) else value}"


def parse_optimizer(text: str) -> Optimizer:
    """``adamw``, ``muon``, or one with a ratio like ``adamw:3``.

    Raises:
        TrainingError: it is none of these.
    """
    kind, colon, ratio = text.partition(":")
    try:
        number = float(ratio) if colon else 1.0
    except ValueError:
        number = math.nan
    if kind not in KINDS or not (math.isfinite(number) and number > 0):
        expected = f"{' | '.join(KINDS)}, also with the output ratio, like adamw:3"
        raise TrainingError(
            "not an optimizer", where="--optimizer", expected=expected, got=text, hint=nearest(kind, KINDS)
        )
    return Optimizer(kind, number)


def check_init(text: str) -> str:
    """Check the name of an init, or of a model that does not grow.

    Raises:
        TrainingError: there is no such init.
    """
    plain = text.removeprefix(CALIBRATED).partition("{")[0]
    if plain == RANDOM and text != RANDOM:
        expected = f"{RANDOM}: it has no parameters, and what is drawn anew for each seed is not calibrated"
        raise TrainingError("not an init", where="--init", expected=expected, got=text)
    if plain not in (*PRESETS, RANDOM) and not is_recipe(plain):
        known = [*PRESETS, RANDOM]
        raise TrainingError(
            "unknown init",
            where="--init",
            expected=f"{' | '.join(known)}, a preset with {CALIBRATED} in front, or a recipe's file",
            got=text,
            hint=nearest(plain, known),
        )
    return text


def is_recipe(init: str) -> bool:
    """Whether an init is the name of a recipe's file."""
    return Path(init).suffix in (".yml", ".yaml")


def shared_init(init: str) -> str:
    """An init as results name it, which are shared: a recipe's path as it is seen from the working directory."""
    path = init.removeprefix(CALIBRATED)
    return init.replace(path, os.path.relpath(path), 1) if is_recipe(path) and os.path.isabs(path) else init


def recipe_of(candidate: Candidate, model: str) -> Recipe:
    """The recipe that grows a model for a candidate, before weights are drawn at random or calibrated.

    Raises:
        RecipeError: as for any recipe.
        TrainingError: the recipe's base is another model.
    """
    init = candidate.init.removeprefix(CALIBRATED)
    if is_recipe(init):
        recipe = read_recipe(Path(init))
        if model not in {ref.text for ref in recipe.models()}:
            got = ", ".join(sorted({ref.text for ref in recipe.models()}))
            raise TrainingError("the recipe grows another model", where=init, expected=model, got=got)
        return recipe
    preset, brace, parameters = init.partition("{")
    section: dict[str, Plain] = {"preset": "copy_next" if init == RANDOM else preset}
    if brace:
        section["parameters"] = parse(brace + parameters, f"--init {init}").plain()
    if candidate.insert:
        section["insert"] = candidate.places
    return recipe_from(locate({"base_model": model, "upscale": section}))


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        candidate: What runs.
        lr: Its learning rate.
        seed: Draws the windows.
        folder: The checkpoint that is trained.
        new_layers: The layers of it that train; empty where ``init`` says what trains.
        fixed: The settings that all runs share.
        work: A folder for what runs share.
    """

    candidate: Candidate
    lr: float
    seed: int
    folder: Path = field(compare=False)
    new_layers: tuple[int, ...] = field(compare=False)
    fixed: Fixed = field(compare=False)
    work: Path = field(compare=False)

    @property
    def key(self) -> dict[str, object]:
        """What distinguishes its result."""
        return {**vars(self.candidate), "lr": self.lr, "seed": self.seed}


@dataclass(frozen=True)
class Fixed:
    """Settings that are the same for all runs of a comparison.

    Attributes:
        model: The first eight hexadecimal digits of a digest of the base's weights.
        text, base_text: The fingerprints of the texts; the second is empty without one.
        steps: Optimizer steps of a run.
        batch: Windows of a step.
        length: Tokens of a window.
        held_out: Windows on which losses are measured, of either text.
        calibration_tokens: Tokens that calibrated inits use, which are taken off their training.
        precision: ``bfloat16`` (autocast) or ``float32``.
    """

    model: str
    text: str
    base_text: str
    steps: int
    batch: int
    length: int
    held_out: int
    calibration_tokens: int
    precision: str

    @property
    def tokens(self) -> int:
        """Training tokens of a run."""
        return self.steps * self.batch * self.length
