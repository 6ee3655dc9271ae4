"""Apertus: an MLP without a gate whose activation has parameters; queries and keys normalised per head."""

from ..family import Family, Sublayer
from ..spec import TensorSpec
from ._pieces import HEAD_NORMS, PLAIN_MLP, llama_layer

_ATTENTION, (_MLP,) = llama_layer(
    "q k v o", HEAD_NORMS, mlp_modules=PLAIN_MLP, norms=("attention_layernorm", "feedforward_layernorm")
)
_ACTIVATION = TensorSpec("mlp.act_fn.*", "mlp.act_fn.*", opaque=True, optional=True)
FAMILY = Family("apertus", ("apertus",), (_ATTENTION, (Sublayer("mlp", (*_MLP.tensors, _ACTIVATION)),)), rotary="signs")
