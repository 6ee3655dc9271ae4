"""Latent attention: heads that are made from latent components, by two matrices with a norm between them."""

from __future__ import annotations

from dataclasses import replace

from ..layouts import PerHead, Stacked
from ..spec import RESIDUAL, TensorSpec
from ._pieces import Specs, bias_of, projection


def latent_attention(module: str = "self_attn", *, norm: str = "n1") -> Specs:
    """Attention whose heads are made from latent components of queries (q_a) and of keys and values (kv_a), each with a
    norm. The first components of each query and key are not rotary; the rotary ones of keys are the same for all heads.
    Some models have an indexer, which makes queries of its own from q_a's components.

    Args:
        module: The module of all its tensors.
        norm: The norm in front.
    """
    queries = "neurons.query"
    q_a = TensorSpec("q_a", f"{module}.q_a_proj.weight", RESIDUAL, queries, norm=norm)
    q_b = f"{module}.q_b_proj.weight"
    indexer = (
        TensorSpec("index_q", f"{module}.indexer.wq_b.weight", queries, "index_queries", norm="q_a_norm"),
        TensorSpec("index_k", f"{module}.indexer.wk.weight", RESIDUAL, "index_keys", norm=norm),
        TensorSpec(
            "index_k_norm", f"{module}.indexer.k_norm.weight", None, "index_keys", follows="index_k", multiplies=True
        ),
        TensorSpec("index_k_norm.bias", f"{module}.indexer.k_norm.bias", None, "index_keys", follows="index_k"),
        TensorSpec("index_weights", f"{module}.indexer.weights_proj.weight", RESIDUAL, "index_heads", norm=norm),
    )
    return (
        q_a,
        bias_of(q_a, f"{module}.q_a_proj.bias"),
        TensorSpec("q_a_norm", f"{module}.q_a_layernorm.weight", None, queries, follows="q_a", multiplies=True),
        *(replace(spec, optional=True) for spec in indexer),
        *_heads(module, TensorSpec("q_b", q_b, queries, layout=PerHead(_queries(q_b, queries, "q_a_norm"))), norm),
    )


def direct_latent_attention(module: str = "self_attn", *, norm: str = "n1") -> Specs:
    """`latent_attention` whose queries are made from the residual stream, by ``q_proj``."""
    name = f"{module}.q_proj.weight"
    return _heads(
        module, TensorSpec("q_b", name, RESIDUAL, norm=norm, layout=PerHead(_queries(name, RESIDUAL, norm))), norm
    )


def _queries(name: str, space: str, norm: str) -> Specs:
    return (
        TensorSpec("q", name, space, "query_heads", norm=norm),
        TensorSpec("q_rotary", name, space, "gate_heads", norm=norm),
    )


def _heads(module: str, query: TensorSpec, norm: str) -> Specs:
    """The latent components of keys and values, and then the heads: these are compared when all components are."""
    space, weight, bias = (
        "neurons.key_value",
        f"{module}.kv_a_proj_with_mqa.weight",
        f"{module}.kv_a_proj_with_mqa.bias",
    )
    latent = TensorSpec("kv_latent", weight, RESIDUAL, space, norm=norm)
    rotary = TensorSpec("k_rotary", weight, RESIDUAL, "rotary", norm=norm)
    made = f"{module}.kv_b_proj.weight"
    pair = (("k", "key_heads"), ("v", "value_heads"))
    heads = PerHead(tuple(TensorSpec(role, made, space, to, norm="kv_a_norm") for role, to in pair))
    return (
        TensorSpec("kv_a", weight, RESIDUAL, norm=norm, layout=Stacked((latent, rotary))),
        TensorSpec("kv_a.bias", bias, optional=True, layout=Stacked((bias_of(latent, bias), bias_of(rotary, bias)))),
        TensorSpec("kv_a_norm", f"{module}.kv_a_layernorm.weight", None, space, follows="kv_latent", multiplies=True),
        query,
        TensorSpec("kv_b", made, space, layout=heads),
        *projection("o", f"{module}.o_proj", norm=None, bias=True),
    )
