"""New layers from neighbouring ones: align by optimal transport, fuse, zero what writes to the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from ..align import fuse_layer
from ..align.parameters import (
    ALIGNMENT,
    Layer,
    align_options,
    cannot_align,
    parse_score,
    parse_share,
    plan_memory,
    solver_memory,
)
from ..core.parameters import Parameter, as_number, parse_roles
from .base import Block, Compute, CopyOf, Made, MergeMethod, TensorTask, Zeros

_MIXED = ("match", "match_fraction", "match_score", "restore_norm", "output_scale")


def parse_t(value: object) -> object:
    """a number from 0 to 1, or even"""
    number = as_number(value)
    if value == "even" or (number is not None and 0 <= number <= 1):
        return value if number is None else float(number)
    raise ValueError(parse_t.__doc__)


class OtFuse(MergeMethod):
    name = "ot_fuse"
    summary = "new layers from neighbours: aligned by optimal transport, fused, output projections zero"
    reference = "Cao, Wang, Aletras, Progressive Depth Up-scaling via Optimal Transport, arXiv 2508.08011"
    inserts = True
    parameters = (
        *ALIGNMENT,
        Parameter("t", "other", "even", "share of B: W = (1-t) A + t B; even: 1/(k+1), 2/(k+1), ...", "block",
                  parse=parse_t),
        Parameter("layers_per_gap", "integer", 1, "new layers between two neighbours", "block", minimum=1, maximum=64),
        Parameter("match", "choice", "full", "partial: fuse only what matches best, keep B's rest; symmetry counts"
                  " neurons and key-value groups, transport_flow rows", "block", choices=("full", "partial")),
        Parameter("match_fraction", "other", 0.25, "match partial: the share to fuse", "block", parse=parse_share),
        Parameter("match_score", "other", None, "match partial: instead, fuse from this cosine on", "block",
                  parse=parse_score),
        Parameter("restore_norm", "choice", "row", "bring norms back to the mean of the parents'", "block",
                  choices=("none", "row", "tensor")),
        Parameter("zero_init", "other", True, "zero the tensors that write to the residual stream, or only these roles",
                  "block", parse=parse_roles),
        Parameter("output_scale", "number", 1.0, "factor on those writers that are not zeroed", "block"),
    )  # fmt: skip

    def check(self, tasks, sources):
        if sources != 2:
            return f"ot_fuse takes one source (its gaps are filled) or two (fused pairwise), not {sources}"
        if unknown := [t.role for t in tasks if t.spec is None]:
            return (
                f"ot_fuse does not know what {unknown[0]!r} does in a layer. Describe the family in architectures/, or"
                " use passthrough, linear or slerp"
            )
        if wrong := cannot_align(tasks[0].parameters, tasks):
            return wrong
        return zero_problem(tasks)

    def remark(self, task):
        if task.parameters["plan_scale"] == "coupling" and task.parameters["alignment"] != "none":
            return (
                "plan_scale: coupling applies couplings as they are, like the paper's script: what A gives is about 1/n"
                " of a weighted mean, so new layers are close to half of their upper neighbour"
            )
        return None

    def origin(self, task):
        """B where t = 1, A where t = 0 and nothing is aligned, zeros for the roles of zero_init."""
        parameters = task.parameters
        if task.spec.writes_residual:
            if is_zeroed(task):
                return Zeros()
            if parameters["output_scale"] != 1:
                return Compute()
        t = share(task)
        if t == 1:
            return CopyOf(1)
        return CopyOf(0) if t == 0 and parameters["alignment"] == "none" else Compute()

    def merge(self, block):
        """Align once, fuse for every slot: the layers of one gap share their plans."""
        first = [t for t in block.tasks if t.slot == 0]
        outputs = {(t.role, t.slot): t for t in block.tasks}
        slots = [next(t for t in block.tasks if t.slot == j) for j in range(1 + max(t.slot for t in block.tasks))]
        below, above, options = Layer(block, 0), Layer(block, 1), _options(first, slots, block)
        for role, tensors, diagnostics in fuse_layer(below, above, [t.spec for t in first], options):
            told = None if diagnostics is None else asdict(diagnostics)
            if not tensors and told:
                yield Made(outputs[role, 0], None, told)
            for slot, tensor in enumerate(tensors):
                task = outputs[role, slot]
                yield Made(
                    task, tensor if isinstance(self.origin(task), Compute) else None, told if slot == 0 else None
                )

    def workspace(self, tasks):
        return plan_memory(tasks[0].parameters, tasks)[0]

    def least_workspace(self, tasks):
        return plan_memory(tasks[0].parameters, tasks)[1]


def _options(first: list[TensorTask], slots: list[TensorTask], block: Block):
    p = first[0].parameters
    return align_options(
        p,
        first,
        solver_memory(p, first, block.memory),
        t=tuple(share(task) for task in slots),
        zero=frozenset(t.role for t in first if t.spec.writes_residual and is_zeroed(t)),
        **{key: p[key] for key in _MIXED},
    )


def share(task) -> float:
    """The task's t: as set, or for "even" its slot's part of the gap."""
    t = task.parameters["t"]
    return (task.slot + 1) / (task.parameters["layers_per_gap"] + 1) if t == "even" else t


def zero_problem(tasks: Sequence[TensorTask]) -> str | None:
    """What is wrong with zero_init; None when nothing is."""
    zeroed = tasks[0].parameters["zero_init"]
    writers = [t.role for t in tasks if t.spec.writes_residual]
    if not isinstance(zeroed, bool) and (wrong := [r for r in zeroed if r not in writers]):
        return f"zero_init: {wrong[0]!r} does not write to the residual stream; these do: {', '.join(writers)}"
    return None


def is_zeroed(task) -> bool:
    """Whether zero_init names this writer of the residual stream (a bias goes with its projection)."""
    zeroed = task.parameters["zero_init"]
    return zeroed if isinstance(zeroed, bool) else task.role in zeroed or task.spec.follows in zeroed


METHOD = OtFuse()
