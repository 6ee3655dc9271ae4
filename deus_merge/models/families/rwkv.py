"""RWKV 4: time mixing and channel mixing; the first layer has one more norm, in front of all."""

from dataclasses import replace

from ..family import Family, Sublayer
from ._pieces import mixer, norm

PRE = tuple(replace(spec, optional=True) for spec in norm("pre", "pre_ln", bias=True))
SUBLAYERS = (
    (
        Sublayer(
            "time mixing",
            (*PRE, *norm("n1", "ln1", bias=True), *mixer("attention.", writers=("attention.output.weight",))),
        ),
    ),
    (
        Sublayer(
            "channel mixing",
            (*norm("n2", "ln2", bias=True), *mixer("feed_forward.", writers=("feed_forward.value.weight",))),
        ),
    ),
)
FAMILY = Family(
    "rwkv", ("rwkv",), SUBLAYERS, layer_prefix="rwkv.blocks.{layer}.", before=("rwkv.embeddings.weight",),
    after=("rwkv.ln_out.weight", "rwkv.ln_out.bias", "head.weight"), tied=("head.weight",),
)  # fmt: skip
