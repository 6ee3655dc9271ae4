"""What a model is made of, and how alike its neighbouring layers are. Reads one pair of layers at a time."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.reader import TensorSource
from ..checkpoint.storage import PLAIN, Access
from ..core.errors import ArchitectureError, CheckpointError, DeusMergeError
from ..models.reference import ModelRef
from ..models.source import SourceModel
from .lineage import generations
from .manifest import MANIFEST, read_manifest


def summary(model: str, access: Access = PLAIN) -> dict:
    """Family, depth, heads and sizes of a model (a folder or a hub id), and which of its layers growths put in, the
    oldest first, as JSON data."""
    source = SourceModel.open(ModelRef(model), {}, access)
    checkpoint, view = source.checkpoint, source.view
    config = checkpoint.config
    parameters = sum(math.prod(t.shape) for t in checkpoint.tensors.values())
    facts = {
        "model": model,
        "family": view.architecture.family if view.architecture else f"{view.model_type} (by tensor names)",
        "layers": view.num_layers,
        "hidden_size": config.get("hidden_size"),
        "intermediate_size": config.get("intermediate_size"),
        "heads": config.get("num_attention_heads"),
        "key_value_heads": config.get("num_key_value_heads"),
        "vocabulary": config.get("vocab_size"),
        "tied_embeddings": config.get("tie_word_embeddings"),
        "dtypes": ", ".join(sorted({t.dtype for t in checkpoint.tensors.values()})),
        "parameters": parameters,
        "bytes": sum(t.nbytes for t in checkpoint.tensors.values()),
        "files": len(checkpoint.files),
        "grown": _growths(checkpoint, view.num_layers),
    }
    roles = []
    for role, name in view.layers[0].items():
        spec = view.spec(role)
        roles.append(
            {
                "role": role,
                "tensor": name,
                "shape": list(checkpoint.tensors[name].shape),
                "reads": spec.in_space if spec else None,
                "writes": spec.out_space if spec else None,
            }
        )
    return {k: v for k, v in facts.items() if v is not None} | {"roles": roles}


def _growths(checkpoint: TensorSource, layers: int) -> str | None:
    if not isinstance(file := checkpoint.side_files.get(MANIFEST), Path):
        return None
    try:
        record = read_manifest(file)
        if record.get("num_layers") != layers:
            raise CheckpointError(f"it tells of {record.get('num_layers')} layers")
        growths = generations(record)
    except DeusMergeError as error:
        return f"not known, its {MANIFEST} cannot be used: {error.message}"
    told = []
    for growth in growths:
        new = ", ".join(map(str, growth["new_layers"])) or "none"
        told.append(f"{new} (trained)" if growth["trained"] else new)
    return "; then ".join(told) if any(growth["new_layers"] for growth in growths) else None


def adjacent_similarity(model: str, access: Access = PLAIN) -> Iterator[dict]:
    """For each pair of neighbouring layers and each projection: how alike, and how much alignment adds.

    Yields:
        ``layers`` (i, i+1) and ``roles``: role -> ``cost`` (transport cost between unit rows, exact assignment),
        ``plain`` and ``aligned``: mean cosine of rows of A and B in their own order and after the assignment.

    Raises:
        ArchitectureError: the family is not described, so there are no roles.
    """
    import torch

    from ..ot.costs import cost_matrix, unit_rows
    from ..ot.problem import OTProblem
    from ..ot.registry import solver

    source = SourceModel.open(ModelRef(model), {}, access)
    checkpoint, view = source.checkpoint, source.view
    if view.architecture is None:
        raise ArchitectureError(
            f"similarity needs a described family, {view.model_type!r} is none", hint="deus-merge methods lists them"
        )
    roles = [s.role for s in view.architecture.layer if s.in_space]
    for i in range(view.num_layers - 1):
        row: dict[str, dict] = {}
        for role in roles:
            a, b = (checkpoint.read(view.layers[j][role]).to(torch.float32) for j in (i, i + 1))  # (n, d)
            a, b = unit_rows(a), unit_rows(b)
            solution = solver("assignment").solve(OTProblem.uniform(cost_matrix(a, b)))
            moved = solution.coupling.transport_map().to_rows(a)  # (n, d)
            row[role] = {
                "cost": solution.transport_cost,
                "plain": (a * b).sum(1).mean().item(),
                "aligned": (moved * b).sum(1).mean().item(),
            }
        yield {"layers": [i, i + 1], "roles": row}


def check_plotting() -> None:
    """Whether matplotlib, the ``plot`` extra, is there. Raises DeusMergeError."""
    if not importlib.util.find_spec("matplotlib"):
        raise DeusMergeError("plots need matplotlib", hint='pip install "deus-merge[plot]"')


def plot_similarity(rows: list[dict], path: Path) -> None:
    """Draw `adjacent_similarity` with matplotlib (see `check_plotting`): cosine by pair, before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    pairs = [f"{a}–{b}" for a, b in (r["layers"] for r in rows)]
    for index, role in enumerate(rows[0]["roles"]):
        color = f"C{index}"
        axes.plot(pairs, [r["roles"][role]["aligned"] for r in rows], color=color, label=role)
        axes.plot(pairs, [r["roles"][role]["plain"] for r in rows], color=color, linestyle=":")
    axes.set(xlabel="adjacent layers", ylabel="mean cosine of rows", title="solid: aligned, dotted: as they stand")
    axes.tick_params(axis="x", rotation=90)
    axes.legend(ncols=len(rows[0]["roles"]))
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise DeusMergeError(f"the plot cannot be written: {error}", where=path) from None
