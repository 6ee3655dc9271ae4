"""What transformers calculates for each layer where a config has no list, family by family.

Reference: the configuration classes of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping

from .base import Scope
from .by_key import FULL, INDEXED, LINEAR, SLIDING


def one_window(scope: Scope) -> list[str]:
    return [FULL if scope.section.get("sliding_window", 4096) is None else SLIDING] * scope.depth


def qwen2_moe_types(scope: Scope) -> list[str]:
    used, first = scope.section.get("use_sliding_window"), scope.get("max_window_layers", 28)
    return [SLIDING if used and i % 2 == 0 and i < first else FULL for i in range(scope.depth)]


def cohere2_moe_types(scope: Scope) -> list[str]:
    first = scope.get("first_k_dense_replace", 0)
    head, rest = scope.get("prefix_dense_sliding_window_pattern", 1), scope.get("sliding_window_pattern", 4)
    places = [(i, head) if i < first else (i - first, rest) for i in range(scope.depth)]
    return [SLIDING if (i + 1) % k else FULL for i, k in places]


def beam_types(scope: Scope) -> list[str]:
    return [SLIDING if (i + 1) % 6 and i < scope.depth - 1 else FULL for i in range(scope.depth)]


def flint_types(scope: Scope) -> list[str]:
    n = scope.depth
    return [FULL if i < 2 or i % 4 == 1 or i == n - 1 else SLIDING for i in range(n)]


def dots3_types(scope: Scope) -> list[str]:
    full = FULL if scope.section.get("use_dsa") is False else INDEXED
    windows = scope.section.get("use_sliding_window", True)
    return [full if not windows or i < 2 or i % 4 == 1 else SLIDING for i in range(scope.depth)]


def olmo_hybrid_types(scope: Scope) -> list[str]:
    n = scope.depth
    return [FULL if i % 4 == 3 or (n < 4 and i == n - 1) else LINEAR for i in range(n)]


def from_the_end(scope: Scope) -> list[str]:
    return [FULL if (scope.depth - 1 - i) % 4 == 0 else SLIDING for i in range(scope.depth)]


def zamba_types(scope: Scope) -> list[str]:
    period, offset = scope.get("attn_layer_period", 6), scope.get("attn_layer_offset", 4)
    rest = ["hybrid" if i % period == offset else LINEAR for i in range(scope.depth - 3)]
    return ([LINEAR, LINEAR, "hybrid"] + rest)[: scope.depth]


def deepseek_v4_types(scope: Scope) -> list[str]:
    kinds = ("heavily_compressed_attention", "compressed_sparse_attention")
    return [kinds[0] if i < 2 else kinds[i % 2] for i in range(scope.depth)]


def topk_types(scope: Scope) -> list[str]:
    every, offset = max(scope.get("index_topk_freq", 1), 1), scope.get("index_skip_topk_offset", 2)
    return ["full" if max(i - offset + 1, 0) % every == 0 else "shared" for i in range(scope.depth)]


def deepstack(scope: Scope) -> int:
    """How many of the first text layers receive features of the vision tower."""
    vision = scope.root.get("vision_config")
    marks = vision.get("deepstack_visual_indexes", [8, 16, 24]) if isinstance(vision, Mapping) else []
    return len(marks) if isinstance(marks, list) else 0


def moe_numbers(scope: Scope) -> list[str]:
    listed = scope.get("moe_layers_enum")
    numbers = listed.split(",") if isinstance(listed, str) else listed
    sparse = range(3, scope.depth) if numbers is None else {int(n) for n in numbers if str(n).strip()}
    return ["sparse" if i in sparse else "dense" for i in range(scope.depth)]


def linear_layers(scope: Scope) -> list[bool]:
    kinds = scope.get("layer_types") or [LINEAR if i % 2 else FULL for i in range(scope.depth)]
    return [kind in (LINEAR, "linear_attention") for kind in kinds]


def some_hybrid(scope: Scope) -> list[bool]:
    kinds = scope.get("layers_block_type") or scope.get("layer_types") or zamba_types(scope)
    return ["hybrid" in kinds] * scope.depth
