"""Which files of a folder hold a model's weights."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from ..core.errors import CheckpointError
from ..core.text import some_of
from .header import parse_json, read_small, refuse_gguf

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_map(folder: Path, index: str, single: str, suffixes: tuple[str, ...]) -> dict[str, str] | None:
    """An index's map from tensor to file name; None without an index.

    Args:
        folder: The model.
        index: The index's name.
        single: The name of the weights in a folder without an index.
        suffixes: Endings of the files that an index may name.

    Raises:
        CheckpointError: malformed, names files outside of the folder, or there is another checkpoint in the folder.
    """
    path = folder / index
    if not os.path.lexists(path):
        return None
    return parse_weight_map(read_small(path), path, os.path.lexists(folder / single) and single, suffixes)


def parse_weight_map(raw: bytes, path: Path, single: str | Literal[False], suffixes: tuple[str, ...]) -> dict[str, str]:
    """The same of an index that was read.

    Args:
        raw: Its content.
        path: Its place, for messages.
        single: A file of the folder that would be the weights without an index; False if it is not there.
        suffixes: As above.

    Raises:
        CheckpointError: as above.
    """
    files = parse_json(raw, path, "index").get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError("the index has no weight_map", where=path, expected="tensor names -> file names")
    for file in dict.fromkeys(v if isinstance(v, str) else repr(v) for v in files.values()):
        _check_file_name(file, path, suffixes)
    if not all(isinstance(v, str) for v in files.values()):
        raise CheckpointError("weight_map is malformed", where=path, expected="tensor names -> file names")
    if single and single not in files.values():
        raise CheckpointError(
            "two checkpoints in one folder",
            where=path.parent,
            expected=f"{single} or {path.name}",
            got="both, and the index does not name the file",
            hint="remove the one that is not needed",
        )
    return files


def _check_file_name(name: str, where: Path, suffixes: tuple[str, ...]) -> None:
    parts = PurePosixPath(name).parts
    leaves = name.startswith("/") or ".." in parts or "\\" in name or re.match(r"[A-Za-z]:", name)
    if leaves or not parts or not name.isprintable():
        raise CheckpointError(
            "an entry is outside of the folder", where=where, expected="a file name", got=repr(name[:200])
        )
    if not name.endswith(suffixes):
        kinds = " or ".join(f"*{suffix}" for suffix in suffixes)
        raise CheckpointError("an entry is not a file of weights", where=where, expected=kinds, got=name[:200])


def single_file(folder: Path) -> str:
    """The name of the one safetensors file of a folder without an index.

    Raises:
        CheckpointError: there is none, or several.
    """
    if os.path.lexists(folder / SINGLE):
        return SINGLE
    return only_file(sorted(entry.name for entry in os.scandir(folder)), folder)


def only_file(names: Sequence[str], folder: Path) -> str:
    """The same for the names of a folder's files.

    Raises:
        CheckpointError: as above.
    """
    if SINGLE in names:
        return SINGLE
    found = [n for n in names if n.endswith(".safetensors")]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            "several safetensors files and no index",
            where=folder,
            expected=f"{SINGLE} or {INDEX}",
            got=some_of(found),
            hint=f"{INDEX} is missing; copy it from where the files came from",
        )
    others = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5"))]
    if others and all(n.endswith(".gguf") for n in others):
        refuse_gguf(folder / others[0])
    raise CheckpointError(
        "no safetensors file",
        where=folder,
        expected=f"{SINGLE} or {INDEX}",
        got=some_of(others) or "neither",
        hint="a pickle is a program: --allow-pickle reads its tensors and runs nothing else"
        if any(n.endswith((".bin", ".pt", ".pth")) for n in others)
        else "only safetensors is read; load the model with transformers and write it with .save_pretrained(new_folder)"
        if others
        else None,
    )
