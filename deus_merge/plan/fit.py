"""How many new layers can be trained on a card, and what would have to change where none can.

They are spread evenly, where they learned most in our benchmark (docs/does-it-help.md, Places), and are half as many as
the base has layers at most. Layers at the top cost the least, since nothing below the lowest new one keeps activations:
where not even one layer in the middle fits, or can stand, they fill the gaps from the top down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.errors import PlanError
from ..core.located import Plain
from ..core.units import format_size
from ..recipe.presets import evenly
from .training_memory import BASES, ModelShape, TrainingMemory, TrainingSettings, training_memory

_SHORTEST = 128  # the shortest length that is proposed, in tokens


@dataclass(frozen=True)
class Fit:
    """New layers whose training fits.

    Attributes:
        memory: The memory of the card in bytes.
        insert: Their places, as in a recipe.
        layers: How many new layers there are.
        most: How many there could have been.
        needed: The estimate of their training.
    """

    memory: int
    insert: Plain
    layers: int
    most: int
    needed: TrainingMemory

    def describe(self) -> dict[str, Any]:
        """The choice as JSON data."""
        return {"memory": self.memory, "insert": self.insert, "layers": self.layers, "most": self.most}


#: the model with new layers in these places, as in a recipe; None where it can have none there
ShapeOf = Callable[[Mapping[str, Any]], ModelShape | None]


def choose(
    shape_of: ShapeOf, memory: int, settings: TrainingSettings, most: int, ways: Sequence[str] = ("even", "top")
) -> Fit:
    """The largest number of gaps whose new layers can be trained: evenly spread, or else from the top down.

    Args:
        shape_of: The model with new layers in some gaps.
        memory: The memory of the card in bytes.
        settings: How they are trained.
        most: The largest number of gaps.
        ways: How gaps are chosen, the preferred way first.

    Returns:
        The choice.

    Raises:
        PlanError: no new layers fit, or they cannot be trained.
    """
    layers, tried = 0, list[tuple[int, ModelShape, dict[str, Any]]]()
    for where in ways:
        for count in range(most, 0, -1):  # fewer layers elsewhere may take more, where layers differ
            insert: dict[str, Any] = {"count": count, "where": where}
            if (model := shape_of(insert)) is None:
                continue
            layers, peak = max(layers, len(model.new_layers)), _needed(model, settings).peak
            if peak <= memory:
                return check(model, memory, settings, insert, most=layers)
            tried.append((peak, model, insert))
    if not tried:
        raise PlanError("there is no place for a new layer", where="--fit", hint="upscale without --fit says why")
    _, model, insert = min(tried, key=lambda one: one[0])
    return check(model, memory, settings, insert, most=layers)  # which refuses it


def within(whole: ModelShape) -> ShapeOf:
    """The shapes that are part of a model with new layers in all gaps."""
    gaps = whole.filled_gaps

    def shape_of(insert: Mapping[str, Any]) -> ModelShape:
        count = insert["count"]
        return whole.with_gaps(evenly(gaps, count) if insert["where"] == "even" else gaps[-count:])

    return shape_of


def check(model: ModelShape, memory: int, settings: TrainingSettings, insert: Plain, most: int | None = None) -> Fit:
    """Whether all new layers of a model can be trained.

    Args:
        model: The model.
        memory: The memory of the card in bytes.
        settings: How they are trained.
        insert: Their places, as in a recipe.
        most: How many new layers there could be; None for as many as there are.

    Returns:
        The new layers.

    Raises:
        PlanError: they do not fit, or cannot be trained. The message says what would have to change.
    """
    needed, layers = _needed(model, settings), len(model.new_layers)
    if needed.peak > memory:
        count = "one new layer" if layers == 1 else f"{layers} new layers"
        raise PlanError(
            f"training {count} does not fit",
            where="--fit",
            expected=f"at most {format_size(memory)}",
            got=f"about {format_size(needed.peak)} for {settings.batch} x {settings.length} tokens,"
            f" of which {format_size(needed.base_weights)} are the base's weights",
            hint=_advice(model, memory, settings)
            + ("; without --insert, --fit takes fewer layers" if most is None and layers > 1 else ""),
        )
    return Fit(memory, insert, layers, layers if most is None else most, needed)


def _needed(model: ModelShape, settings: TrainingSettings) -> TrainingMemory:
    needed = training_memory(model, settings)
    if needed is None:
        raise PlanError(
            "there are no new layers that can be trained",
            where="--fit",
            expected="a preset that puts in new layers, in floating point",
            hint="without --quantize-new, if it was given",
        )
    return needed


def _advice(model: ModelShape, memory: int, settings: TrainingSettings) -> str:
    """The changes that make the layers fit: each alone, or several together; or the least that is possible."""
    alone = [found for kind in _CHANGES if (found := _tried(model, memory, settings, kind))]
    if fitting := [f"{found.options} ({format_size(found.peak)})" for found in alone if found.peak <= memory]:
        return f"it fits with {' or '.join(fitting)}"
    together: list[_Change] = []
    for kind in _CHANGES:
        if found := _tried(model, memory, _changed(settings, together), kind):
            together.append(found)
            if found.peak <= memory:
                break
    for change in together[:-1]:  # later changes may have made it needless
        others = [other for other in together if other is not change]
        if _needed(model, _changed(settings, others)).peak <= memory:
            together = others
    options, peak = " ".join(c.options for c in together), _needed(model, _changed(settings, together)).peak
    if peak <= memory:
        return f"it fits with {options} together ({format_size(peak)})"
    even = f"even with {options}" if options else "with these settings"
    return f"{even} it takes {format_size(peak)}: only more memory or a smaller base helps"


@dataclass(frozen=True)
class _Change:
    """Other settings.

    Attributes:
        options: What is different, as on the command line.
        fields: The same as fields of `TrainingSettings`.
        peak: The bytes that training then takes.
    """

    options: str
    fields: dict[str, Any]
    peak: int


def _changed(settings: TrainingSettings, changes: list[_Change]) -> TrainingSettings:
    for change in changes:
        settings = replace(settings, **change.fields)
    return settings


#: kinds of changes -> their options and the fields that they set, one after the other, each taking less
_Kind = Callable[[TrainingSettings], Iterator[tuple[str, dict[str, Any]]]]


def _tried(model: ModelShape, memory: int, settings: TrainingSettings, kind: _Kind) -> _Change | None:
    """The least change of a kind that makes the layers fit, or else the one that takes least; None if none helps."""
    best, peak = None, _needed(model, settings).peak
    for options, fields in kind(settings):
        needed = _needed(model, replace(settings, **fields)).peak
        if needed < peak:
            best, peak = _Change(options, fields, needed), needed
        if peak <= memory:
            break
    return best


def _checkpointing(settings: TrainingSettings):
    if not settings.checkpointing:
        yield "--checkpointing", {"checkpointing": True}


def _smaller_batch(settings: TrainingSettings):
    batch = settings.batch
    while batch := batch // 2:
        yield f"--batch {batch}", {"batch": batch}


def _shorter(settings: TrainingSettings):
    length = settings.length
    while (length := length // 2) >= _SHORTEST:
        yield f"--length {length}", {"length": length}


def _smaller_optimizer(settings: TrainingSettings):
    if settings.optimizer == "adamw":
        yield "--optimizer adamw_8bit", {"optimizer": "adamw_8bit"}


def _smaller_base(settings: TrainingSettings):
    for base in sorted(BASES, key=lambda name: -BASES[name]):
        if BASES[base] < BASES[settings.base]:
            yield f"--base-dtype {base}", {"base": base}


_CHANGES: tuple[_Kind, ...] = (_checkpointing, _smaller_batch, _smaller_optimizer, _smaller_base, _shorter)
