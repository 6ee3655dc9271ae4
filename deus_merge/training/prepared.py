"""A grown model, loaded as its training needs it."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from ..checkpoint import Checkpoint
from ..checkpoint.quantized import quantization
from ..core.errors import TrainingError, nearest
from ..models.silence import no_progress_bars
from ..models.tokenizer.files import TOKENIZER_FILES
from ..report.manifest import Manifest
from .checkpointing import enable_checkpointing
from .freeze import Trainable, freeze_base, is_normed, new_layers, new_names, read_training
from .names import parameters_of
from .quantized import DEQUANTIZING, cast, is_codes

if TYPE_CHECKING:
    import torch
    from torch.nn import Module

#: How the frozen base is held in memory
BASES = ("bfloat16", "float32", "8bit", "4bit")


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare`: ``model, tokenizer = prepare(...)`` takes it apart. ``str()`` describes it in one line.

    Attributes:
        model: The model, on its device.
        tokenizer: Its tokenizer; None where the folder has none.
        trainable: What trains.
        base: How the base is held: one of `BASES`, or the name of the format that it is stored in.
        autocast: Whether the model's forward pass runs under ``torch.autocast`` in bfloat16.
    """

    model: Any
    tokenizer: Any
    trainable: Trainable
    base: str
    autocast: bool

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer))

    def __str__(self) -> str:
        return f"{self.trainable}; base in {self.base}{', computed in bfloat16' if self.autocast else ''}"


def prepare(
    path: Path | str,
    *,
    base: str | None = None,
    all_layers: bool = False,
    generation: int = -1,
    device: torch.device | str | None = None,
    checkpointing: bool = True,
    attention: str | None = None,
    auto_class: Any = None,
) -> Prepared:
    """Load a grown model, ready to train its new layers: in your own loop, by transformers' Trainer, or trl.

    The base is frozen in bfloat16 (or 8 or 4 bits), and the new layers are float32, so that small steps count. The
    model's own forward pass runs under ``torch.autocast`` in bfloat16: your loop, `find_lr` and ``generate`` need
    nothing more, and a Trainer may have ``bf16=True`` or not. With gradient checkpointing no layer below the lowest new
    one is computed again; where a Trainer enables checkpointing by itself, `watch` prevents it.

    Args:
        path: The output folder, with its manifest; or a trained one.
        base: How the frozen base is held: ``bfloat16``, ``float32`` (nothing is then computed in bfloat16), or ``8bit``
            or ``4bit`` (NF4) by bitsandbytes, which leaves out the new layers and the head. None for ``bfloat16``, or
            for the format that the base is stored in, if it is stored quantised.
        all_layers: Whether the base trains, too, all in float32: as LLaMA-Pro's authors fine-tune after their continued
            pre-training. Save it with ``save_trained(..., all_layers=True)``.
        generation: As for `new_parameters`.
        device: The device; None for the GPU if there is one (that of ``LOCAL_RANK``), else the CPU.
        checkpointing: Whether layers keep their inputs alone, and are computed again in the backward pass.
        attention: As ``attn_implementation`` of ``from_pretrained``; None lets transformers choose.
        auto_class: The class to load with; None for ``transformers.AutoModelForCausalLM``.

    Returns:
        Model and tokenizer, with what trains.

    Raises:
        CheckpointError, TrainingError: as `freeze_base`; an unknown ``base``, or one that does not go with the model as
            it is stored, or with ``all_layers``; or the model has no gradient checkpointing, or does not compute in
            several dtypes.
    """
    import torch
    import transformers

    path = Path(path)
    manifest = read_training(path)
    if not path.is_dir():
        raise TrainingError("not a folder", where=path, expected="the output folder", hint="name the manifest's folder")
    checkpoint = Checkpoint.open(path)
    held = _held(base, quantization(checkpoint.config), all_layers, path)
    place = _device(device)
    # float32 in files would lose bits in bfloat16: the whole model is then loaded in it, and the base is cast after it
    new = [*manifest.model_tensors] if all_layers else [*new_names(manifest, generation)]
    wide = held == "float32" or any(
        name in checkpoint.tensors and checkpoint.tensors[name].dtype != "BF16" for name in new
    )
    loader = transformers.AutoModelForCausalLM if auto_class is None else auto_class
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if held in BASES:
        options["dtype"] = torch.float32 if wide else torch.bfloat16
    if held in ("4bit", "8bit") or held not in BASES or place.type != "cpu":
        options["device_map"] = {"": place}
    if held in ("4bit", "8bit"):
        options["quantization_config"] = _bitsandbytes(held, _left_out(loader, path, manifest, generation))
    elif dequantizing := DEQUANTIZING.get(held):
        options["quantization_config"] = getattr(transformers, dequantizing)(dequantize=True)
    with no_progress_bars():
        model = loader.from_pretrained(path, **options)
    if all_layers:
        trainable = _train_all(model, manifest)
    else:
        trainable = freeze_base(model, path, generation)
        if held in ("4bit", "8bit") and not trainable.quantized_tensors:
            raise TrainingError(
                "bitsandbytes quantises nothing in this model",
                where=path,
                expected="linear layers outside of the new layers",
                got=type(model).__name__,
                hint="base='bfloat16'",
            )
    cast((p for p in model.parameters() if p.requires_grad), torch.float32)
    if held in BASES and held != "float32" and wide:
        cast(_frozen(model), torch.bfloat16)
    if place.type == "cpu":  # there, LayerNorm takes no float32 hidden states with bfloat16 weights
        norms = (module for module in model.modules() if isinstance(module, torch.nn.LayerNorm))
        cast((parameter for norm in norms for parameter in norm.parameters()), torch.float32)
    if held != "float32":
        _autocast(model)
    if checkpointing:
        enable_checkpointing(model)
    model.train()
    _check_computes(model, path, held)
    tokenizer = None
    if any((path / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return Prepared(model, tokenizer, dataclasses.replace(trainable, dtype="float32"), held, held != "float32")


def _held(base: str | None, section: Any, all_layers: bool, path: Path) -> str:
    """How the base is to be held: one of `BASES`, or the name of the format that it is stored in."""
    if base is not None and base not in BASES:
        raise TrainingError("unknown base", expected=" | ".join(BASES), got=base, hint=nearest(base, BASES))
    if section is not None:
        method = str(section.get("quant_method"))
        if base is not None or all_layers:
            raise TrainingError(
                "the base is stored quantised",
                where=path / "config.json",
                expected="base=None: it is loaded as it is stored, and stays frozen",
                got=f"quant_method {method}, " + ("all_layers=True" if all_layers else f"base={base!r}"),
                hint="write the base in floating point (merge_method: passthrough, dtype: bfloat16), and grow that",
            )
        return method
    if all_layers and base in ("4bit", "8bit"):
        hint = "leave base out, or train the new layers alone"
        raise TrainingError("quantised weights do not train", expected="base=None", got=f"base={base!r}", hint=hint)
    return base or "bfloat16"


def _device(device: torch.device | str | None) -> torch.device:
    import torch

    if device is not None:
        return torch.device(device)
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )


def _bitsandbytes(held: str, left_out: list[str]) -> Any:
    import torch
    import transformers

    if held == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left_out)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=left_out,
    )


def _left_out(loader: Any, path: Path, manifest: Manifest, generation: int) -> list[str]:
    """The modules that bitsandbytes must not quantise, by their names in the loaded model, which may begin otherwise
    than those in files: the new layers, the head, and every module whose weight is tied.

    Raises:
        TrainingError: experts are parameters with three axes, which it cannot quantise.
    """
    import torch
    import transformers

    with torch.device("meta"):
        model = loader.from_config(transformers.AutoConfig.from_pretrained(path))
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found = parameters_of(model, manifest).base
    new = [*new_names(manifest, generation)]
    layers = []
    for layer in new_layers(manifest, generation):
        within = [names[id(found[n])][0] for n in new if n.startswith(manifest.prefix_of(layer)) and n in found]
        layers.append(os.path.commonprefix(within).rpartition(".")[0])
    experts = next((n for n, p in found.items() if p.ndim > 2 and ".experts." in n and n not in new), None)
    if experts is not None:
        raise TrainingError(
            "bitsandbytes quantises linear layers, and the experts of this model are none once it is loaded",
            where=experts,
            expected="base='bfloat16'",
            got="base='4bit' or '8bit'",
        )
    head = model.get_output_embeddings()
    tied = {name for same in names.values() if len(same) > 1 for name in same}
    heads = {name for name, module in model.named_modules() if module is head}
    return [*layers, *sorted(heads | {name.rpartition(".")[0] for name in tied})]


def _train_all(model: Module, manifest: Manifest) -> Trainable:
    """Let every weight train."""
    parameters_of(model, manifest)  # the model is the manifest's
    trained = [*model.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    count = sum(parameter.numel() for parameter in trained)
    normed = is_normed(model, manifest, new_names(manifest))
    return Trainable(tuple(range(manifest.num_layers)), len(trained), count, 0, 0, normed=normed)


def _frozen(model: Module) -> Iterator[torch.nn.Parameter]:
    """Frozen parameters, but for those that transformers keeps in float32."""
    kept = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not is_codes(parameter) and not any(part in name for part in kept):
            yield parameter


def _check_computes(model: Any, path: Path, held: str) -> None:
    """Check that a model computes in several dtypes: a few that transformers has do not.

    Raises:
        TrainingError: it does not.
    """
    import torch

    cuda = range(torch.cuda.device_count())
    try:
        with torch.no_grad(), torch.random.fork_rng(cuda):
            model(input_ids=torch.zeros(1, 8, dtype=torch.long, device=model.device))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise TrainingError(
            f"the model does not compute with its base in {held} and new layers in float32",
            where=path,
            expected="a family whose implementation in transformers takes both",
            got=str(error).partition("\n")[0],
            hint="base='float32'; or load it yourself, and call freeze_base",
        ) from error


def _autocast(model: Any) -> None:
    """Let a model's own forward pass run under autocast, as accelerate does it."""
    import torch

    forward = model.forward
    plain = getattr(forward, "__func__", None)  # none where accelerate put hooks around it

    @functools.wraps(forward if plain is None else plain)
    def computed(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            return forward(*args, **kwargs) if plain is None else plain(self, *args, **kwargs)

    model.forward = MethodType(computed, model)
