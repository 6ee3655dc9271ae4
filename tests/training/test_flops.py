"""The floating-point operations that comparisons report, of attention with and without grouped queries."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from deus_merge.training.comparison import flops


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_counts_as_its_products(kv_heads):
    """Two products forward; of the backward pass the scores again, and the gradients of both products."""
    heads, queries, keys, size = 6, 32, 48, 16
    q = torch.randn(2, heads, queries, size, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, keys, size, requires_grad=True) for _ in range(2))
    product = 2 * 2 * heads * queries * keys * size
    with flops.flop_counter() as counter:
        out = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert counter.get_total_flops() == 2 * product
    with flops.flop_counter() as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * product


def test_every_kernel_of_this_torch_is_known():
    """Kernels that only a GPU has are counted there by the same formulas."""
    fused = {
        name.removeprefix("_scaled_dot_product_").removesuffix("_backward")
        for name in torch._C._dispatch_get_all_op_names()
        for name in [name.partition("::")[2].partition(".")[0]]
        if name.startswith("_scaled_dot_product_") and name.endswith("_backward")
    }
    assert fused - {"fused_attention_overrideable"} == set(flops._KERNELS)
