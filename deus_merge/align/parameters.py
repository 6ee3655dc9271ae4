"""The parameters of alignment in recipes, which `ot_fuse` and ``align:`` of a slice share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..core.parameters import as_number, block_parameter
from ..models.spec import Heads, TensorSpec
from ..ot.costs import COST_SCALES, COSTS
from ..ot.problem import SolverOptions
from ..ot.registry import solver, solver_parameters, solvers
from ..ot.solver import OTSolver
from .options import ALIGNMENTS, STEPS, AlignOptions, default_solver
from .packing import layout_problem
from .symmetry import missing_for_symmetry


def parse_reg(value: object) -> object:
    """a number above 0, or auto"""
    number = as_number(value)
    if value == "auto" or (number is not None and number > 0):
        return value if number is None else float(number)
    raise ValueError(parse_reg.__doc__)


def parse_share(value: object) -> object:
    """a number above 0 and at most 1"""
    number = as_number(value)
    if number is not None and 0 < number <= 1:
        return float(number)
    raise ValueError(parse_share.__doc__)


def parse_score(value: object) -> object:
    """a cosine from -1 to 1, or none"""
    number = as_number(value)
    if value in (None, "none") or (number is not None and -1 <= number <= 1):
        return None if number is None else float(number)
    raise ValueError(parse_score.__doc__)


def parse_steps(value: object) -> object:
    """a list of experts, neurons, heads, values, rotary"""
    if isinstance(value, list | tuple) and all(v in STEPS for v in value):
        return tuple(step for step in STEPS if step in value)
    raise ValueError(parse_steps.__doc__)


#: The parameters of ``ot_fuse`` and of ``align:`` of a slice. Solvers add their own options.
PARAMETERS = (
    block_parameter("alignment", "choice", "symmetry", "how A is aligned to B: by symmetries that keep A's function,"
           " by the paper's plans, or not at all", choices=tuple(ALIGNMENTS)),
    block_parameter("symmetry", "other", STEPS, "steps of alignment symmetry", parse=parse_steps),
    block_parameter("plan_scale", "choice", "barycentric", "weighted means of rows, or the coupling as it is",
           choices=("barycentric", "coupling")),
    block_parameter("cost", "choice", "euclidean", "distance between rows", choices=COSTS),
    block_parameter("unit_rows", "boolean", True, "compare directions: rows are scaled to norm 1 for the cost"),
    block_parameter("cost_scale", "choice", "max", "divide the cost by its maximum or median", choices=COST_SCALES),
    block_parameter("solver", "choice", "auto", "solver of the transport problem; auto: assignment for symmetry, else"
           " sinkhorn", choices=("auto", *solvers())),
    block_parameter("reg", "other", "auto", "entropic regularisation in units of the cost; auto: by effective support",
           parse=parse_reg),
    block_parameter("effective_support", "number", 2.0, "reg auto: how many rows of A form a row of B", minimum=1),
    block_parameter("max_iterations", "integer", 10_000, "of the solver", minimum=1),
    block_parameter("tolerance", "number", 1e-4, "L1 error of the plan's marginals", minimum=0),
    *solver_parameters(),
    block_parameter("compute_dtype", "choice", "float32", "of the arithmetic", choices=("float32", "float64")),
)  # fmt: skip
_DIRECT = ("alignment", "plan_scale", "cost", "unit_rows", "cost_scale", "compute_dtype")


@dataclass(frozen=True)
class AlignmentProblem:
    """Why layers cannot be aligned.

    Attributes:
        message: The reason.
        parameter: The parameter to blame.
    """

    message: str
    parameter: str


class PlannedRole(Protocol):
    """The properties of an output tensor that checks and estimates of memory use."""

    @property
    def role(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def spec(self) -> TensorSpec | None: ...

    @property
    def heads(self) -> Heads | None: ...


@dataclass(frozen=True)
class Memory:
    """An estimate in bytes.

    Attributes:
        full: With every buffer in memory.
        minimum: With n x n buffers computed again in row blocks.
    """

    full: int
    minimum: int


def align_options(values: Mapping[str, Any], heads: Heads | None, memory: int | None, **more) -> AlignOptions:
    """The values of `PARAMETERS` as `AlignOptions`.

    Args:
        values: By name.
        heads: The model's attention heads.
        memory: Bytes for the buffers of a plan; None for no limit.
        more: Fields about the fusion.
    """
    return AlignOptions(
        symmetry=frozenset(values["symmetry"]),
        heads=heads,
        solver=_chosen_solver(values).configured(values),
        solver_options=SolverOptions(
            reg=values["reg"],
            target_support=values["effective_support"],
            max_iterations=values["max_iterations"],
            tolerance=values["tolerance"],
            memory=memory,
        ),
        **{key: values[key] for key in _DIRECT},
        **more,
    )


def check_alignment(values: Mapping[str, Any], outputs: Sequence[PlannedRole]) -> AlignmentProblem | None:
    """Why layers of these roles cannot be aligned; None if they can."""
    heads = outputs[0].heads
    described = [o.spec for o in outputs if o.spec is not None]
    if problem := layout_problem(described, {o.role: o.shape for o in outputs}, heads):
        return AlignmentProblem(problem, "alignment")
    if values["alignment"] == "none":
        return None
    if len(described) < len(outputs):
        message = (
            "this family has no description of the tensors of its layers. Describe it in models/families/, or merge"
            " without alignment"
        )
        return AlignmentProblem(message, "alignment")
    if values["alignment"] == "symmetry":
        if values["plan_scale"] == "coupling":
            message = "coupling belongs to alignment: transport_flow; symmetry permutes and turns"
            return AlignmentProblem(message, "plan_scale")
        if missing := missing_for_symmetry(described, frozenset(values["symmetry"]), heads):
            return AlignmentProblem(missing, "alignment")
    return None


def alignment_memory(values: Mapping[str, Any], outputs: Sequence[PlannedRole]) -> Memory:
    """The memory in bytes that the alignment of two layers takes."""
    width = 8 if values["compute_dtype"] == "float64" else 4
    matrices = [o for o in outputs if len(o.shape) == 2]
    shapes = [o.shape for o in matrices]
    if not shapes:
        return Memory(0, 0)
    weights = 5 * width * max(s[0] * s[1] for s in shapes)
    if values["alignment"] == "none":
        return Memory(weights, weights)
    stored = _chosen_solver(values).stored_bytes(width)
    if values["alignment"] == "transport_flow":
        flow = width * min(max(s) for s in shapes) ** 2  # the plan of the residual stream stays in memory
        count = max(s[0] for s in shapes)
        minimum = weights + flow + stored * count**2
        return Memory(max(minimum, weights + flow + 2 * width * count**2), minimum)
    reads = [o.shape for o in matrices if o.spec and o.spec.in_space == "neurons"]  # (d, f)
    writes = [o.shape for o in matrices if o.spec and o.spec.out_space == "neurons"]  # (f, d)
    features = 2 * width * sum(map(math.prod, reads + writes))
    attention = 2 * width * sum(map(math.prod, shapes)) - features
    heads = 4 * width * max((max(o.shape) ** 2 for o in matrices if o.role == "o"), default=0)
    count = max([s[1] for s in reads] + [s[0] for s in writes], default=0)
    plans = features + weights // 5
    minimum = max(features + 2 * width * max(map(math.prod, shapes)), attention + heads, weights)
    minimum = max(minimum, plans + stored * count**2)
    return Memory(max(minimum, plans + 2 * width * count**2), minimum)


def solver_memory(values: Mapping[str, Any], outputs: Sequence[PlannedRole], memory: int | None) -> int | None:
    """The rest of a block's memory in bytes, for n x n buffers."""
    return None if memory is None else max(0, memory - alignment_memory(values, outputs).minimum)


def _chosen_solver(values: Mapping[str, Any]) -> OTSolver:
    name = values["solver"]
    return solver(default_solver(values["alignment"]) if name == "auto" else name)
