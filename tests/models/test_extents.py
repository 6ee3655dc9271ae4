"""Shapes are cut as torch cuts tensors, by every layout."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from deus_merge.models.extents import Extents
from deus_merge.models.layouts import Alternating, Experts, Flattened, InBlocks, PerGroup, PerHead, Stacked, Transposed
from deus_merge.models.spec import Heads, TensorSpec

Q, K, V = (TensorSpec(f"{role}{{e}}", role, "residual", f"{space}_heads") for role, space in
           (("q", "query"), ("k", "key"), ("v", "value")))  # fmt: skip
GATE, UP = (TensorSpec(f"{role}{{e}}", role, "residual", "neurons") for role in ("gate", "up"))
SIMPLE = st.sampled_from([
    Stacked((Q, K, V)), Stacked((GATE, UP)), Stacked((Q, GATE, UP)), PerGroup((Q, K, V)), PerHead((Q, GATE)),
    InBlocks((Q, V, K), 2), Alternating((GATE, UP)), Flattened(GATE), GATE,
])  # fmt: skip
TURNED = SIMPLE | st.builds(Transposed, SIMPLE)
LAYOUTS = (TURNED | st.builds(Experts, TURNED)).filter(lambda layout: layout is not GATE)
HEADS = st.builds(Heads, st.sampled_from([2, 4]), st.sampled_from([1, 2]), st.integers(1, 3))
SIZES = st.lists(st.integers(0, 24) | st.sampled_from([8, 12, 16, 24, 48]), min_size=1, max_size=4)


def cut(layout, tensor, heads):
    try:
        return {role: tuple(view.shape) for role, view in layout.split(tensor, heads).items()}
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return None


@given(LAYOUTS, st.none() | HEADS, SIZES)
def test_as_torch(layout, heads, sizes):
    assert cut(layout, Extents(sizes), heads) == cut(layout, torch.empty(sizes, device="meta"), heads)
