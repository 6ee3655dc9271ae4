"""The parameters of alignment in recipes, which `ot_fuse` and ``align:`` of a slice share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.parameters import as_number, block_parameter
from ..models.spec import Heads
from ..ot.costs import COST_SCALES, COSTS
from ..ot.problem import SolverOptions
from ..ot.registry import solver_parameters, solvers
from .memory import PlannedRole, chosen_solver
from .options import ALIGNMENTS, STEPS, AlignOptions
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
        solver=chosen_solver(values).configured(values),
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
