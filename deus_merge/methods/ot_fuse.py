"""New layers from neighbouring ones: align by optimal transport, fuse, zero what writes to the residual stream."""

from __future__ import annotations

from collections.abc import Sequence

from ..align import fuse_layer
from ..align.memory import alignment_memory, solver_memory
from ..align.parameters import (
    PARAMETERS,
    align_options,
    check_alignment,
    parse_score,
    parse_share,
)
from ..core.parameters import Parameter, as_number, parse_roles
from ..core.tensors import OutputChunk
from ..models.spec import TensorSpec, group_of
from .base import COMPUTE, ONES, ZEROS, MergeMethod, OutputTensor, Refusal, SourceLayer, copy_of, undescribed

_FUSION = ("match", "match_fraction", "match_score", "restore_norm", "output_scale")


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
        *PARAMETERS,
        Parameter("t", "other", "even", "share of B: W = (1-t) A + t B; even: 1/(k+1), 2/(k+1), ...", "block",
                  parse=parse_t),
        Parameter("layers_per_gap", "integer", 1, "new layers between two neighbours", "block", minimum=1, maximum=64),
        Parameter("incompatible", "choice", "nearest", "neighbours with unlike tensors: fuse the nearest layer of the"
                  " upper one's kind, copy the upper one, or refuse", "block", choices=("nearest", "copy", "refuse")),
        Parameter("match", "choice", "full", "partial: fuse only the best matches, keep B's rest; symmetry counts"
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

    def check(self, outputs, sources):
        if sources != 2:
            return Refusal(f"ot_fuse takes one source (its gaps are filled) or two (fused pairwise), not {sources}")
        if unknown := [o.role for o in outputs if o.spec is None]:
            return undescribed(self.name, unknown[0])
        if problem := check_alignment(outputs[0].parameters, outputs):
            return Refusal(problem.message, problem.parameter)
        return check_zero_init(outputs)

    def warning(self, output):
        if output.parameters["plan_scale"] == "coupling" and output.parameters["alignment"] != "none":
            return (
                "plan_scale: coupling applies couplings as they are, like the paper's script: A contributes about 1/n"
                " of a weighted mean, so new layers are close to half of their upper neighbour"
            )
        return None

    def decide(self, output):
        """B where t = 1, A where t = 0 and nothing is aligned, zeros for the roles of zero_init. Of a tensor that
        nothing is known about there is no mean: it is one parent's, B's if it has a share."""
        parameters, spec, t = output.parameters, spec_of(output), share_of_b(output)
        if spec.one and parameters["zero_init"] is not False:
            return ONES
        if spec.writes_residual:
            if is_zeroed(output):
                return ZEROS
            if parameters["output_scale"] != 1:
                return COMPUTE
        if t == 1 or output.inputs[0] == output.inputs[1]:
            return copy_of(1)
        if spec.opaque:
            return copy_of(0 if t == 0 else 1)
        return copy_of(0) if t == 0 and parameters["alignment"] == "none" else COMPUTE

    def merge(self, block):
        """Align once, fuse for every slot: the layers of one gap share their plans."""
        first = [o for o in block.outputs if o.slot == 0 and not spec_of(o).opaque]
        computed = {(o.role, o.slot): o.computed for o in block.outputs}
        parameters = first[0].parameters
        options = align_options(
            parameters,
            first[0].heads,
            solver_memory(parameters, first, block.memory),
            t=tuple(share_of_b(o) for o in block.outputs if o.role == first[0].role),
            zero=frozenset(o.role for o in first if spec_of(o).writes_residual and is_zeroed(o)),
            whole=False,
            **{key: parameters[key] for key in _FUSION},
        )
        sides, shapes = (SourceLayer(block, 0), SourceLayer(block, 1)), {o.role: o.shape for o in first}
        for chunk in fuse_layer(*sides, [spec_of(o) for o in first], options, shapes):
            if computed[chunk.role, chunk.slot]:
                yield chunk
            elif chunk.diagnostics is not None:
                yield OutputChunk(chunk.role, None, chunk.slot, diagnostics=chunk.diagnostics)

    def workspace(self, outputs):
        return alignment_memory(outputs[0].parameters, outputs).full

    def minimum_workspace(self, outputs):
        return alignment_memory(outputs[0].parameters, outputs).minimum


def spec_of(output: OutputTensor) -> TensorSpec:
    """The description of an output; `OtFuse.check` refuses outputs without one."""
    assert output.spec is not None, f"{output.role}: not described"
    return output.spec


def share_of_b(output: OutputTensor) -> float:
    """The output's t: as set, or for "even" its slot's part of the gap."""
    t = output.parameters["t"]
    return (output.slot + 1) / (output.parameters["layers_per_gap"] + 1) if t == "even" else t


def check_zero_init(outputs: Sequence[OutputTensor]) -> Refusal | None:
    """Why zero_init cannot be used for these outputs; None if it can."""
    zeroed = outputs[0].parameters["zero_init"]
    writers = list(dict.fromkeys(o.spec.group for o in outputs if o.spec is not None and o.spec.writes_residual))
    if not isinstance(zeroed, bool) and (wrong := [role for role in zeroed if role not in writers]):
        return Refusal(
            f"{wrong[0]!r} does not write to the residual stream; these do: {', '.join(writers)}", "zero_init"
        )
    return None


def is_zeroed(output: OutputTensor) -> bool:
    """Whether zero_init names this writer of the residual stream (a bias goes with its projection)."""
    zeroed = output.parameters["zero_init"]
    if isinstance(zeroed, bool):
        return zeroed
    roles = [role for role in (output.role, spec_of(output).follows) if role]
    return any(role in zeroed or group_of(role) in zeroed for role in roles)


METHOD = OtFuse()
