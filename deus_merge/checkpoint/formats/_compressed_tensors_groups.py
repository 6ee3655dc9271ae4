"""The config section of compressed-tensors: which group of settings a module has. No format: part of one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ...core.errors import CheckpointError

#: how each known format stores codes: as one number each, in int32 words, or as pairs of FP4 values in bytes
STORED = {
    "float-quantized": "numbers", "int-quantized": "numbers", "naive-quantized": "numbers",
    "pack-quantized": "int32", "nvfp4-pack-quantized": "fp4", "dense": "floats", "fakequant": "floats",
}  # fmt: skip
_STRATEGIES = {
    "numbers": ("tensor", "channel", "group", "block"), "int32": ("tensor", "channel", "group"),
    "fp4": ("tensor_group",),
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Settings of the weights of some modules: an entry of ``config_groups``.

    Attributes:
        key: Where it is, for messages.
        targets: Names of modules, patterns of names (``re:``) and classes of modules.
        format: The format's name, as the config spells it.
        stored: How codes are stored: a value of `STORED`.
        kind: ``int`` or ``float``.
        bits: Bits of a code.
        strategy: What shares a scale.
        block: How many rows and columns share a scale; None for all of them.
        symmetric: Whether zero has the code zero, so that there are no zero points.
        ordered: Whether columns belong to groups in an order of their own (``weight_g_idx``).
    """

    key: str
    targets: Sequence[str]
    format: str
    stored: str
    kind: str
    bits: int
    strategy: str
    block: tuple[int | None, int | None]
    symmetric: bool
    ordered: bool


def inner(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section itself; in an old ``compression_config``, the section that it holds."""
    nested = section.get("quantization_config")
    return nested if isinstance(nested, Mapping) else section


def groups(section: Mapping[str, Any], where: object) -> list[Group]:
    """The groups of a config section whose weights are quantised.

    Args:
        section: The section.
        where: The config, for messages.

    Raises:
        CheckpointError: a setting is unknown, or changes what weights mean in a way that is not supported.
    """
    quantized = inner(section)
    for key in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        value = section.get(key) or quantized.get(key)
        said = value.get("format", value) if isinstance(value, Mapping) else value
        if value and said != "dense":
            _refuse(where, key, said, "none")
    overall = quantized.get("format") or "dense"
    if overall != "mixed-precision" and str(overall) not in STORED:
        _refuse(where, "format", overall, " | ".join(STORED))
    entries = quantized.get("config_groups") or {}
    if not isinstance(entries, Mapping):
        _refuse(where, "config_groups", entries, "groups by their names")
    found = []
    for name, entry in entries.items():
        key = f"config_groups.{name}"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("weights") or {}, Mapping):
            _refuse(where, key, entry, "targets and settings of weights")
        if entry.get("weights"):
            found.append(_group(key, entry, entry.get("format") or overall, where))
    return found


def group_of(module: str, among: Sequence[Group]) -> Group | None:
    """The group that a module is quantised by: by its name, else by a pattern, else by its class.

    Headers do not say classes: a module named like an embedding is one, every other is linear; any module that has
    codes belongs to the only group of a config that has one.
    """
    named = [(target, group) for group in among for target in group.targets]
    exact = (group for target, group in named if target == module)
    patterns = sorted((target, index) for index, (target, _) in enumerate(named) if target.startswith("re:"))
    matching = (named[index][1] for target, index in patterns if re.match(target[3:], module))
    class_ = "Embedding" if "embed" in module.rpartition(".")[2] else "Linear"
    classes = (group for target, group in named if target == class_)
    only = iter(among if len(among) == 1 else ())
    return next((group for source in (exact, matching, classes, only) for group in source), None)


def _group(key: str, entry: Mapping[str, Any], format_: str, where: object) -> Group:
    """One entry of ``config_groups``.

    Raises:
        CheckpointError: a setting is unknown.
    """
    settings, targets = entry["weights"], entry.get("targets") or ()
    if not isinstance(targets, list | tuple):
        _refuse(where, f"{key}.targets", targets, "a list of names")
    for target in targets:
        try:
            re.compile(target.removeprefix("re:"))
        except (re.error, AttributeError):
            _refuse(where, f"{key}.targets", target, "a name, or re: and a regular expression")
    stored = STORED.get(str(format_))
    if stored is None:
        _refuse(where, f"{key}.format", format_, " | ".join(STORED))
    size, shape = settings.get("group_size"), settings.get("block_structure")
    strategy = settings.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    kind, bits, symmetric = settings.get("type", "int"), settings.get("num_bits", 8), settings.get("symmetric", True)
    if stored == "floats":
        return Group(key, targets, format_, stored, kind, bits, strategy, (1, 1), True, False)
    if strategy not in _STRATEGIES[stored]:
        _refuse(where, f"{key}.weights.strategy", strategy, " | ".join(_STRATEGIES[stored]))
    if kind not in ("int", "float") or stored == "int32" and kind == "float" or stored == "fp4" and kind == "int":
        _refuse(where, f"{key}.weights.type", kind, {"int32": "int", "fp4": "float"}.get(stored, "int | float"))
    fitting = (4,) if stored == "fp4" else (8,) if kind == "float" else (1, 2, 4, 8)
    if bits not in fitting:
        _refuse(where, f"{key}.weights.num_bits", bits, " | ".join(map(str, fitting)))
    if not isinstance(symmetric, bool) or stored == "fp4" and not symmetric:
        _refuse(where, f"{key}.weights.symmetric", symmetric, "true")
    if str(settings.get("scale_dtype")).endswith("uint8"):
        _refuse(where, f"{key}.weights.scale_dtype", settings["scale_dtype"], "a dtype of floats")
    if strategy in ("group", "tensor_group") and not (isinstance(size, int) and size > 0):
        _refuse(where, f"{key}.weights.group_size", size, "a positive integer")
    if isinstance(shape, str):
        shape = [int(side) for side in shape.split("x") if side.isdecimal()]  # "128x128", as it was spelled once
    if strategy == "block" and not (
        isinstance(shape, Sequence) and len(shape) == 2 and all(isinstance(side, int) and side > 0 for side in shape)
    ):
        _refuse(where, f"{key}.weights.block_structure", shape, "two positive integers")
    block = {"tensor": (None, None), "channel": (1, None), "block": tuple(shape or ())}.get(strategy, (1, size))
    order = settings.get("actorder")
    if order not in (None, False, "weight", "static", "group", "dynamic"):
        _refuse(where, f"{key}.weights.actorder", order, "weight | group")
    ordered = order in ("group", "dynamic")
    return Group(key, targets, format_, stored, kind, bits, strategy, block, symmetric, ordered)


def _refuse(where: object, key: str, value: object, expected: str) -> NoReturn:
    raise CheckpointError(
        f"quantization_config.{key}: this compressed-tensors setting is not supported",
        where=where,
        expected=expected,
        got=value,
        hint="use the original model, or decompress it with the library that wrote it",
    )
