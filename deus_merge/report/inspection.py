"""Facts about a model, and how similar its neighbouring layers are. One pair of layers is in memory at a time."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..align.packing import Packing, layout_problem
from ..checkpoint.dequantized import quantized_share
from ..checkpoint.reader import TensorSource
from ..checkpoint.storage import LoadOptions
from ..core.errors import ArchitectureError, CheckpointError, DeusMergeError
from ..core.text import plural
from ..core.urls import address_of
from ..models.config_json import section
from ..models.head_layout import layer_heads
from ..models.layer_facts import expand, layer_kinds
from ..models.reference import ModelRef
from ..models.source import SourceModel
from ..plan.training_memory import TrainingSettings, training_memory
from ..plan.training_shape import shape_of_source
from .manifest import MANIFEST, manifest_among
from .manifest_parts import Growth

if TYPE_CHECKING:
    from torch import Tensor

#: sizes of a model -> the keys of config.json, or of its text part, that say them, the usual one first
_SIZES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "ffn_hidden_size"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "vocabulary": ("vocab_size",),
}


def summary(
    model: str, load_options: LoadOptions | None = None, training: TrainingSettings | None = None
) -> dict[str, Any]:
    """Family, depth, heads and sizes of a model, the kinds of its layers, those that growths added, and the memory that
    training the last growth's layers takes, as JSON data.

    Args:
        model: A folder or a hub id.
        load_options: Whether pickled weights may be read, and where downloads are stored.
        training: How new layers are trained; None for the defaults.

    Raises:
        DeusMergeError: the model cannot be read.
    """
    source = SourceModel.open(ModelRef.of(model), {}, load_options)
    checkpoint, view = source.checkpoint, source.view
    config = checkpoint.config
    text = section(config, view.layers_path)
    growths = _growths(checkpoint, view.num_layers)
    shape = shape_of_source(source, growths[-1].new_layers if isinstance(growths, tuple) and growths else ())
    memory = training_memory(shape, training or TrainingSettings())
    facts = {
        "model": str(source.ref),
        "family": view.family.name if view.family else f"{view.model_type} (by tensor names)",
        "layers": view.num_layers,
        **{name: next((text[key] for key in keys if text.get(key) is not None), None) for name, keys in _SIZES.items()},
        "tied_embeddings": config.get("tie_word_embeddings"),
        "dtypes": ", ".join(sorted({t.dtype for t in checkpoint.tensors.values()})),
        "quantized": quantized_share((t.quantization, t.shape) for t in checkpoint.tensors.values()) or None,
        "parameters": shape.parameters,
        "new_parameters": shape.new_parameters or None,
        "bytes": sum(t.nbytes for t in checkpoint.tensors.values()),
        "files": len(checkpoint.files),
        "grown": _in_words(growths),
        "training_memory": memory and memory.describe(),
    }
    kinds = layer_kinds(expand(config, view.layers_path, view.model_type))
    layers = {"roles": _roles(source, 0), "layouts": _layouts(source), "layer_kinds": kinds}
    return {k: v for k, v in facts.items() if v is not None} | layers


def parameter_counts(folder: Path, new_layers: Collection[int]) -> tuple[int, int] | None:
    """The number of a model's parameters, as `summary` counts them, and of those in some layers.

    Args:
        folder: The model.
        new_layers: The layers.

    Returns:
        None where the model cannot be read.
    """
    try:
        shape = shape_of_source(SourceModel.open(ModelRef(address_of(folder) or str(folder)), {}), new_layers)
    except DeusMergeError:
        return None
    return shape.parameters, shape.new_parameters


def _roles(source: SourceModel, layer: int) -> list[dict]:
    """The tensors of a layer, as JSON data."""
    tensors, rows = source.checkpoint.tensors, []
    for role, name in source.view.layers[layer].items():
        spec = source.view.spec(role, layer)
        row = {"role": role, "tensor": name, "shape": list(tensors[name].shape)}
        rows.append(row | {"reads": spec.in_space if spec else None, "writes": spec.out_space if spec else None})
    return rows


def _layouts(source: SourceModel) -> list[dict]:
    """The different sets of tensors that layers have: the layers, their kind in words, and the first one's tensors."""
    layouts: dict[frozenset, list[int]] = {}
    for layer in range(source.view.num_layers):
        layouts.setdefault(frozenset(source.shapes(source.view.layers[layer]).items()), []).append(layer)
    kinds = source.view.kinds or ("",) * source.view.num_layers
    return [
        {"layers": layers, "kind": kinds[layers[0]], "roles": _roles(source, layers[0])} for layers in layouts.values()
    ]


def _growths(checkpoint: TensorSource, layers: int) -> tuple[Growth, ...] | str:
    """The growths that a model's manifest records, the oldest first; or why it cannot be used."""
    try:
        manifest = manifest_among(checkpoint.side_files)
        if manifest is None:
            return ()
        if manifest.num_layers != layers:
            raise CheckpointError(f"it describes {plural(manifest.num_layers, 'layer')}")
    except DeusMergeError as error:
        return f"not known, its {MANIFEST} cannot be used: {error.message}"
    return tuple(manifest.growths)


def _in_words(growths: tuple[Growth, ...] | str) -> str | None:
    """The layers that each growth added; None where there are none."""
    if isinstance(growths, str):
        return growths
    if not any(growth.new_layers for growth in growths):
        return None
    layers_of = [", ".join(map(str, growth.new_layers)) or "none" for growth in growths]
    trained = [" (trained)" if growth.trained else "" for growth in growths]
    return "; then ".join(map("".join, zip(layers_of, trained, strict=True)))


def adjacent_similarity(model: str, load_options: LoadOptions | None = None) -> Iterator[dict]:
    """How similar each pair of neighbouring layers is, projection by projection, before and after an alignment.

    Args:
        model: A folder or a hub id.
        load_options: Whether pickled weights may be read, and where downloads are stored.

    Yields:
        ``layers`` (i, i+1) and ``roles``: role -> ``cost`` (transport cost between unit rows, exact assignment),
        ``plain`` and ``aligned``: mean cosine of rows of A and B in their own order and after the assignment,
        ``chance``: the last one of random matrices of this shape. The roles are those of matrices that both layers have
        in one shape, without experts: there may be thousands.

    Raises:
        ArchitectureError: the family is not described, so there are no roles; or a tensor does not consist of the
            matrices that it should.
    """
    import torch

    from ..ot.costs import unit_rows

    source = SourceModel.open(ModelRef.of(model), {}, load_options)
    if source.view.family is None:
        raise ArchitectureError(
            f"similarity needs a described family, not {source.view.model_type!r}",
            hint="deus-merge methods lists them",
        )
    chance: dict[tuple[int, ...], float] = {}
    upper = _matrices(source, 0)
    for i in range(source.view.num_layers - 1):
        lower, upper = upper, _matrices(source, i + 1)
        row: dict[str, dict] = {}
        for role in (role for role, x in lower.items() if role in upper and upper[role].shape == x.shape):
            a, b = unit_rows(lower[role]), unit_rows(upper[role])  # (n, d)
            cost, aligned = _assigned(a, b)
            if a.shape not in chance:
                generator = torch.Generator().manual_seed(0)
                one, other = (unit_rows(torch.randn(a.shape, generator=generator)) for _ in range(2))  # (n, d)
                chance[a.shape] = _assigned(one, other)[1]
            plain = (a * b).sum(1).mean().item()
            row[role] = {"cost": cost, "plain": plain, "aligned": aligned, "chance": chance[a.shape]}
        yield {"layers": [i, i + 1], "roles": row}


def _assigned(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Transport cost and mean cosine of the rows of b and those of a that an exact assignment gives them.

    Args:
        a, b: Unit rows, (n, d).
    """
    from ..ot.costs import cost_matrix
    from ..ot.problem import OTProblem
    from ..ot.registry import solver

    solution = solver("assignment").solve(OTProblem.uniform(cost_matrix(a, b)))
    moved = solution.coupling.transport_map().to_rows(a)  # (n, d)
    return solution.transport_cost, (moved * b).sum(1).mean().item()


def _matrices(source: SourceModel, layer: int) -> dict[str, Tensor]:
    """The matrices of a layer by role, (rows, columns) each, float32. Experts and opaque tensors are left out."""
    import torch

    checkpoint, view = source.checkpoint, source.view
    names, specs = view.layers[layer], list(view.specs[layer].values())
    shapes = {role: tuple(checkpoint.tensors[name].shape) for role, name in names.items()}
    heads = layer_heads(checkpoint.config, view, layer, shapes)
    if problem := layout_problem(specs, shapes, heads):
        raise ArchitectureError(problem, where=f"layer {layer}")
    packing = Packing(specs, shapes, heads)
    wanted = [p.role for p in packing.specs if p.in_space and not p.opaque and not p.role.startswith("experts.")]
    owners = dict.fromkeys(packing.owner[role] for role in wanted)
    parts = packing.unpack({owner: checkpoint.read(names[owner]).to(torch.float32) for owner in owners})
    return {role: parts[role] for role in wanted if parts[role].ndim == 2}


def similarity_roles(rows: Sequence[Mapping]) -> list[str]:
    """The roles of all pairs of `adjacent_similarity`, of which a pair of unlike layers has some."""
    return list(dict.fromkeys(role for row in rows for role in row["roles"]))


def check_plotting() -> None:
    """Check that matplotlib (the ``plot`` extra) is installed.

    Raises:
        DeusMergeError: it is not.
    """
    if not importlib.util.find_spec("matplotlib"):
        raise DeusMergeError("plots need matplotlib", hint='pip install "deus-merge[plot]"')


def plot_similarity(rows: list[dict], path: Path) -> None:
    """Draw the output of `adjacent_similarity` with matplotlib: cosine by pair, before and after the alignment.

    Args:
        rows: At least one.
        path: A png, svg or pdf file to write.

    Raises:
        DeusMergeError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    pairs = [f"{a}–{b}" for a, b in (r["layers"] for r in rows)]
    roles = similarity_roles(rows)
    for index, role in enumerate(roles):
        values = [r["roles"].get(role, {"aligned": math.nan, "plain": math.nan}) for r in rows]
        axes.plot(pairs, [v["aligned"] for v in values], color=f"C{index}", marker=".", label=role)
        axes.plot(pairs, [v["plain"] for v in values], color=f"C{index}", linestyle=":")
    axes.set(xlabel="adjacent layers", ylabel="mean cosine of rows", title="solid: aligned, dotted: not aligned")
    axes.tick_params(axis="x", rotation=90)
    if roles:
        axes.legend(ncols=len(roles))
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise DeusMergeError(f"the plot cannot be written: {error}", where=path) from None
