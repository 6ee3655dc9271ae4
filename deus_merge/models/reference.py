"""A model as a recipe names it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.located import Located


@dataclass(frozen=True)
class ModelRef:
    """A model as a recipe names it: a local folder, or ``org/name[@revision]`` on the hub; with a LoRA adapter,
    ``model+adapter``."""

    text: str
    place: Located = field(compare=False, repr=False, default=Located(None))

    def __str__(self) -> str:
        return self.text
