"""Which trained parameters are matrices, and of which matrices a parameter consists: what Muon orthogonalises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..align.packing import Packing, layout_problem
from ..core.errors import ArchitectureError
from ..models.head_layout import layer_heads
from ..models.layouts import Layout
from ..models.spec import Heads, TensorSpec, group_of
from ..models.view import ModelView, view_model
from ..report.manifest import Manifest
from .converted import made_from
from .names import Parameters

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter


@dataclass(frozen=True)
class Split:
    """How a parameter consists of matrices.

    Attributes:
        layout: As its family describes it; None for one matrix (m, n), or for (E, m, n) one for each expert.
        heads: The layer's attention heads, for layouts that count by them.
        blocks: Without a layout: the number of equally many rows that each matrix is cut into, ``[gate; up]``.
    """

    layout: Layout | None = None
    heads: Heads | None = None
    blocks: int = 1

    def __call__(self, tensor: Tensor) -> list[Tensor]:
        """Views of a tensor of the parameter's shape: for each matrix one (.., n), whose leading axes are its rows."""
        if self.layout is not None:
            return list(self.layout.split(tensor, self.heads).values())
        matrices = tensor.unbind() if tensor.ndim == 3 else (tensor,)
        return [block for matrix in matrices for block in matrix.chunk(self.blocks)]


def splits(model: Module, manifest: Manifest, parameters: Parameters) -> Mapping[Parameter, Split]:
    """The matrices among the parameters that train.

    A family's description says what a tensor is. Where there is none, the weights of linear layers are matrices and
    the 3-D parameters of modules that are called experts are a matrix for each expert. Everything else is not: norms,
    biases, embeddings, kernels of convolutions, states of recurrences, and what peft added.

    Args:
        model: The model, wrapped or not.
        manifest: Its manifest.
        parameters: Its parameters by the manifest's names.
    """
    modules = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    described = _described(model, manifest)
    made = {names[0]: names for names in made_from(model, manifest.model_tensors).values()}
    found: dict[Parameter, Split] = {}
    for name, parameter in parameters.base.items():
        if not parameter.requires_grad or parameter.ndim not in (2, 3):
            continue
        spec, heads = described.get(name, (None, None))
        stored = [group_of(each) for each in made.get(name, [name])]
        shape = tuple(parameter.shape)
        if spec is not None and spec.layout is None and len(stored) > 1:
            split = _of_experts(spec, stored, parameter)
        elif (
            spec is None
            or spec.opaque
            or shape != manifest.model_tensors[name].shape
            or layout_problem([spec], {spec.role: shape}, heads)
        ):
            split = _by_module(modules[id(parameter)], parameter)
        else:
            split = _by_description(spec, heads, parameter)
        if split is not None:
            found[parameter] = split
    return found


def linear_splits(model: Module) -> dict[Parameter, Split]:
    """The matrices among the parameters of a model that train, by the kinds of its modules alone."""
    found: dict[Parameter, Split] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            split = _by_module(module, parameter)
            if split is not None and parameter.requires_grad:
                found[parameter] = split
    embeddings: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if embeddings is not None:  # a tied or untied head is AdamW's, as in pre-training
        found.pop(embeddings.weight, None)
    return found


def _described(model: Module, manifest: Manifest) -> Mapping[str, tuple[TensorSpec, Heads | None]]:
    """The family's description of the tensors of new layers, with their layouts fitted, by name."""
    found: dict[str, tuple[TensorSpec, Heads | None]] = {}
    inner: Any = next((m for m in model.modules() if hasattr(m, "base_model_prefix") and hasattr(m, "config")), None)
    if inner is None:
        return found
    config = inner.config.to_dict()
    try:
        view: ModelView = view_model(config, tuple(manifest.model_tensors), Path())
    except ArchitectureError:  # only the stored config fits the names
        return found
    for layer, (names, specs) in enumerate(zip(view.layers, view.specs, strict=False)):
        if not manifest.grown_names.isdisjoint(names.values()):
            shapes = {role: tuple(manifest.model_tensors[name].shape or ()) for role, name in names.items()}
            heads = layer_heads(config, view, layer, shapes)
            packing = Packing([s for s in specs.values() if s.role in names], shapes, heads)
            found |= {names[role]: (spec, heads) for role, spec in packing.stored.items()}
    return found


def _by_description(spec: TensorSpec, heads: Heads | None, parameter: Parameter) -> Split | None:
    if spec.layout is None:
        return Split() if _is_matrix(spec) and parameter.ndim == 2 else None
    if not all(map(_is_matrix, spec.layout.specs(parameter.shape))):
        return None
    return Split(spec.layout, heads)


def _of_experts(spec: TensorSpec, stored: list[str], parameter: Parameter) -> Split | None:
    """That of one parameter that transformers makes from a tensor, or several, of each expert."""
    kinds = len(dict.fromkeys(stored))
    whole = parameter.ndim == 3 and parameter.shape[1] % kinds == 0
    return Split(blocks=kinds if whole else 1) if _is_matrix(spec) else None


def _by_module(module: Module, parameter: Parameter) -> Split | None:
    from torch import nn

    kind = type(module).__name__
    linear = parameter.ndim == 2 and parameter is module._parameters.get("weight")
    if linear and (isinstance(module, nn.Linear) or kind == "Conv1D"):
        return Split()
    return Split() if parameter.ndim == 3 and "Experts" in kind else None


def _is_matrix(spec: TensorSpec) -> bool:
    return spec.in_space is not None and spec.out_space is not None
