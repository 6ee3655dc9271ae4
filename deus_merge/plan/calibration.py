"""``calibrate:`` in a plan: whether the recipe has outputs that can be set, and which text sets them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.tensors import Action
from ..recipe.calibrate import Calibrate, read_text

if TYPE_CHECKING:
    from .types import Plan


@dataclass(frozen=True)
class PlannedCalibration:
    """What sets the zeroed outputs of new layers, once all blocks of a plan are finished.

    Attributes:
        how: The section of the recipe.
        text_sha256: sha256 of the text in UTF-8.
        layers: The new layers.
        zeroed: How many tensors of theirs are zeroed.
    """

    how: Calibrate
    text_sha256: str
    layers: tuple[int, ...]
    zeroed: int

    @property
    def identity(self) -> dict[str, object]:
        """What decides the result: the content of the text, not its path."""
        return {**self.how.settings, "text": self.text_sha256}

    def describe(self) -> dict[str, object]:
        """As JSON data."""
        found = {"layers": list(self.layers), "zeroed_tensors": self.zeroed}
        return {"text": self.how.text, "text_sha256": self.text_sha256, **self.how.settings, **found}

    def __str__(self) -> str:
        how = self.how
        return (
            f"then sets {self.zeroed} zeroed tensors of {len(self.layers)} new layers by {how.method} from up to"
            f" {how.tokens} tokens of {Path(how.text).name}: the loss of those held out never rises"
        )


def plan_calibration(plan: Plan) -> PlannedCalibration | None:
    """The calibration that a plan's recipe asks for.

    Args:
        plan: The plan without it.

    Returns:
        The calibration; None where the recipe has no ``calibrate``.

    Raises:
        RecipeError: the recipe has no new layers with zeroed outputs, or they are not all that changes.
        PlanError: the text cannot be read, or it is empty.
    """
    how = plan.recipe.calibrate
    if how is None:
        return None
    zeroed = [
        block.layers[output.slot]
        for block in plan.main_blocks
        if block.new
        for output in block.outputs
        if output.action is Action.ZEROS
    ]
    new = plan.new_layers
    if not new or not plan.function_preserving or set(zeroed) != set(new):
        how.place.fail(
            "calibrate sets zeroed outputs of new layers, and adds nothing else",
            expected="new layers with zeroed outputs: presets opt_deus, llama_pro, copy_prev, copy_next",
            got="new layers that change what the model computes" if new else "no new layers",
        )
    text = read_text(how.text, how.at("text").where)
    return PlannedCalibration(how, hashlib.sha256(text.encode()).hexdigest(), new, len(zeroed))
