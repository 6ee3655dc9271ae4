"""The pre-norm decoder layer of Llama and related families (roles: n1, q, k, v, o, n2, gate, up, down)."""

from __future__ import annotations

from ..family import RESIDUAL, TensorSpec

PROJECTIONS = {
    "q": TensorSpec("q", "self_attn.q_proj.weight", RESIDUAL, "query_heads"),
    "k": TensorSpec("k", "self_attn.k_proj.weight", RESIDUAL, "key_heads"),
    "v": TensorSpec("v", "self_attn.v_proj.weight", RESIDUAL, "value_heads"),
    "o": TensorSpec("o", "self_attn.o_proj.weight", "value_heads", RESIDUAL),
    "gate": TensorSpec("gate", "mlp.gate_proj.weight", RESIDUAL, "neurons"),
    "up": TensorSpec("up", "mlp.up_proj.weight", RESIDUAL, "neurons"),
    "down": TensorSpec("down", "mlp.down_proj.weight", "neurons", RESIDUAL),
}


def decoder_layer(biases: str = "", head_norms: bool = False) -> tuple[TensorSpec, ...]:
    """The layer's tensors in the order in which alignment processes them.

    Args:
        biases: Roles that may have a bias, separated by spaces.
        head_norms: Whether q and k are normalised per head, by weights of shape (h,).
    """
    biased = biases.split()

    def projection(role: str) -> list[TensorSpec]:
        weight = PROJECTIONS[role]
        specs = [weight]
        if role in biased:
            name = weight.name.replace(".weight", ".bias")
            specs.append(TensorSpec(f"{role}.bias", name, None, weight.out_space, follows=role, optional=True))
        if head_norms and role in ("q", "k"):
            name = f"self_attn.{role}_norm.weight"
            specs.append(TensorSpec(f"{role}_norm", name, None, weight.out_space, follows=role, multiplies=True))
        return specs

    attention = [s for role in ("q", "k", "v", "o") for s in projection(role)]
    mlp = [s for role in ("gate", "up", "down") for s in projection(role)]
    n1 = TensorSpec("n1", "input_layernorm.weight", None, RESIDUAL)
    n2 = TensorSpec("n2", "post_attention_layernorm.weight", None, RESIDUAL)
    return (n1, *attention, n2, *mlp)
