"""A model with a LoRA adapter: peft merges each adapted tensor when it is read; the model is never loaded."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..core.errors import CheckpointError
from ..core.tensors import StoredTensor
from .adapter import CONFIG, Adapted, Adapter
from .quantized import is_packed, quantization_name, quantized_tensors
from .reader import Checkpoint
from .tensor_source import FileStamp, TensorSource, stamp

if TYPE_CHECKING:
    import torch

#: the options that peft's arithmetic depends on; ranks are known from the shapes
_OPTIONS = ("lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out", "init_lora_weights")


class LoraSource:
    """A model with an adapter merged into it (`TensorSource`). Pickles.

    Merged tensors are read in float32 (float64 where the model is stored so), not yet rounded to the model's dtype.
    A head that was tied to the embeddings becomes a tensor of its own if the adapter changes only one of the two.

    Args:
        base: The model.
        folder: The adapter's folder.
        side_files: The files next to the weights, if they are not those of the model.

    Raises:
        CheckpointError: peft is not installed; or as `Adapter`.

    Reference: Hu et al., arXiv 2106.09685; the arithmetic is peft's.
    """

    def __init__(self, base: TensorSource, folder: Path, side_files: Mapping[str, bytes | Path] | None = None):
        adapter = Adapter(folder)
        self.base, self.folder = base, folder
        self.side_files = base.side_files if side_files is None else side_files
        quantized = quantized_tensors(base.tensors, base.config)
        _check_plain(base, [name for name in quantized if is_packed([name])])  # no adapter finds its tensors there
        self._changes = adapter.changes(base.tensors, base.where)
        _check_plain(base, [change.base for change in self._changes.values() if change.base in quantized])
        if importlib.util.find_spec("peft") is None:
            hint = 'pip install "deus-merge[lora]"'
            raise CheckpointError("adapters are merged by peft, which is not installed", where=folder, hint=hint)
        digest = hashlib.sha256(b"deus-merge lora 1\n" + base.fingerprint.encode())
        digest.update(hashlib.sha256(adapter.config_bytes).digest())
        digest.update(adapter.header.size.to_bytes(8, "little") + adapter.header.digest)
        self.fingerprint = digest.hexdigest()
        self._adapter = Checkpoint(folder, adapter.options, [adapter.header], self.fingerprint)
        derived = {
            name: replace(base.tensors[change.base], name=name, derived=True, quantization=None)
            for name, change in self._changes.items()
        }
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType({**base.tensors, **derived})
        unties = len(self.tensors) > len(base.tensors)
        self.config = {**base.config, "tie_word_embeddings": False} if unties else base.config
        self._last: tuple[str, torch.Tensor] | None = None

    def __getstate__(self) -> dict:  # read-only views of mappings do not pickle, and the cache need not
        return self.__dict__ | {"tensors": dict(self.tensors), "_last": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, tensors=MappingProxyType(state["tensors"]))

    @property
    def where(self) -> str:
        return f"{self.base.where}+{self.folder}"

    @property
    def folders(self) -> tuple[Path, ...]:
        return (*self.base.folders, self.folder)

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.base.files, *self._adapter.files, self.folder / CONFIG)

    def stamp(self) -> list[FileStamp]:
        return [*self.base.stamp(), *stamp((*self._adapter.files, self.folder / CONFIG))]

    @property
    def provenance(self) -> Mapping[str, object]:
        return {"base": dict(self.base.provenance), "adapter": str(self.folder)}

    def read(self, name: str) -> torch.Tensor:
        change = self._changes.get(name)
        if change is None:
            return self.base.read(name)
        if change.module is None:
            return self._start(name)
        merged_weight, merged_bias = self._merged(change.module, bias=name != change.module.weight)
        merged = merged_weight if name == change.module.weight else merged_bias
        assert merged is not None
        return merged

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of `read`: the tensor is merged once, and cached until its last row has been read."""
        if name not in self._changes:
            return self.base.slice(name, start, stop)
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, self.read(name))
        rows = self._last[1][start:stop]
        if stop >= self.tensors[name].shape[0]:
            self._last = None
        return rows

    def prefetch(self, names: Iterable[str]) -> None:
        for name in names:
            change = self._changes.get(name)
            if change is None or change.whole is None:
                self.base.prefetch([change.base if change else name])
            if change is not None:
                parts = change.module.parts.values() if change.module else ()
                self._adapter.prefetch([n for n in (change.whole, *parts) if n])

    def root(self, name: str) -> tuple[TensorSource, str]:
        return self.base.root(self._changes[name].base if name in self._changes else name)

    def bound(self, results: Mapping[str, TensorSource]) -> LoraSource:
        own = copy.copy(self)
        own.base = self.base.bound(results)
        return own

    def workspace(self, name: str, minimum: bool = False) -> int:
        if name not in self._changes:
            return self.base.workspace(name, minimum)
        # the weight, B A as it is and scaled, and their sum in float32
        return 16 * math.prod(self.tensors[name].shape) + self.base.workspace(self._changes[name].base, minimum)

    def _start(self, name: str) -> torch.Tensor:
        """A tensor before the low-rank change, in memory that may be written to."""
        import torch

        change = self._changes.get(name)
        if change is None:
            stored = self.base.read(name)
        else:
            stored = self._adapter.read(change.whole) if change.whole else self.base.read(change.base)
        return stored.to(torch.float64 if stored.dtype == torch.float64 else torch.float32)

    def _merged(self, module: Adapted, bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A module's weight, (out, in) or as stored, and, if ``bias``, its bias, (out,), merged by peft."""
        import torch
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

        weight = self._start(module.weight)
        layer = _layer(module.kind, weight, self._start(module.weight[: -len("weight")] + "bias") if bias else None)
        parts = {
            f"{module.name}.{part}": self._adapter.read(stored)
            for part, stored in module.parts.items()
            if bias or part != "lora_B.bias"
        }
        rank = next(len(tensor) for name, tensor in parts.items() if name.endswith(("_A", "_A.weight")))
        root = torch.nn.Module()  # a model of this layer alone, under its full name, which peft's patterns match
        *path, last = module.name.split(".")
        holder = root
        for name in path:
            holder.add_module(name, torch.nn.Module())
            holder = holder.get_submodule(name)
        holder.add_module(last, layer)
        options = {key: self._adapter.config[key] for key in _OPTIONS if key in self._adapter.config}
        if options.get("init_lora_weights") not in ("pissa", "olora"):  # these subtract their start from the weight
            options["init_lora_weights"] = False
        config = LoraConfig(r=rank, target_modules=[module.name], lora_bias=bias, **options)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # about the modules that are not in this one layer
            try:
                inject_adapter_in_model(config, root)
                missed = set_peft_model_state_dict(root, parts)
                adapted: Any = root.get_submodule(module.name)  # a LoraLayer
            except Exception as error:  # a malformed adapter can make peft raise anything
                reason = f"{type(error).__name__}: {error}"
                raise CheckpointError(f"peft cannot adapt {module.name}", where=self.folder, got=reason) from error
            if missed.unexpected_keys or any("lora_" in key for key in missed.missing_keys):
                raise CheckpointError(f"peft cannot load the weights of {module.name}", where=self.folder, got=missed)
            adapted.merge()
        merged = adapted.get_base_layer()
        return merged.weight, merged.bias if bias else None


def _check_plain(base: TensorSource, quantized: Sequence[str]) -> None:
    """Refuse an adapter that would change quantised tensors.

    Raises:
        CheckpointError: there are some.
    """
    if quantized:
        raise CheckpointError(
            f"an adapter cannot be added to {quantized[0]}: it is quantised ({quantization_name(base.config)})",
            where=base.where,
            expected="a model in floating point",
            hint="add the adapter to the model that was quantised",
        )


def _layer(kind: str, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Module:
    """A module of this kind with these parameters: weight (rows, columns), bias (outputs,)."""
    import torch
    from transformers.pytorch_utils import Conv1D

    rows, columns = weight.shape
    with torch.device("meta"):  # its own weight is replaced
        if kind == "embedding":
            layer = torch.nn.Embedding(rows, columns)
        elif kind == "transposed":
            layer = Conv1D(columns, rows)
        else:
            layer = torch.nn.Linear(columns, rows)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    if kind != "embedding":
        layer.register_parameter("bias", None if bias is None else torch.nn.Parameter(bias, requires_grad=False))
    return layer
