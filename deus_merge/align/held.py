"""A layer whose tensors are looked up once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class HeldLayer(Mapping[str, "Tensor"]):
    """A layer whose tensors are looked up once and held, in their stored dtype, until they are not needed any more.

    Attributes:
        layer: The layer.
        held: Tensors by role.
        checked: Roles whose values are known to be finite.
        unchecked: Of roles that were read but not checked yet: whether their values are finite, () on the device.
    """

    def __init__(self, layer: Mapping[str, Tensor]):
        self.layer = layer
        self.held: dict[str, Tensor] = {}
        self.checked: set[str] = set()
        self.unchecked: dict[str, Tensor] = {}

    def __getitem__(self, role: str) -> Tensor:
        if role not in self.held:
            self.held[role] = self.layer[role]
        return self.held[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layer)

    def __len__(self) -> int:
        return len(self.layer)
