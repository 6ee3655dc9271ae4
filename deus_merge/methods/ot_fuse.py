"""New layers from neighbouring ones: align by optimal transport, fuse, zero what writes to the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from ..discover import plugins
from ..method import Block, Compute, CopyOf, Made, MergeMethod, Parameter, TensorTask, Zeros, as_number, parse_roles

_PASSED_ON = (
    "plan_scale", "cost", "unit_rows", "cost_scale", "solver", "reg", "max_iterations", "tolerance", "restore_norm",
    "output_scale", "compute_dtype",
)  # fmt: skip
_ROLES = ("n1", "q", "k", "v", "o", "n2", "gate", "up", "down")


def parse_reg(value: object) -> object:
    """a number above 0, or auto"""
    number = as_number(value)
    if value == "auto" or (number is not None and number > 0):
        return value if number is None else float(number)
    raise ValueError(parse_reg.__doc__)


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
        Parameter("alignment", "choice", "transport_flow", "how A is brought to B", "block",
                  choices=("transport_flow", "none")),
        Parameter("t", "other", "even", "share of B: W = (1-t) A + t B; even: 1/(k+1), 2/(k+1), ...", "block",
                  parse=parse_t),
        Parameter("layers_per_gap", "integer", 1, "new layers between two neighbours", "block", minimum=1, maximum=64),
        Parameter("zero_init", "other", True, "zero the tensors that write to the residual stream, or only these roles",
                  "block", parse=parse_roles),
        Parameter("output_scale", "number", 1.0, "factor on those writers that are not zeroed", "block"),
        Parameter("plan_scale", "choice", "barycentric", "weighted means of rows, or the coupling as it is",
                  "block", choices=("barycentric", "coupling")),
        Parameter("cost", "choice", "euclidean", "distance between rows", "block",
                  choices=("euclidean", "sqeuclidean", "cosine")),
        Parameter("unit_rows", "boolean", True, "compare directions: rows are scaled to norm 1 for the cost", "block"),
        Parameter("cost_scale", "choice", "max", "what the cost is divided by", "block",
                  choices=("none", "max", "median")),
        Parameter("solver", "choice", "sinkhorn", "who solves the transport problem", "block",
                  choices=tuple(plugins("deus_merge.ot.solvers", "SOLVER"))),
        Parameter("reg", "other", "auto", "entropic regularisation in units of the cost; auto: by effective support",
                  "block", parse=parse_reg),
        Parameter("effective_support", "number", 2.0, "reg auto: rows of A that a row of B is made of", "block",
                  minimum=1),
        Parameter("max_iterations", "integer", 10_000, "of the solver", "block", minimum=1),
        Parameter("tolerance", "number", 1e-4, "L1 error of the plan's marginals", "block", minimum=0),
        Parameter("restore_norm", "choice", "row", "bring norms back to the mean of the parents'", "block",
                  choices=("none", "row", "tensor")),
        Parameter("compute_dtype", "choice", "float32", "of the arithmetic", "block", choices=("float32", "float64")),
    )  # fmt: skip

    def check(self, tasks, sources):
        if sources != 2:
            return f"ot_fuse takes one source (its gaps are filled) or two (fused pairwise), not {sources}"
        unknown = [t.role for t in tasks if t.spec is None]
        if unknown:
            known = {t.role for t in tasks if t.spec}
            lacking = ", ".join(r for r in _ROLES if r not in known) or "none"
            return (
                f"ot_fuse does not know what {unknown[0]!r} does in a layer; missing roles: {lacking}."
                " Describe the family in architectures/, or use passthrough, linear or slerp"
            )
        zeroed = tasks[0].parameters["zero_init"]
        writers = [t.role for t in tasks if t.spec.writes_residual]
        if not isinstance(zeroed, bool) and (wrong := [r for r in zeroed if r not in writers]):
            return f"zero_init: {wrong[0]!r} does not write to the residual stream; these do: {', '.join(writers)}"
        return None

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
        from ..align.transport_flow import fuse_layer

        first = [t for t in block.tasks if t.slot == 0]
        outputs = {(t.role, t.slot): t for t in block.tasks}
        slots = [next(t for t in block.tasks if t.slot == j) for j in range(1 + max(t.slot for t in block.tasks))]
        below, above = _Layer(block, 0), _Layer(block, 1)
        for role, tensors, diagnostics in fuse_layer(below, above, [t.spec for t in first], _options(first, slots)):
            told = None if diagnostics is None else asdict(diagnostics)
            if not tensors and told:
                yield Made(outputs[role, 0], None, told)
            for slot, tensor in enumerate(tensors):
                task = outputs[role, slot]
                yield Made(
                    task, tensor if isinstance(self.origin(task), Compute) else None, told if slot == 0 else None
                )

    def workspace(self, tasks):
        """Cost, kernel and map of the widest plan, and the layer's tensors in float32."""
        width = 8 if tasks[0].parameters["compute_dtype"] == "float64" else 4
        matrices = [t.shape for t in tasks if len(t.shape) == 2]
        if not matrices:
            return 0
        aligned = tasks[0].parameters["alignment"] != "none"
        plans = 3 * width * max(s[0] for s in matrices) ** 2 if aligned else 0
        return plans + 5 * width * max(s[0] * s[1] for s in matrices)


class _Layer(Mapping):
    """One source of a block as a mapping from role to tensor that reads when asked."""

    def __init__(self, block: Block, source: int):
        self.block, self.source = block, source

    def __getitem__(self, role):
        return self.block.read(role, self.source)

    def __iter__(self):
        return iter(t.role for t in self.block.tasks if t.slot == 0)

    def __len__(self):
        return sum(1 for _ in self)


def _options(first: list[TensorTask], slots: list[TensorTask]):
    from ..align.transport_flow import FlowOptions

    p = first[0].parameters
    return FlowOptions(
        align=p["alignment"] != "none",
        target_support=p["effective_support"],
        t=tuple(share(task) for task in slots),
        zero=frozenset(t.role for t in first if t.spec.writes_residual and is_zeroed(t)),
        **{key: p[key] for key in _PASSED_ON},
    )


def share(task) -> float:
    """The task's t: as set, or for "even" its slot's part of the gap."""
    t = task.parameters["t"]
    return (task.slot + 1) / (task.parameters["layers_per_gap"] + 1) if t == "even" else t


def is_zeroed(task) -> bool:
    """Whether zero_init names this writer of the residual stream (a bias goes with its projection)."""
    zeroed = task.parameters["zero_init"]
    return zeroed if isinstance(zeroed, bool) else task.role in zeroed or task.spec.follows in zeroed


METHOD = OtFuse()
