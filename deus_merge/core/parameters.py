"""The description of one parameter of a merge method, an alignment or a solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: the default of a parameter that a recipe must set
REQUIRED = "required"


@dataclass(frozen=True)
class Parameter:
    """One parameter: its name in recipes, the values it takes, and its default.

    Attributes:
        name: Its key under ``parameters``.
        kind: ``number``, ``integer``, ``boolean``, ``choice``, or ``other``, which is read by ``parse``.
        default: The best known setting, or `REQUIRED`.
        help: One line for ``deus-merge methods``.
        scope: ``tensor``: one value per tensor, so filters and gradients apply; ``source``: one value per tensor and
            source; ``block``: one value for a whole layer (gradients apply, filters do not).
        choices: The values of a ``choice``.
        minimum, maximum: Bounds of a number, inclusive.
        parse: For ``other``: reads a plain value; raises ValueError with a description of what is expected.
    """

    name: str
    kind: str
    default: object
    help: str
    scope: str = "tensor"
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    parse: Callable[[object], object] | None = None

    def read(self, value: object) -> object:
        """Convert a recipe's plain value to this parameter's value.

        Raises:
            ValueError: with a description of what is expected.
        """
        if self.parse is not None:
            return self.parse(value)
        if self.kind == "boolean":
            if value in (0, 1):  # older recipes have the numbers
                return bool(value)
            if isinstance(value, str) and value.lower() in ("true", "false"):
                return value.lower() == "true"
        elif self.kind == "choice":
            if value in self.choices:
                return value
        elif (number := as_number(value)) is not None:
            low = self.minimum is None or number >= self.minimum
            high = self.maximum is None or number <= self.maximum
            if low and high and (self.kind == "number" or number == int(number)):
                return number if self.kind == "number" else int(number)
        raise ValueError(self.expected)

    @property
    def expected(self) -> str:
        """A description of the values that are accepted."""
        if self.parse is not None:
            return str(self.parse.__doc__).strip()
        if self.kind == "boolean":
            return "true or false"
        if self.kind == "choice":
            return " | ".join(self.choices)
        name = "a number" if self.kind == "number" else "a whole number"
        if self.minimum is not None and self.maximum is not None:
            return f"{name} from {self.minimum:g} to {self.maximum:g}"
        if self.minimum is not None:
            return f"{name} of at least {self.minimum:g}"
        return name


def block_parameter(name: str, kind: str, default: object, help: str, **more: Any) -> Parameter:
    """A `Parameter` with one value for a whole layer."""
    return Parameter(name, kind, default, help, "block", **more)


def as_number(value: object) -> float | int | None:
    """The value as a finite number, also where YAML 1.1 reads it as text (``1e-3``); None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, int | float) and abs(value) < 1e308:  # also refuses integers that overflow a float
        return value
    return None


def parse_positive(value: object) -> float:
    """a number above 0"""
    number = as_number(value)
    if number is not None and number > 0:
        return float(number)
    raise ValueError(parse_positive.__doc__)


def parse_roles(value: object) -> object:
    """true, false, or a list of roles like [o, down]"""
    if isinstance(value, bool):
        return value
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return tuple(value)
    raise ValueError(parse_roles.__doc__)
