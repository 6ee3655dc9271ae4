"""Models with quantised weights in memory: whether gradients pass through them, and what transformers must know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..core.errors import TrainingError

if TYPE_CHECKING:
    import torch
    from torch.nn import Module, Parameter

#: ``quant_method`` in a config.json -> the class of transformers that dequantises such weights when it loads them
DEQUANTIZING = {"compressed-tensors": "CompressedTensorsConfig", "fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
_WRITE_FLOATS = "write the base in floating point (merge_method: passthrough, dtype: bfloat16), and grow that"


def is_codes(parameter: torch.Tensor) -> bool:
    """Whether a parameter holds codes, which have a meaning only together with scales."""
    if not parameter.is_floating_point() or parameter.element_size() == 1:
        return True
    return getattr(parameter, "quant_state", None) is not None  # bitsandbytes stores codes as any dtype


def size(parameter: Any) -> int:
    """The number of elements of the weight that a parameter stands for."""
    if shape := getattr(getattr(parameter, "quant_state", None), "shape", None):  # of bitsandbytes: two codes in a byte
        return shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())  # DeepSpeed's ZeRO-3 leaves an empty tensor behind


def check_gradients_pass(model: Module) -> None:
    """Check that no weight of a model stops gradients on their way to the layers below.

    transformers computes with codes in FP8, MXFP4 and the formats of compressed-tensors by kernels that have no
    gradient, and so does bitsandbytes with codes that it put into another order for a CPU: what is below learns
    nothing, or something wrong, without an error.

    Args:
        model: The model, wrapped or not.

    Raises:
        TrainingError: one does.
    """
    for name, parameter in model.named_parameters():
        if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
            raise TrainingError(
                "gradients do not pass through a quantised weight: a forward pass has put its codes into another order",
                where=name,
                hint="load the model again, and call freeze_base before its first forward pass",
            )
    for inner in pretrained(model):
        quantizer = getattr(inner, "hf_quantizer", None)
        if quantizer is None:
            continue
        config = quantizer.quantization_config
        method = str(getattr(config.quant_method, "value", config.quant_method))
        name = type(config).__name__
        if getattr(config, "dequantize", None) is False:
            hint = (
                f"from_pretrained(..., quantization_config=transformers.{name}(dequantize=True)); save_trained then"
                " writes the codes of the base as they were"
            )
        elif not quantizer.is_trainable:
            hint = _WRITE_FLOATS
        else:
            continue
        raise TrainingError(
            "gradients do not pass through quantised weights of this format as they were loaded",
            where=type(inner).__name__,
            expected="weights that transformers dequantises when it loads them, or of bitsandbytes",
            got=f"quant_method {method}",
            hint=hint,
        )


def cast(parameters: Iterable[Parameter], dtype: torch.dtype) -> None:
    """Cast parameters to a dtype, but for codes."""
    for parameter in parameters:
        if parameter.dtype != dtype and not is_codes(parameter):
            parameter.data = parameter.data.to(dtype)


def prepare(model: Module) -> None:
    """Make a model whose trained parameters are in floating point known as such to transformers.

    Its Trainer refuses every model with quantised weights that has no adapter, unless its quantiser says that it can be
    trained (`transformers.trainer_utils.validate_quantization_for_training`). And ``save_pretrained`` reverts what was
    done to weights when they were loaded: dequantised ones would be quantised again, in files whose config.json says
    nothing of it, and for bitsandbytes it cannot (5.23). Without these conversions it saves what is in memory.

    On CPUs with AVX512-BF16, bitsandbytes would put codes into another order at the first evaluation, and round their
    scales to bfloat16 (0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.__dict__["support_avx512bf16_for_cpu"] = False
    for inner in pretrained(model):
        quantizer: Any = getattr(inner, "hf_quantizer", None)
        if quantizer is not None and not getattr(quantizer, "is_qat_trainable", False):
            kind = type(quantizer)
            quantizer.__class__ = type(kind.__name__, (kind,), {"is_qat_trainable": True})  # of this model alone
        conversions = getattr(inner, "_weight_conversions", None)
        if conversions and any(map(_of_quantizer, conversions)):
            from transformers.conversion_mapping import get_model_conversion_mapping

            own = get_model_conversion_mapping(inner, add_legacy=False)
            kept = []
            for conversion in conversions:
                targets = conversion.target_patterns
                if _of_quantizer(conversion):
                    kept += [c for c in own if c.target_patterns == targets and hasattr(c, "operations")]
                else:
                    kept.append(conversion)
            inner._weight_conversions = kept


def _of_quantizer(conversion: Any) -> bool:
    return any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", None) or ())


def pretrained(model: Module) -> list[Any]:
    """The models of transformers in a model, which may be wrapped."""
    return [module for module in model.modules() if hasattr(module, "base_model_prefix") and hasattr(module, "config")]


def stored_tensors(owner: Module) -> Mapping[str, torch.Tensor]:
    """The codes of a module's weight with their scales, as the module saves them: bitsandbytes holds scales outside of
    parameters."""
    import torch

    return {name: tensor for name, tensor in owner.state_dict().items() if isinstance(tensor, torch.Tensor)}
