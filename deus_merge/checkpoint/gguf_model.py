"""What transformers makes of a GGUF file: config, tokenizer, and which tensor of the model each of the file's is."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.errors import CheckpointError
from ..core.text import some_of
from ..core.units import dtype_name
from .gguf_header import CONVERT, GgufHeader, GgufTensor

if TYPE_CHECKING:
    import torch

_F32, _F16 = 0, 1  # types of tensors
_FACTORS = "rope_freqs.weight"
#: Llama 3's scaling of rotary frequencies but for its factor. A file has only what follows from it, as a tensor.
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class GgufModel:
    """The model that a GGUF file stands for.

    Attributes:
        config: Its config.json.
        dtype: Its dtype: float32 if all tensors of the file are, float16 if all others are, else bfloat16.
        tensors: The tensors of the file, by the names of the model's.
        shapes: The shapes of the model's tensors.
        processor: What makes the file's values the model's: a `TensorProcessor` of transformers.
    """

    config: dict
    dtype: str
    tensors: Mapping[str, GgufTensor]
    shapes: Mapping[str, tuple[int, ...]]
    processor: Any


def described(path: Path, header: GgufHeader) -> GgufModel:
    """Find out what transformers makes of a file, from its header.

    Raises:
        CheckpointError: an architecture, a tensor or a setting that has no counterpart in transformers, or a tensor of
            the model that the file lacks; the message names it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if header.metadata.get("split.count", 0) not in (0, 1):
        hint = "join its parts: llama-gguf-split --merge first-part.gguf whole.gguf"
        raise CheckpointError("a part of a GGUF file", where=path, expected="a whole file", hint=hint)
    architecture = str(header.metadata.get("general.architecture"))
    with as_checkpoint_error(path, f"the architecture {architecture!r}"):
        from transformers import modeling_gguf_pytorch_utils as reader

        config = AutoConfig.from_pretrained(str(path.parent), **_reader_options(path))
        known = {architecture, config.model_type} & {*reader.GGUF_SUPPORTED_ARCHITECTURES}
        if not known or (architecture in _newly_read() and architecture not in reader.TENSOR_PROCESSORS):
            raise ValueError("transformers reads it by a newer way, which is not followed here")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        processor = reader.TENSOR_PROCESSORS.get(architecture, reader.TensorProcessor)(config=config.to_dict())
        children = tuple((name, _Names(config, child.state_dict())) for name, child in model.named_children())
        names = reader.get_gguf_hf_weights_map(_Names(config, model.state_dict(), children), processor)  # pyright: ignore
    dtype = _dtype(header)
    config.architectures, config.dtype = [type(model).__name__], dtype_name(dtype)
    if scaling := _rope_scaling(path, header, config):
        config.rope_parameters = {**config.rope_parameters, **scaling}
    tensors = {names.get(name, ""): tensor for name, tensor in header.tensors.items() if name != _FACTORS}
    shapes = {name: tuple(tensor.shape) for name, tensor in _parameters(model).items()}
    _check(path, header, names, tensors, shapes)
    as_json = json.loads(config.to_json_string())
    for name in ("_name_or_path", "_model_name_or_path"):  # the name of the original
        as_json.pop(name, None)
    return GgufModel(as_json, dtype, tensors, shapes, processor)


def other_files(path: Path, header: GgufHeader, config: Mapping[str, Any]) -> dict[str, bytes]:
    """The files next to the weights: the tokenizer, if the file has one, and the generation config.

    Args:
        path: The file.
        header: Its header.
        config: The model's config.json.

    Raises:
        CheckpointError: transformers cannot convert the tokenizer.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    with tempfile.TemporaryDirectory() as name, as_checkpoint_error(path, "the tokenizer"):
        folder = Path(name)
        GenerationConfig.from_model_config(AutoConfig.for_model(**config)).save_pretrained(folder)
        if "tokenizer.ggml.model" in header.metadata:
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **_reader_options(path))
            tokenizer.init_kwargs.pop("local_files_only", None)  # an argument of this call only
            tokenizer.save_pretrained(folder)
            _drop_new_tokens(folder / "tokenizer.json", header.metadata["tokenizer.ggml.tokens"])
        return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def _drop_new_tokens(file: Path, count: Any) -> None:
    """Drop tokens that transformers adds to those of the GGUF file (``<|endoftext|>``): they have no embeddings."""
    content = json.loads(file.read_text(encoding="utf-8"))
    added = [token for token in content["added_tokens"] if token["id"] < count]
    if len(added) < len(content["added_tokens"]):
        content["added_tokens"] = added
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def _reader_options(path: Path) -> dict[str, Any]:
    """Arguments of transformers' ``from_pretrained`` next to the file's folder."""
    return {"gguf_file": path.name, "local_files_only": True}


@contextlib.contextmanager
def as_checkpoint_error(path: Path, what: str) -> Iterator[None]:
    """Whatever transformers raises about a file, as a `CheckpointError` that names what cannot be mapped."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # it expects files as converters write them, and checks little
        got = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"transformers cannot map {what} of this GGUF file", where=path, got=got, hint=CONVERT
        ) from error


def _newly_read() -> Mapping[str, object]:
    """The architectures whose values transformers changes elsewhere, if its version does."""
    try:
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
    except ImportError:
        return {}
    return GGUF_ARCHS


class _Names(NamedTuple):
    """What `get_gguf_hf_weights_map` reads of a model. It would visit every module, in quadratic time."""

    config: Any
    names: Mapping[str, torch.Tensor]
    children: tuple[tuple[str, Any], ...] = ()

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        return self.names

    def named_children(self) -> tuple[tuple[str, Any], ...]:
        return self.children


def _parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model, each tied one once."""
    parameters = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - parameters.keys()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _dtype(header: GgufHeader) -> str:
    types = {tensor.type for tensor in header.tensors.values()}
    return "F32" if types <= {_F32} else "F16" if types <= {_F32, _F16} else "BF16"


def _check(
    path: Path,
    header: GgufHeader,
    names: Mapping[str, str],
    tensors: Mapping[str, GgufTensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Each tensor of the file must be one of the model's, and each of the model's one of the file's."""
    stacked = [name for name, tensor in header.tensors.items() if len(tensor.shape) > 2]
    unknown = [name for name in header.tensors if names.get(name) not in shapes and name != _FACTORS]
    if stacked or unknown:
        what = "a stack of experts is not taken apart" if stacked else "it has no counterpart in transformers"
        raise CheckpointError(f"tensor {(stacked or unknown)[0]!r}: {what}", where=path, hint=CONVERT)
    if missing := [name for name in shapes if name not in tensors]:
        got = f"{len(tensors)} of {len(shapes)} tensors, without {some_of(missing)}"
        raise CheckpointError("the GGUF file lacks tensors of the model", where=path, got=got, hint=CONVERT)
    for name, tensor in tensors.items():
        if math.prod(tensor.shape) != math.prod(shapes[name]):
            raise CheckpointError(
                f"tensor {tensor.name!r} does not fit the model's {name}",
                where=path,
                expected=str(list(shapes[name])),
                got=str(list(tensor.shape)),
                hint=CONVERT,
            )


def _rope_scaling(path: Path, header: GgufHeader, config: Any) -> dict[str, object]:
    """Llama 3's scaling of rotary frequencies, which transformers leaves out. Any other that it leaves out is refused.

    The file has factors that frequencies are divided by. That they are Llama 3's is checked against transformers'.
    """
    import numpy as np
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    key = f"{header.metadata.get('general.architecture')}.rope.scaling.type"
    read = getattr(config, "rope_parameters", None) or {}
    kind = header.metadata.get(key, "none")
    if kind != "none" and read.get("rope_type") in (None, "default"):
        raise CheckpointError(
            f"transformers does not read {key} of a GGUF file", where=path, expected="none", got=kind, hint=CONVERT
        )
    if (tensor := header.tensors.get(_FACTORS)) is None:
        return {}
    factors = np.fromfile(path, "<f4", math.prod(tensor.shape), offset=tensor.offset)  # (d/2,)
    scalings = [{**_LLAMA3, "factor": factor} for factor in (1.0, float(factors.max()))]
    frequencies = []
    with as_checkpoint_error(path, f"tensor {_FACTORS!r}"):
        for scaling in scalings:
            scaled = copy.deepcopy(config)
            scaled.rope_parameters = {**read, **scaling}
            frequencies.append(ROPE_INIT_FUNCTIONS["llama3"](scaled, "cpu")[0].numpy())  # (d/2,)
        if not np.allclose(factors, frequencies[0] / frequencies[1], rtol=1e-4):
            raise ValueError("a scaling of rotary frequencies that is not Llama 3's")
    return scalings[1] if factors.max() > 1 else {}
