"""References to models, as recipes write them."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.located import Located


@dataclass(frozen=True)
class ModelRef:
    """A reference to a model, as a recipe writes it.

    Attributes:
        text: A local folder, or ``org/name[@revision]`` on the hub; with a LoRA adapter, ``model+adapter``.
        place: The place in the recipe.
        architecture: The class that config.json of an output with this model's config names; None for its own.
    """

    text: str
    place: Located = field(compare=False, repr=False, default=Located(None))
    architecture: str | None = field(compare=False, default=None)

    def __str__(self) -> str:
        return self.text
