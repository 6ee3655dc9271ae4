"""Dtypes of an output: what may be cast, and the dtype that config.json names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..checkpoint.quantized import quantization_name
from ..core.errors import PlanError
from ..core.tensors import Action, StoredTensor
from ..core.units import FLOAT_DTYPES, dtype_name, promoted
from ..methods.base import OutputTensor
from ..models.config_json import Config
from ..models.config_rules import widened_config
from ..models.source import SourceModel
from .blocks import BlockPlan

#: safetensors codes of floating point weights
FLOATS = {"F8_E4M3", "F8_E5M2", *FLOAT_DTYPES.values()}
_UNKNOWN = (
    "quantised weights of this format can only be copied; use the original weights, or one of the formats that"
    " deus-merge methods lists"
)
_COMPUTED = (Action.COMPUTE, Action.ALIGN)


def dtyped_config(
    config: Config, blocks: Sequence[BlockPlan], donor: SourceModel
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The output's config.json with a dtype that holds what is written, so that no loader rounds it.

    Tensors whose dtype is not the config's are usual where a model has them so (a float32 router in a bfloat16 model):
    only what the donor has in another dtype counts, and the dtype of most of what is computed.

    Args:
        config: The output's config.json.
        blocks: The plan's blocks.
        donor: The model whose config it is.

    Returns:
        The config, and warnings about copies that are in another dtype than the donor's tensors.
    """
    outputs = [(block, o) for block in blocks for o in block.outputs if o.dtype in FLOAT_DTYPES.values()]
    usual = _donor_dtypes(donor, {block.module for block in blocks})
    odd = [(b, o) for b, o in outputs if o.dtype not in usual.get(_key(b, o), {o.dtype})]
    computed = Counter[str]()
    for _, output in outputs:
        if output.action in _COMPUTED:
            computed[output.dtype] += output.nbytes
    widened = widened_config(config, {*(dtype for dtype, _ in computed.most_common(1)), *(o.dtype for _, o in odd)})
    copied = [(b, o) for b, o in odd if o.action not in _COMPUTED]
    if not copied:
        return widened, ()
    block, first = copied[0]
    own = min(usual[_key(block, first)])
    advice = "Set dtype to write all in one"
    if any(o.quantization for b in blocks for o in b.outputs):
        advice = (
            f"Loaders leave dtypes of quantised models as they are: write the other model in {dtype_name(own)} in a"
            " document of its own before this one"
        )
    named = widened.get("dtype") or widened.get("torch_dtype") or "no dtype"
    return widened, (
        f"{len(copied)} copied {'tensor is' if len(copied) == 1 else 'tensors are'} in another dtype than those of"
        f" {donor.ref}: {first.name} is {dtype_name(first.dtype)}, not {dtype_name(own)}; config.json says {named}."
        f" {advice}",
    )


def _key(block: BlockPlan, output: OutputTensor) -> tuple[str | None, str]:
    """Outside of layers a role is a tensor's name, which is unique."""
    return (block.module, output.role) if block.layers else (None, output.name)


def _donor_dtypes(donor: SourceModel, modules: set[str | None]) -> dict[tuple[str | None, str], set[str]]:
    """The dtypes of the donor's tensors by `_key`."""
    tensors: Mapping[str, StoredTensor] = donor.checkpoint.tensors
    found: dict[tuple[str | None, str], set[str]] = {(None, name): {t.dtype} for name, t in tensors.items()}
    for module in modules:
        view = donor.view if module is None else donor.modules[module]
        for layer in view.layers:
            for role, name in layer.items():
                found.setdefault((module, role), set()).add(tensors[name].dtype)
    return found


def check_plain(output: OutputTensor, models: Sequence[SourceModel]) -> None:
    """Refuse to compute with quantised weights, whose numbers are codes, and with their scales. FP8 has a zero.

    Args:
        output: The output, its action decided.
        models: The model of each of its inputs.

    Raises:
        PlanError: an input is part of a quantised weight.
    """
    for info, model in zip(output.inputs, models, strict=True):
        partner = model.quantized.get(info.name)
        if partner is None or (output.action is Action.ZEROS and info.dtype.startswith("F8")):
            continue
        beside = "" if partner == info.name else f", together with {partner}"
        raise PlanError(
            f"{info.name} is part of a quantised weight ({quantization_name(model.checkpoint.config)}){beside}",
            where=info.file,
            expected="floating point weights, or a plain copy: passthrough without dtype, scale and align",
            got=f"{dtype_name(info.dtype)}, for {output.action}",
            hint=_UNKNOWN,
        )


def check_castable(output: OutputTensor) -> str | None:
    """A warning where a cast loses precision.

    Raises:
        PlanError: an input does not hold floating point weights.
    """
    for info in output.inputs:
        if info.dtype not in FLOATS and not (output.action is Action.DERIVE and info.dtype == output.dtype):
            raise PlanError(
                f"{output.name} holds {dtype_name(info.dtype)}, which cannot be merged",
                where=info.file,
                expected="floating point weights",
                hint=_UNKNOWN,
            )
    for info in output.inputs:
        if promoted([info.dtype, output.dtype]) != output.dtype:
            kinds = f"{dtype_name(info.dtype)} weights are written as {dtype_name(output.dtype)}"
            return f"{kinds}: this loses precision{' and range' if output.dtype == 'F16' else ''}"
    return None
