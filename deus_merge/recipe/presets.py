"""The ``upscale:`` shorthand: named initialisations, the places of new layers, and the slices that they expand to.

Reference: "Progressive Depth Up-scaling via Optimal Transport", arXiv 2508.08011 (opt_deus and its placement);
LLaMA Pro, arXiv 2401.02415; SOLAR, arXiv 2312.15166; G_stack, arXiv 2405.15319.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import nearest
from ..core.located import Located, Plain, locate
from ..core.text import plural
from ..methods.registry import methods
from ..models.reference import ModelRef
from .parameters import Setting, Settings, check_setting
from .types import OutputSlice, SliceSource, Upscale


@dataclass(frozen=True)
class Preset:
    """A named initialisation of new layers.

    Attributes:
        summary: One line that describes a new layer.
        reference: Its publication.
        function_preserving: Whether the deeper model computes the same function as the base.
        insert: The places of new layers where the recipe sets none, in a recipe's form.
        parameters: The method's parameters that the preset sets; None for presets that only repeat layers.
        after_last: Whether a new layer may follow the last base layer (it needs no upper neighbour).
        method: The merge method that computes the new layers.
    """

    summary: str
    reference: str
    function_preserving: bool
    insert: Plain
    parameters: Mapping[str, Plain] | None = field(default_factory=dict)
    after_last: bool = False
    method: str = "ot_fuse"


_PAPER = "Cao, Wang, Aletras, arXiv 2508.08011"
_FLOW = {"alignment": "transport_flow", "unit_rows": False, "cost_scale": "none", "reg": 0.06, "restore_norm": "none"}
_PLAIN = {"alignment": "none", "restore_norm": "none"}

PRESETS: Mapping[str, Preset] = {
    "opt_deus": Preset(
        "two neighbours fused after one was aligned by symmetries that keep its function: our best settings",
        _PAPER,
        True,
        "even",
    ),
    "opt_deus_paper": Preset(
        "as the paper's text: barycentric plans, reg 0.06, cost as it is, stable solver",
        _PAPER,
        True,
        "top_half",
        {**_FLOW, "plan_scale": "barycentric"},
    ),
    "opt_deus_script": Preset(
        "as the authors' script: the coupling is applied unscaled, which leaves about half of the upper neighbour",
        _PAPER,
        True,
        "top_half",
        {**_FLOW, "plan_scale": "coupling"},
    ),
    "llama_pro": Preset(
        "copy of the layer below, output projections zero",
        "Wu et al., LLaMA Pro, arXiv 2401.02415",
        True,
        {"every": 4},
        {**_PLAIN, "t": 0.0},
        after_last=True,
    ),
    "copy_next": Preset(
        "copy of the layer above, output projections zero", "baseline", True, "even", {**_PLAIN, "t": 1.0}
    ),
    "average": Preset(
        "mean of two neighbours, outputs not zero",
        _PAPER + " (baseline)",
        False,
        "top_half",
        {**_PLAIN, "t": 0.5, "zero_init": False},
    ),
    "average_zero": Preset(
        "mean of two neighbours, output projections zero", "baseline", True, "even", {**_PLAIN, "t": 0.5}
    ),
    "lesa": Preset(
        "predicted from two neighbours by a network that learned from all layers of the model, outputs not zero",
        "Yang et al., LESA, arXiv 2502.13794",
        False,
        "top_half",
        method="lesa",
    ),
    "solar": Preset(
        "layers [0, n-m) then [m, n): the middle is repeated",
        "Kim et al., SOLAR, arXiv 2312.15166",
        False,
        None,
        None,
    ),
    "stack": Preset(
        "the whole model (or a block of it) repeated",
        "Du et al., G_stack, arXiv 2405.15319; Saunshi et al., MIDAS, arXiv 2409.19044",
        False,
        None,
        None,
    ),
}

_FORMS = "even | top_half | bottom_half | all | {every: k} | {after: [i, ...]} | {count: m, where: ...}"
_NAMED = ("even", "top_half", "bottom_half", "all")
MAX_LAYERS = 5000  # of an output
_WHERE = ("top", "middle", "bottom", "even", "sandwich")


def expand(upscale: Upscale, base: ModelRef, num_layers: int) -> tuple[OutputSlice, ...]:
    """The slices that an ``upscale:`` section means.

    Args:
        upscale: The section.
        base: The base model.
        num_layers: The base model's depth.

    Raises:
        RecipeError: an unknown preset, parameter or insert form, or a place that the base does not have.
    """
    check_upscale(upscale)
    preset = PRESETS[upscale.preset]
    if preset.parameters is None:
        ranges = (_solar if upscale.preset == "solar" else _stack)(upscale, num_layers)
        return tuple(_copy(base, start, end, upscale.place) for start, end in ranges if start < end)
    presets = {name: Setting(value, upscale.place) for name, value in preset.parameters.items()}
    settings = {**presets, **upscale.parameters}
    insert = upscale.insert or locate(preset.insert, "upscale.insert")
    places = _places(insert, num_layers, preset.after_last)
    return tuple(_filled_slices(base, places, num_layers, preset.method, settings, upscale.place))


def check_upscale(upscale: Upscale) -> None:
    """Check what can be checked of an ``upscale:`` section without a model: preset, parameters, form of insert.

    Raises:
        RecipeError: an unknown preset, parameter or insert form, or a value out of range.
    """
    if upscale.preset not in PRESETS:
        upscale.place.child("preset").fail(
            "unknown preset", expected=" | ".join(PRESETS), hint=nearest(upscale.preset, PRESETS)
        )
    preset = PRESETS[upscale.preset]
    if preset.parameters is None:
        if upscale.parameters:
            upscale.place.child("parameters").fail(f"{upscale.preset} has no parameters", expected="none")
        return
    known = {p.name: p for p in methods()[preset.method].parameters}
    for name, setting in upscale.parameters.items():
        if name not in known:
            names, message = ", ".join(sorted(known)), f"{preset.method} has no parameter {name!r}"
            setting.place.fail(message, expected=names, got=name, hint=nearest(name, known))
        check_setting(known[name], setting)
    if upscale.insert is not None:
        _check_form(upscale.insert)


def _check_form(insert: Located) -> None:
    """Check the form of ``insert``, whatever the model's depth."""
    form = insert.value
    if isinstance(form, str):
        if form not in _NAMED:
            insert.fail("unknown insert form", expected=_FORMS, got=form, hint=nearest(form, _NAMED))
    elif not isinstance(form, dict):
        insert.fail("not an insert form", expected=_FORMS)
    elif len({"every", "after", "count"} & set(insert.mapping(("every", "after", "count", "where")))) != 1:
        insert.fail("an insert form has one of every, after, count", expected=_FORMS)


def _places(insert: Located, n: int, after_last: bool) -> list[int]:
    """The base layers that a new layer follows, ascending. Gap i is between layers i and i+1."""
    gaps = list(range(n - 1))
    form: Any = insert.value  # `_check_form` has seen it
    if isinstance(form, str):
        half = n // 2
        top, bottom = gaps[n - 1 - half :], gaps[:half]
        places = {"even": evenly(gaps, half), "top_half": top, "bottom_half": bottom, "all": gaps}[form]
    elif "every" in form:
        step = insert.mapping(("every",))["every"].integer(1)
        places = [i for i in range(step - 1, n, step) if after_last or i < n - 1]
        if step == n and not places:
            insert.fail("this inserts no layer: the last layer has no upper neighbour", expected=_FORMS)
    elif "after" in form:
        places = _after(insert.mapping(("after",))["after"], n, after_last)
    else:
        places = _count(insert, gaps)
    if not places:
        insert.fail(
            "this inserts no layer", expected=f"a place among the {plural(n - 1, 'gap')} of {plural(n, 'layer')}"
        )
    return places


def _after(node: Located, n: int, after_last: bool) -> list[int]:
    last = n - 1 if after_last else n - 2
    places = []
    for item in node.sequence("a list of layers"):
        layer = item.integer()
        if layer > last:
            reason = "the model ends there" if layer >= n else "the last layer has no upper neighbour"
            item.fail(f"no new layer can follow layer {layer}: {reason}", expected=f"0 to {last}")
        if layer in places:
            item.fail(f"layer {layer} is named twice", expected="each once", hint="parameters: {layers_per_gap: 2}")
        places.append(layer)
    return sorted(places)


def _count(insert: Located, gaps: list[int]) -> list[int]:
    keys = insert.mapping(("count", "where"))
    m, total = keys["count"].integer(1), len(gaps)
    where = keys["where"].choice(_WHERE, "place") if "where" in keys else "top"
    if m > total:
        keys["count"].fail(
            f"{m} new layers do not fit into {total} gaps",
            expected=f"1 to {total}",
            hint="for several in one gap: parameters: {layers_per_gap: 2}",
        )
    start = (total - m) // 2
    return {
        "top": gaps[total - m :],
        "bottom": gaps[:m],
        "middle": gaps[start : start + m],
        "even": evenly(gaps, m),
        "sandwich": gaps[: m // 2] + gaps[total - (m - m // 2) :],
    }[where]


def evenly(gaps: Sequence[int], count: int) -> list[int]:
    """Some gaps, as far apart as they can be, with half of the distance at either end."""
    return [gaps[int((j + 0.5) * len(gaps) / count)] for j in range(count)]


def _filled_slices(
    base: ModelRef, places: list[int], n: int, method: str, settings: Settings, place: Located
) -> Iterator[OutputSlice]:
    """Slices with new layers at ``places``. A run of adjacent gaps is one slice of the method; the rest is copied."""
    cursor = 0
    for start, end in _runs([p for p in places if p < n - 1]):
        if start > cursor:
            yield _copy(base, cursor, start, place)
        sources = (SliceSource(base, (start, end + 2), place=place),)
        yield OutputSlice(sources, method, parameters=settings, place=place)
        cursor = end + 2
    if cursor < n:
        yield _copy(base, cursor, n, place)
    if places[-1] == n - 1:  # after the last layer, which is its own upper neighbour
        sources = (SliceSource(base, (n - 1, n), place=place),) * 2
        yield OutputSlice(sources, method, parameters=settings, place=place)


def _runs(places: list[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for gap in places:
        if runs and gap == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], gap)
        else:
            runs.append((gap, gap))
    return runs


def _copy(base: ModelRef, start: int, end: int, place: Located) -> OutputSlice:
    return OutputSlice((SliceSource(base, (start, end), place=place),), "passthrough", place=place)


def _extra(upscale: Upscale, default: int, allowed: tuple[str, ...]) -> tuple[int, Located]:
    """The number of layers that a repeating preset adds (``insert: {count: m}``, or the default), and its place."""
    if upscale.insert is None:
        return default, upscale.place
    if not isinstance(upscale.insert.value, dict) or "count" not in upscale.insert.value:
        upscale.insert.fail(f"{upscale.preset} takes only a count", expected="{count: number of layers to add}")
    keys = upscale.insert.mapping(allowed)
    added = keys["count"].integer(1)
    if added > MAX_LAYERS:
        keys["count"].fail("the output has too many layers", expected=f"at most {MAX_LAYERS}")
    return added, keys["count"]


def _solar(upscale: Upscale, n: int) -> list[tuple[int, int]]:
    """[0, n-m) and [m, n) with n - 2m added layers. By default m = n/4, so that 32 layers become 48."""
    added, place = _extra(upscale, n - 2 * (n // 4), ("count",))
    if added > n or (n - added) % 2:
        place.fail(
            "solar cannot add this many layers",
            expected=f"at most {n}, and {'an even' if n % 2 == 0 else 'an odd'} number",
            got=added,
        )
    m = (n - added) // 2
    return [(0, n - m), (m, n)]


def _stack(upscale: Upscale, n: int) -> list[tuple[int, int]]:
    """The whole model repeated, or with ``where`` one block of ``count`` layers repeated in its place."""
    added, place = _extra(upscale, n, ("count", "where"))
    keys = upscale.insert.mapping(("count", "where")) if upscale.insert else {}
    if "where" not in keys:
        if added % n:
            place.fail(
                "stack repeats whole models",
                expected=f"a multiple of {n}",
                got=added,
                hint="with where: top | middle | bottom a block of that many layers is repeated",
            )
        return [(0, n)] * (added // n + 1)
    where = keys["where"].choice(("top", "middle", "bottom"), "place")
    if added > n:
        place.fail(f"a block of {plural(added, 'layer')} is more than the model has", expected=f"1 to {n}", got=added)
    start = {"bottom": 0, "middle": (n - added) // 2, "top": n - added}[where]
    return [(0, start + added), (start, n)]
