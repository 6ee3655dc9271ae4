"""References to models, as recipes write them."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..checkpoint.hub import split_adapter
from ..core.located import Located
from ..core.urls import is_url, public_url

_NOWHERE = Located(None)


@dataclass(frozen=True)
class ModelRef:
    """A reference to a model, as a recipe writes it.

    Attributes:
        text: A local folder, ``org/name[@revision]`` on the hub, or an address like ``s3://bucket/model``; with a LoRA
            adapter, ``model+adapter``. An address is shown and recorded as it stands here: without secrets.
        place: The place in the recipe.
        architecture: The class that config.json of an output with this model's config names; None for its own.
        address: The reference as it was written, if it is an address with a password or a query.
    """

    text: str
    place: Located = field(compare=False, repr=False, default=_NOWHERE)
    architecture: str | None = field(compare=False, default=None)
    address: str | None = field(compare=False, repr=False, default=None)

    @classmethod
    def of(cls, text: str, place: Located = _NOWHERE, architecture: str | None = None) -> ModelRef:
        """A reference from its text, which may be an address with secrets."""
        base, plus, adapter = text.rpartition("+") if is_url(text) and split_adapter(text)[1] else (text, "", "")
        if not is_url(base) or (public := public_url(base)) == base:
            return cls(text, place, architecture)
        return cls(f"{public}{plus}{adapter}", place, architecture, text)

    def __str__(self) -> str:
        return self.text
