"""The pieces that layers are put together from: norms, attention, MLPs, experts, mixers that nothing is known about.

Roles: n1, q, k, v, o, n2, gate, up, down; ``q.bias`` of a bias, ``q_norm`` of a norm of what q gives, ``o_norm`` of a
norm behind o, ``experts.{e}.gate`` of an expert, ``shared.gate`` of an expert that every token takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..family import Sublayer
from ..layouts import Experts, Layout, Stacked, Transposed
from ..spec import RESIDUAL, TensorSpec

Specs = tuple[TensorSpec, ...]
#: makes a layout of the parts that lie in one tensor: `Stacked` or another class of `layouts`
Arrangement = Callable[[Any], Layout]

_SPACES = {
    "q": (RESIDUAL, "query_heads"), "k": (RESIDUAL, "key_heads"), "v": (RESIDUAL, "value_heads"),
    "o": ("value_heads", RESIDUAL), "q_gate": (RESIDUAL, "gate_heads"),
    "gate": (RESIDUAL, "neurons"), "up": (RESIDUAL, "neurons"), "down": ("neurons", RESIDUAL),
}  # fmt: skip
ATTENTION = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
MLP = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
#: an MLP without a gate
PLAIN_MLP = {"up": "mlp.up_proj", "down": "mlp.down_proj"}
#: the norms in front of attention and MLP as most families name them
NORMS = ("input_layernorm", "post_attention_layernorm")


#: where config.json leaves out in which groups a router chooses experts, which transformers' class then decides
UNKNOWN_GROUPS = {"experts": "config.json does not say in which groups experts are chosen"}
#: the same of which components of a head are rotary
UNKNOWN_ROTARY = {"rotary": "config.json does not say which components are rotary"}


def norm(role: str, module: str, *, bias: bool = False, offset: float = 0.0) -> Specs:
    """A norm of the residual stream; with ``bias`` a LayerNorm."""
    weight = TensorSpec(role, f"{module}.weight", None, RESIDUAL, offset=offset)
    return (weight, TensorSpec(f"{role}.bias", f"{module}.bias", None, RESIDUAL)) if bias else (weight,)


def norm_behind(role: str, module: str, *, offset: float = 0.0, optional: bool = False) -> Specs:
    """A norm of what the weight ``role`` writes, or several weights together, before it is added to the residual
    stream."""
    name = f"{module}.weight"
    return (
        TensorSpec(f"{role}_norm", name, None, RESIDUAL, follows=role, multiplies=True, offset=offset,
                   optional=optional),
    )  # fmt: skip


def projection(role: str, module: str, *, norm: str | None, bias: bool = False, space: str = "") -> Specs:
    """A matrix, and the bias that it may have.

    Args:
        role: q, k, v, o, gate, up or down, behind a prefix like ``shared.``.
        module: Its name without ``.weight``.
        norm: The norm that it reads, where it reads the residual stream.
        bias: Whether it may have a bias.
        space: The neurons' space, where it is not ``neurons``.
    """
    weight = matrix(role, f"{module}.weight", norm=norm, space=space)
    return (weight, bias_of(weight, f"{module}.bias")) if bias else (weight,)


def matrix(role: str, name: str, *, norm: str | None, space: str = "") -> TensorSpec:
    """A matrix in the spaces of its role."""
    reads, writes = (space if space and s == "neurons" else s for s in _SPACES[role.rpartition(".")[2]])
    return TensorSpec(role, name, reads, writes, norm=norm if reads == RESIDUAL else None)


def bias_of(weight: TensorSpec, name: str, *, optional: bool = True) -> TensorSpec:
    """What is added to the output of a weight."""
    return TensorSpec(f"{weight.role}.bias", name, None, weight.out_space, follows=weight.role, optional=optional)


def projections(
    modules: Mapping[str, str], *, norm: str | None, biases: str = "", prefix: str = "", space: str = ""
) -> Specs:
    """Matrices by role, those of ``biases`` (roles, separated by spaces) with a bias."""
    return tuple(
        spec
        for role, module in modules.items()
        for spec in projection(prefix + role, module, norm=norm, bias=role in biases.split(), space=space)
    )


def attention(
    modules: Mapping[str, str] = ATTENTION, *, norm: str | None = "n1", biases: str = "",
    head_norms: Mapping[str, str] | None = None, head_norm_offset: float = 0.0,
) -> Specs:  # fmt: skip
    """Multi-head attention with a tensor for each role.

    Args:
        modules: The modules of q, k, v and o.
        norm: The norm in front.
        biases: Roles that may have a bias, separated by spaces.
        head_norms: The modules of the norms of q and k, by role: one weight for all heads (h,), or each its own.
        head_norm_offset: As `TensorSpec.offset`.
    """
    specs = list(projections(modules, norm=norm, biases=biases))
    for role, module in (head_norms or {}).items():
        at = max(i for i, s in enumerate(specs) if s.role in (role, f"{role}.bias")) + 1
        space = _SPACES[role][1]
        specs.insert(
            at,
            TensorSpec(f"{role}_norm", f"{module}.weight", None, space, follows=role, multiplies=True,
                       offset=head_norm_offset),
        )  # fmt: skip
    return tuple(specs)


def head_layer_norm(role: str, module: str) -> Specs:
    """A LayerNorm of what q or k gives, the same for all heads: weight (h,) and bias (h,), where a config has it."""
    space = _SPACES[role][1]
    weight = TensorSpec(f"{role}_norm", f"{module}.weight", None, space, follows=role, multiplies=True, optional=True)
    return weight, TensorSpec(f"{role}_norm.bias", f"{module}.bias", None, space, follows=role, optional=True)


#: norms of q and k per head as most families name them
HEAD_NORMS = {"q": "self_attn.q_norm", "k": "self_attn.k_norm"}


def mlp(modules: Mapping[str, str] = MLP, *, norm: str | None = "n2", biases: str = "", prefix: str = "") -> Specs:
    """An MLP; without a gate where ``modules`` has none.

    Args:
        modules: The modules of gate, up and down.
        norm: The norm in front.
        biases: Roles that may have a bias.
        prefix: Before the roles, where a layer has several: ``shared.``. Its neurons are then a space of their own.
    """
    space = f"neurons.{prefix.rstrip('.')}" if prefix else ""
    return projections(modules, norm=norm, biases=biases, prefix=prefix, space=space)


def fused(
    role: str, name: str, layout: Arrangement, parts: Sequence[str], *, norm: str | None, prefix: str = "",
    transposed: bool = False, bias: str | None = None, space: str = "",
) -> Specs:  # fmt: skip
    """Several matrices in one tensor, and their biases in another.

    Args:
        role: The stored tensor's role: ``qkv``.
        name: Its name with ``.weight``.
        layout: How the parts lie in it.
        parts: The roles of the parts.
        norm: The norm in front.
        prefix: Before the parts' roles.
        transposed: Whether it is stored as (inputs, outputs).
        bias: The biases' name, where there may be some.
        space: The neurons' space, where it is not ``neurons``.
    """
    matrices = tuple(matrix(prefix + part, name, norm=norm, space=space) for part in parts)
    arranged = layout(matrices)
    weight = TensorSpec(role, name, RESIDUAL, None, norm=norm, layout=Transposed(arranged) if transposed else arranged)
    if bias is None:
        return (weight,)
    biases = tuple(bias_of(part, bias) for part in matrices)
    return weight, TensorSpec(f"{role}.bias", bias, optional=True, layout=layout(biases))


def transposed(role: str, module: str, *, norm: str | None = None, bias: bool = True) -> Specs:
    """A matrix that is stored as (inputs, outputs), and its bias."""
    inner = matrix(role, f"{module}.weight", norm=norm)
    weight = TensorSpec(role, inner.name, inner.in_space, inner.out_space, norm=inner.norm, layout=Transposed(inner))
    return (weight, bias_of(weight, f"{module}.bias")) if bias else (weight,)


def gated(module: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> dict[str, str]:
    """The modules of an MLP, or of one expert, by role."""
    return {"gate": f"{module}.{gate}", "up": f"{module}.{up}", "down": f"{module}.{down}"}


EXPERT_MLP = gated("mlp.experts.{e}")


def router(name: str = "mlp.gate.weight", *, norm: str | None = "n2", bias: str | None = None) -> Specs:
    """What chooses the experts of a token: a row an expert (E, d), and the bias that it may have, (E,)."""
    weight = TensorSpec("router", name, RESIDUAL, "experts", norm=norm)
    return (weight, bias_of(weight, bias)) if bias else (weight,)


def experts(modules: Mapping[str, str] = EXPERT_MLP, *, norm: str | None = "n2", biases: str = "") -> Specs:
    """Experts with a tensor for each role of each; ``{e}`` in a name is the expert's number."""
    return projections(modules, norm=norm, biases=biases, prefix="experts.{e}.", space="neurons.{e}")


def shared_expert(module: str = "mlp.shared_expert", *, norm: str | None = "n2", gate: str | None = None) -> Specs:
    """An expert that every token takes, and the row (1, d) whose product with a token scales it, where there is one.

    Args:
        module: Its name.
        norm: The norm in front.
        gate: The row's name.
    """
    own = mlp({role: f"{module}.{role}_proj" for role in ("gate", "up", "down")}, norm=norm, prefix="shared.")
    return own if gate is None else (*own, TensorSpec("shared.gating", gate, RESIDUAL, "shared", norm=norm))


def stacked_experts(
    gate_up: str, down: str, *, norm: str | None = "n2", transposed: bool = False, layout: Arrangement = Stacked,
    biases: bool = False,
) -> Specs:  # fmt: skip
    """All experts in one tensor a role: gate and up (E, 2f, d), down (E, d, f).

    Args:
        gate_up, down: Their names.
        norm: The norm in front.
        transposed: Whether they are (E, d, 2f) and (E, f, d).
        layout: How gate and up lie in their tensor.
        biases: Whether there are ``<name>_bias`` tensors, (E, 2f) and (E, d).
    """
    pair = fused("", gate_up, layout, ("gate", "up"), norm=norm, prefix="experts.{e}.", transposed=transposed,
                 bias=f"{gate_up}_bias" if biases else None, space="neurons.{e}")  # fmt: skip
    inner = matrix("experts.{e}.down", down, norm=None, space="neurons.{e}")
    roles = ("experts.gate_up", "experts.gate_up.bias")
    specs = [
        TensorSpec(role, spec.name, spec.in_space, None, norm=spec.norm, optional=spec.optional,
                   layout=Experts(_inner(spec)))
        for role, spec in zip(roles, pair, strict=False)
    ]  # fmt: skip
    layout_down = Experts(Transposed(inner) if transposed else inner)
    specs.append(TensorSpec("experts.down", down, "neurons", RESIDUAL, layout=layout_down))
    if biases:
        bias = bias_of(inner, f"{down}_bias")
        specs.append(
            TensorSpec("experts.down.bias", bias.name, None, RESIDUAL, follows="experts.down", optional=True,
                       layout=Experts(bias))
        )  # fmt: skip
    return tuple(specs)


def mlp_or_experts(
    n2: Specs, *, module: str = "mlp", gate: str = "gate", bias: str | None = "gate.e_score_correction_bias",
    shared: str = "shared_experts", biases: str = "", behind: str | None = None,
) -> tuple[Sublayer, ...]:  # fmt: skip
    """The kinds of a layer's second half that models with experts have: an MLP; a router, experts and perhaps one more
    expert that every token takes. A checkpoint may have a tensor for each role of each expert, or one for all experts.

    Args:
        n2: The norm in front, with role ``n2``.
        module: The module of all of them.
        gate: The router's module in it.
        bias: The name of the router's correction bias in it, where there may be one.
        shared: The module of the expert that every token takes.
        biases: Roles of the MLP and of that expert that may have a bias.
        behind: The module of a norm of what is written.
    """
    routes = router(f"{module}.{gate}.weight", bias=f"{module}.{bias}" if bias else None)
    every = tuple(replace(s, optional=True) for s in mlp(gated(f"{module}.{shared}"), prefix="shared.", biases=biases))
    each = experts(gated(module + ".experts.{e}"))
    stacked = stacked_experts(f"{module}.experts.gate_up_proj", f"{module}.experts.down_proj")
    last, last_of_experts = (() if behind is None else norm_behind(role, behind) for role in ("down", "experts"))
    return (
        Sublayer("mlp", (*n2, *mlp(gated(module), biases=biases), *last)),
        Sublayer("experts", (*n2, *routes, *each, *every, *last_of_experts)),
        Sublayer("experts", (*n2, *routes, *stacked, *every, *last_of_experts)),
    )


def mixer(*prefixes: str, writers: Iterable[str]) -> Specs:
    """A mixer that nothing is known about but which of its tensors write to the residual stream.

    Args:
        prefixes: The beginnings of its tensors' names: ``mamba.``.
        writers: The names of the tensors that write to the residual stream.
    """
    return (
        *(TensorSpec(name, name, "mixer", RESIDUAL, opaque=True, optional=name.endswith(".bias")) for name in writers),
        *(TensorSpec(f"{prefix}*", f"{prefix}*", opaque=True) for prefix in prefixes),
    )


def llama_layer(
    biases: str = "", head_norms: Mapping[str, str] | None = None, *, modules: Mapping[str, str] = ATTENTION,
    mlp_modules: Mapping[str, str] = MLP, norms: tuple[str, str] = NORMS, norm_bias: bool = False,
    offset: float = 0.0, behind: tuple[str, str] | None = None,
) -> tuple[tuple[Sublayer, ...], ...]:  # fmt: skip
    """Attention and an MLP, each behind a norm: the layer of Llama.

    Args:
        biases: Roles that may have a bias, separated by spaces.
        head_norms: As in `attention`.
        modules, mlp_modules: The modules by role.
        norms: The norms in front of attention and MLP.
        norm_bias: Whether these have biases.
        offset: Of all norms, as `TensorSpec.offset`.
        behind: Norms of what attention and MLP write, where there are some.
    """
    n1, n2 = (norm(r, name, bias=norm_bias, offset=offset) for r, name in zip(("n1", "n2"), norms, strict=True))
    own = attention(modules, biases=biases, head_norms=head_norms, head_norm_offset=offset)
    ends = zip(("o", "down"), behind or (), strict=False)
    o_norm, down_norm = [norm_behind(role, name, offset=offset) for role, name in ends] or [(), ()]
    return (
        (Sublayer("attention", (*n1, *own, *o_norm)),),
        (Sublayer("mlp", (*n2, *mlp(mlp_modules, biases=biases), *down_norm)),),
    )


def _inner(spec: TensorSpec) -> Layout:
    assert spec.layout is not None
    return spec.layout
