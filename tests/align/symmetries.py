"""Random elements of the group of symmetries of attention, which alignment must be able to undo."""

from __future__ import annotations

import torch

from deus_merge.align.heads import AttentionAlignment
from deus_merge.models.spec import Heads


def random_symmetry(heads: Heads, seed: int) -> AttentionAlignment:
    """A permutation of groups and of heads inside groups, value rotations, and rotary turns that the family allows."""
    g = torch.Generator().manual_seed(seed)
    n, per_group, h = heads.key_value, heads.query // heads.key_value, heads.size
    groups = torch.randperm(n, generator=g).tolist()
    queries = [i * per_group + j for i in groups for j in torch.randperm(per_group, generator=g).tolist()]
    values = torch.linalg.qr(torch.randn(n, h, h, generator=g, dtype=torch.float64)).Q  # (G, h, h)
    angles = 2 * torch.pi * torch.rand(n, h // 2, generator=g, dtype=torch.float64)  # (G, h/2)
    turns = torch.polar(torch.ones_like(angles), angles)
    if heads.rotary != "phases":
        turns = turns.real.sign().to(turns) if heads.rotary == "signs" else None
    return AttentionAlignment(tuple(groups), tuple(queries), values, turns, torch.ones(n), 1.0, 1.0, 1.0, 1.0, heads)
