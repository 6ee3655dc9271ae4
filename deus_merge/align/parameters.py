"""What recipes say about alignment: the parameters that `ot_fuse` and ``align:`` of a slice share, and blocks whose
sources are aligned before any method sees them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..core.parameters import Parameter, as_number
from ..core.plugins import plugins
from ..methods.base import Block, CopyOf, Made, MergeMethod, TensorTask
from ..ot.costs import COST_SCALES, COSTS
from ..ot.problem import SolverOptions
from ..ot.solvers.progot import SCHEDULES
from . import Fused, align_layer
from .options import ALIGNMENTS, STEPS, AlignOptions
from .symmetry import problem

if TYPE_CHECKING:
    import torch


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
    """a list of neurons, heads, values, rotary"""
    if isinstance(value, list | tuple) and all(v in STEPS for v in value):
        return tuple(step for step in STEPS if step in value)
    raise ValueError(parse_steps.__doc__)


def _block(name: str, kind: str, default: object, help: str, **more) -> Parameter:
    return Parameter(name, kind, default, help, "block", **more)


ALIGNMENT = (
    _block("alignment", "choice", "symmetry", "how A is brought to B: by symmetries that keep A's function, by the"
           " paper's plans, or not at all", choices=tuple(ALIGNMENTS)),
    _block("symmetry", "other", STEPS, "steps of alignment symmetry", parse=parse_steps),
    _block("plan_scale", "choice", "barycentric", "weighted means of rows, or the coupling as it is",
           choices=("barycentric", "coupling")),
    _block("cost", "choice", "euclidean", "distance between rows", choices=COSTS),
    _block("unit_rows", "boolean", True, "compare directions: rows are scaled to norm 1 for the cost"),
    _block("cost_scale", "choice", "max", "what the cost is divided by", choices=COST_SCALES),
    _block("solver", "choice", "auto", "who solves the transport problem; auto: assignment for symmetry, else sinkhorn",
           choices=("auto", *plugins("deus_merge.ot.solvers", "SOLVER"))),
    _block("reg", "other", "auto", "entropic regularisation in units of the cost; auto: by effective support",
           parse=parse_reg),
    _block("effective_support", "number", 2.0, "reg auto: rows of A that a row of B is made of", minimum=1),
    _block("max_iterations", "integer", 10_000, "of the solver", minimum=1),
    _block("tolerance", "number", 1e-4, "L1 error of the plan's marginals", minimum=0),
    _block("progot_steps", "integer", 8, "stages of solver progot", minimum=1),
    _block("progot_schedule", "choice", "linear", "step sizes of progot", choices=tuple(SCHEDULES)),
    _block("marginal_penalty", "number", 1.0, "solver unbalanced: weight of the marginals, in units of the mean cost",
           minimum=0),
    _block("compute_dtype", "choice", "float32", "of the arithmetic", choices=("float32", "float64")),
)  # fmt: skip
_SOLVER = ("max_iterations", "tolerance", "progot_steps", "progot_schedule", "marginal_penalty")
_DIRECT = ("alignment", "plan_scale", "cost", "unit_rows", "cost_scale", "solver", "compute_dtype")


def align_options(
    values: Mapping[str, object], tasks: Sequence[TensorTask], memory: int | None, **more
) -> AlignOptions:
    """The parameters of `ALIGNMENT` as `AlignOptions`.

    Args:
        values: By name.
        tasks: Of the block, which know the model's heads.
        memory: Bytes for the buffers of a plan; None for as many as it takes.
        more: Fields that are about the fusion.
    """
    solver = SolverOptions(
        reg=values["reg"],
        target_support=values["effective_support"],
        memory=memory,
        **{key: values[key] for key in _SOLVER},
    )
    return AlignOptions(
        symmetry=frozenset(values["symmetry"]),
        heads=tasks[0].heads,
        solver_options=solver,
        **{key: values[key] for key in _DIRECT},
        **more,
    )


def cannot_align(values: Mapping[str, object], tasks: Sequence[TensorTask]) -> str | None:
    """Why these outputs cannot be made from aligned sources, after the name of the parameter to blame; None if they
    can."""
    if values["alignment"] == "none":
        return None
    if unknown := [t.role for t in tasks if t.spec is None]:
        return (
            f"alignment: nobody described what {unknown[0]!r} does in a layer of this family. Describe it in"
            " architectures/, or merge without alignment"
        )
    if values["alignment"] == "symmetry":
        if values["plan_scale"] == "coupling":
            return "plan_scale: coupling belongs to alignment: transport_flow; symmetry permutes and turns"
        if wrong := problem([t.spec for t in tasks], frozenset(values["symmetry"]), tasks[0].heads):
            return f"alignment: {wrong}"
    return None


def plan_memory(values: Mapping[str, object], tasks: Sequence[TensorTask]) -> tuple[int, int]:
    """Bytes that aligning two layers takes at most, and the least it can do with: (all, without n x n buffers)."""
    width = 8 if values["compute_dtype"] == "float64" else 4
    shapes = [t.shape for t in tasks if len(t.shape) == 2]
    if not shapes:
        return 0, 0
    weights = 5 * width * max(s[0] * s[1] for s in shapes)
    if values["alignment"] == "none":
        return weights, weights
    # POT's simplex takes a stored cost, in float64, and gives a stored plan; others can do with row blocks.
    stored = (width + 2 * 8) if values["solver"] == "emd" else 0
    if values["alignment"] == "transport_flow":
        flow = width * min(max(s) for s in shapes) ** 2  # the plan of the residual stream is kept
        count = max(s[0] for s in shapes)
        least = weights + flow + stored * count**2
        return max(least, weights + flow + 2 * width * count**2), least
    matrices = [t for t in tasks if len(t.shape) == 2]
    reads = [t.shape for t in matrices if t.spec.in_space == "neurons"]  # (d, f)
    makes = [t.shape for t in matrices if t.spec.out_space == "neurons"]  # (f, d)
    features = 2 * width * sum(map(math.prod, reads + makes))
    attention = 2 * width * sum(map(math.prod, shapes)) - features
    heads = 4 * width * max((max(t.shape) ** 2 for t in matrices if t.role == "o"), default=0)
    count = max([s[1] for s in reads] + [s[0] for s in makes], default=0)
    plans = features + weights // 5
    least = max(features + 2 * width * max(map(math.prod, shapes)), attention + heads, weights)
    least = max(least, plans + stored * count**2)
    return max(least, plans + 2 * width * count**2), least


class Layer(Mapping):
    """One source of a block as a mapping from role to tensor that reads when asked."""

    def __init__(self, block: Block, source: int):
        self.block, self.source = block, source

    def __getitem__(self, role: str) -> torch.Tensor:
        return self.block.read(role, self.source)

    def __iter__(self) -> Iterator[str]:
        return iter(t.role for t in self.block.tasks if t.slot == 0)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True)
class AlignTo:
    """What ``align:`` of a slice asks for.

    Attributes:
        target: The source that the others are aligned to.
        values: Of the parameters of `ALIGNMENT`.
    """

    target: int
    values: Mapping[str, object]

    def moves(self, source: int) -> bool:
        """Whether tensors of this source change."""
        return source != self.target and self.values["alignment"] != "none"


class AlignedBlock:
    """A block whose sources were aligned to one of them (`method.Block`). Tensors are aligned as they are asked for,
    role by role, and each can be read once."""

    def __init__(self, block: Block, align: AlignTo):
        self.tasks, self.base, self.memory, self.generator = block.tasks, block.base, block.memory, block.generator
        self._block, self._align = block, align
        self._made: dict[int, Iterator[Fused]] = {}
        self._waiting: dict[tuple[int, str], torch.Tensor] = {}
        self.told: list[Made] = []

    def read(self, role: str, source: int) -> torch.Tensor:
        if not self._align.moves(source):
            return self._block.read(role, source)
        if source not in self._made:
            specs = [t.spec for t in self.tasks]
            memory = solver_memory(self._align.values, self.tasks, self.memory)
            options = align_options(self._align.values, self.tasks, memory)
            sides = Layer(self._block, source), Layer(self._block, self._align.target)
            self._made[source] = align_layer(*sides, specs, options)
        while (source, role) not in self._waiting:
            made = next(self._made[source])
            self._waiting[source, made.role] = made.tensors[0]
            if made.diagnostics is not None:
                task = next(t for t in self.tasks if t.role == made.role)
                self.told.append(Made(task, None, {"source": source, **asdict(made.diagnostics)}))
        return self._waiting.pop((source, role))

    def flat(self, role: str, source: int) -> torch.Tensor:
        return self.read(role, source).reshape(-1)


def merge_aligned(method: MergeMethod, block: Block, align: AlignTo) -> Iterator[Made]:
    """`MergeMethod.merge` of a block whose sources are aligned first; copies of what moved are made here."""
    aligned = AlignedBlock(block, align)
    for task in block.tasks:
        origin = method.origin(task)
        if isinstance(origin, CopyOf) and align.moves(origin.source):
            yield Made(task, aligned.read(task.role, origin.source))
    yield from method.merge(aligned)
    yield from aligned.told


def solver_memory(values: Mapping[str, object], tasks: Sequence[TensorTask], memory: int | None) -> int | None:
    """What is left of a block's memory for n x n buffers."""
    return None if memory is None else max(0, memory - plan_memory(values, tasks)[1])
