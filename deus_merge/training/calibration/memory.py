"""How much memory and disk a calibration takes, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ...checkpoint.system import free_space
from ...core.errors import PlanError
from ...core.tensors import StoredTensor
from ...core.units import format_size
from ...models.config_json import section
from ...models.view import ModelView
from ...run.limits import memory
from .options import CalibrationOptions
from .triangle import ROWS

PROCESS = 450 << 20  # bytes of Python, torch and transformers themselves
_FLOAT, _DOUBLE = 4, 8  # bytes
CANDIDATES = 8  # step sizes that are tried at once


@dataclass(frozen=True)
class Needs:
    """Bytes of memory in each phase, and of disk for hidden states.

    Attributes:
        phases: A phase in words -> its bytes, the process itself included.
        disk: Bytes of hidden states.
    """

    phases: Mapping[str, int]
    disk: int

    @property
    def memory(self) -> int:
        return max(self.phases.values())

    @property
    def worst(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda name: self.phases[name])


def estimate(
    view: ModelView,
    tensors: Mapping[str, StoredTensor],
    config: Mapping,
    options: CalibrationOptions,
    columns: int,
    windows: tuple[int, int],
) -> Needs:
    """What a calibration takes.

    Args:
        view: The checkpoint by layer and role.
        tensors: Its tensors as a model in floating point has them.
        config: Its config.json.
        options: Length, batch, method.
        columns: What the writers of a layer read together, m.
        windows: The numbers of windows that are fitted and held out.
    """
    size = {name: _FLOAT * prod(tensor.shape) for name, tensor in tensors.items()}
    layer = max(sum(size[name] for name in names.values()) for names in view.layers)
    outer = [size[name] for name in (*view.before, *view.after)]
    vocabulary, width = max((tensors[n].shape for n in view.before if len(tensors[n].shape) == 2), default=(0, 0))
    tokens = options.batch * options.length
    # What a layer keeps for its gradient: the outputs of its matrices, and as much again on the way; attention.
    outputs = max(sum(_rows(tensors[name]) for name in names.values()) for names in view.layers)
    heads = section(config, view.layers_path).get("num_attention_heads")
    heads = heads if isinstance(heads, int) and not isinstance(heads, bool) else width // 64
    scores = 3 * options.batch * heads * options.length**2
    forward = layer + _FLOAT * (tokens * (outputs + 4 * width) + scores)
    gradient = layer + _FLOAT * (3 * tokens * (outputs + 4 * width) + scores)
    # of A and S the lower triangle, and half a diagonal block more for each block of rows
    a, b = _triangle(columns), _DOUBLE * width * columns
    s = _triangle(width) if options.method == "kfac" else 0
    read = _FLOAT * tokens * (columns + 2 * width)
    product = _FLOAT * min(ROWS, columns) * columns
    phases = {
        "the embeddings": max(outer, default=0) + forward,
        "the head and its logits": max(outer, default=0) + 4 * _FLOAT * options.length * vocabulary + b // 2,
        "the gradient of a layer": gradient,
        "the statistics of a layer": forward + a + b + s + read + product,
        "solving for the weights of a layer": a + 2 * b + s,
        "trying step sizes": forward + b + 3 * _FLOAT * width * columns,
    }
    fitted, held_out = windows
    states = fitted * (view.num_layers + 2) + held_out * (1 + CANDIDATES) + fitted
    disk = states * _FLOAT * options.length * width
    return Needs({name: PROCESS + size for name, size in phases.items()}, disk)


def check_memory(needs: Needs, limit: int | None, device: str) -> None:
    """Check that there is enough memory.

    Args:
        needs: As `estimate` gives them.
        limit: Bytes that are allowed; None for those of the machine.
        device: Where the arithmetic is done.

    Raises:
        PlanError: there is not.
    """
    hint = f"most is needed for {needs.worst}; a smaller --batch or --length takes less"
    if "statistics" in needs.worst or "weights" in needs.worst:
        hint = f"most is needed for {needs.worst}: a matrix with a row for each number that its outputs read"
    if limit is not None and needs.memory > limit:
        raise PlanError(
            "calibration needs more memory than allowed",
            where="--max-memory",
            expected=f"at least {format_size(needs.memory)}",
            got=format_size(limit),
            hint=hint,
        )
    if limit is None and (available := _available(device)) is not None and needs.memory > available:
        raise PlanError(
            "calibration needs more memory than there is",
            expected=f"at least {format_size(needs.memory)}",
            got=f"{format_size(available)} on {device}",
            hint=hint,
        )


def check_disk(needs: Needs, out: Path, output: int) -> None:
    """Check that there is room for the output and for the hidden states next to it.

    Args:
        needs: As `estimate` gives them.
        out: The output folder.
        output: The size of its files.

    Raises:
        PlanError: there is not.
    """
    if (free := free_space(out.parent)) < needs.disk + output:
        raise PlanError(
            "too little space on the disk",
            where=out,
            expected=f"{format_size(output)} for the output, {format_size(needs.disk)} for hidden states on the way",
            got=f"{format_size(free)} free",
            hint="fewer --tokens take less",
        )


def _available(device: str) -> int | None:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(torch.device(device))[0]
    found = memory()
    return found[1] if found else None


def _triangle(size: int) -> int:
    """Bytes of a `Triangle`."""
    return _DOUBLE * size * (size + min(ROWS, size)) // 2


def _rows(tensor: StoredTensor) -> int:
    return max(tensor.shape) if len(tensor.shape) == 2 else prod(tensor.shape[:-1] or (0,))
