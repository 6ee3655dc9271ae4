"""Cohere: attention and MLP in parallel behind one norm; norms of queries and keys may be each head's own."""

from ..family import Case, Family, Sublayer
from ..layouts import Flattened
from ..spec import TensorSpec
from ._pieces import attention, mlp, norm


def _head_norm(role: str, space: str) -> TensorSpec:
    inner = TensorSpec(
        f"{role}_norm", f"self_attn.{role}_norm.weight", None, space, follows=role, multiplies=True, optional=True
    )
    return TensorSpec(inner.role, inner.name, optional=True, layout=Flattened(inner))


def _with_norms() -> tuple[TensorSpec, ...]:
    norms = {"q": _head_norm("q", "query_heads"), "k": _head_norm("k", "key_heads")}
    return tuple(s for spec in attention(biases="q k v o") for s in (spec, *(
        [norms[spec.role[0]]] if spec.role in ("q.bias", "k.bias") else [])))  # fmt: skip


SUBLAYERS = (
    (Sublayer("attention", (*norm("n1", "input_layernorm"), *_with_norms())),),
    (Sublayer("mlp", mlp(norm="n1")),),
)
FAMILY = Family(
    "cohere", ("cohere", "cohere2"), SUBLAYERS, rotary="phases", interleaved=True,
    cases=(Case("use_qk_norm", {"rotary": "per-head norms subtract the mean of a head's components"}),),
)  # fmt: skip
