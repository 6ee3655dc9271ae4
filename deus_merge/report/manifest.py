"""``deus_merge.json``: what was made from what, how well it went, and checksums of every byte that was written.

Its last line is the sha256 of all bytes before that line, so a manifest that was damaged is no manifest.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path

from .. import __version__
from ..checkpoint.header import read_small
from ..config import layer_lists
from ..errors import CheckpointError, VerifyError
from ..plan import BlockPlan, Plan, PlannedTensor

MANIFEST = "deus_merge.json"
RECIPE = "deus_merge.yml"
#: 2 added ``weights``, ``dtype``, ``layer_lists``, checksums, dtype and shape of tensors, and the seal; 1 is still read
FORMAT = 2
_PARTS = {"sources": list, "layers": list, "new_layers": list, "tensors": dict, "files": dict, "donor": int}
_SEAL = ' "sha256": "%s"\n}\n'


def manifest(
    plan: Plan, files: Mapping[str, bytes], diagnostics: Mapping[int, list[dict]], options: Mapping[str, object]
) -> dict:
    """The manifest as JSON data, without checksums of the tensors: `sealed` adds them.

    Args:
        plan: What was run.
        files: What stands beside the weights: name -> bytes; their sha256 go in.
        diagnostics: Per block index, what its method said of each tensor.
        options: Of the run: device, threads, seconds.

    Returns:
        ``format``, ``plan_hash``, ``versions``, ``sources``, ``new_layers``, ``new_parameters`` (exact names to train),
        ``layers`` with origin and diagnostics, ``tensors``: how each came about, ``files``: sha256 of each, and
        ``weights``: size and sha256 of the header of each safetensors file.
    """
    layers = plan.layer_map()
    for block in plan.blocks:
        for layer in block.layers:
            layers[layer]["diagnostics"] = diagnostics.get(block.index, [])
    view = plan.models[plan.donor].view
    return {
        "format": FORMAT,
        "deus_merge": __version__,
        "plan_hash": plan.hash,
        "versions": _versions(),
        "options": dict(options),
        "donor": plan.donor,
        "sources": [
            {
                "model": str(m.ref),
                "folder": str(m.checkpoint.folder),
                "fingerprint": m.checkpoint.fingerprint,
                "layers": m.view.num_layers,
            }
            for m in plan.models
        ],
        "num_layers": plan.num_layers,
        "dtype": plan.config.get("dtype") or plan.config.get("torch_dtype"),
        "layer_lists": sorted(layer_lists(plan.config, view.layers_path)),
        "function_preserving": plan.function_preserving,
        "new_layers": list(plan.new_layers),
        "new_parameters": list(plan.new_parameters),
        "layers": layers,
        "tensors": {t.task.name: _origin(block, t) for block in plan.blocks for t in block.tensors},
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())},
        "weights": {
            s.filename: {"bytes": s.size, "header_sha256": hashlib.sha256(s.header).hexdigest()} for s in plan.shards
        },
        "warnings": list(plan.warnings),
    }


def sealed(record: Mapping, checksums: Mapping[str, str] | None = None) -> bytes:
    """The manifest's file.

    Args:
        record: As `manifest` makes it.
        checksums: XXH3-128 of each tensor; None where nobody took them.
    """
    if checksums is not None:
        tensors = {name: {**origin, "xxh3_128": checksums[name]} for name, origin in record["tensors"].items()}
        record = {**record, "tensors": tensors}
    text = json.dumps({k: v for k, v in record.items() if k != "sha256"}, indent=1, ensure_ascii=False)
    body = text.removesuffix("\n}").encode() + b",\n"
    return body + (_SEAL % hashlib.sha256(body).hexdigest()).encode()


def read_manifest(folder: Path) -> dict:
    """The manifest of a finished output.

    Raises:
        CheckpointError: there is none.
        VerifyError: it is damaged, or not one this version reads.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise CheckpointError("no manifest", where=path, hint="only folders that deus-merge wrote have one")
    try:
        raw = read_small(path)
        data = json.loads(raw.decode())
    except CheckpointError as error:
        raise VerifyError(error.message, where=path, got=error.got) from None
    except (ValueError, RecursionError) as error:
        raise VerifyError("the manifest is not JSON", where=path, got=error) from None
    if not isinstance(data, dict) or data.get("format") not in (1, FORMAT):
        got = data.get("format") if isinstance(data, dict) else None
        raise VerifyError("not a manifest this version reads", where=path, expected=f"format {FORMAT}", got=got)
    if lacking := [key for key, kind in _PARTS.items() if not isinstance(data.get(key), kind)]:
        raise VerifyError("the manifest is not whole", where=path, expected=", ".join(_PARTS), got=f"no {lacking[0]}")
    if data["format"] == FORMAT:
        seal = len(_SEAL % "") + 64
        if raw[-seal:] != (_SEAL % hashlib.sha256(raw[:-seal]).hexdigest()).encode():
            raise VerifyError("the manifest is not as it was written", where=path)
    return {"layer_lists": [], "weights": {}, **data}


def _origin(block: BlockPlan, tensor: PlannedTensor) -> dict:
    data = {"action": tensor.action, "dtype": tensor.dtype, "shape": list(tensor.task.shape)}
    if tensor.action == "copy":
        info = tensor.inputs[tensor.source]
        data |= {"model": block.sources[tensor.source].model, "tensor": info.name}
    return data


def _versions() -> dict[str, str]:
    names = ("torch", "safetensors", "transformers", "POT", "scipy", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
