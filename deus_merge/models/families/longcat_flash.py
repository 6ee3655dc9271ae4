"""LongCat-Flash: a layer is two of latent attention and MLP, with experts beside the second, some of which are the
identity."""

from ..family import Family, Sublayer
from ._pieces import experts, gated, mixer, mlp, norm, router


def _attention(number: int) -> Sublayer:
    module = f"self_attn.{number}"
    writers = (f"{module}.o_proj.weight", f"{module}.o_proj.bias")
    return Sublayer(
        "latent attention",
        (*norm(f"n1.{number}", f"input_layernorm.{number}"), *mixer(f"{module}.", writers=writers)),
    )


def _mlp(number: int) -> Sublayer:
    before = f"n2.{number}"
    own = mlp(gated(f"mlps.{number}"), norm=before, prefix=f"mlp{number}.")
    routed = (
        *router("mlp.router.classifier.weight", norm=before, bias="mlp.router.e_score_correction_bias"),
        *experts(norm=before),
    )
    return Sublayer(
        "mlp and experts" if number == 0 else "mlp",
        (*norm(before, f"post_attention_layernorm.{number}"), *(() if number else routed), *own),
    )


FAMILY = Family(
    "longcat_flash", ("longcat_flash",), tuple((half(n),) for n in (0, 1) for half in (_attention, _mlp)),
    layers_key="num_layers", without={"experts": "the last rows of the router stand for the identity"},
    no_identity="some of its experts are the identity, which adds to the residual stream",
)  # fmt: skip
