"""What the backward pass of a layer keeps, from the shapes of the layer's tensors.

The counts are those of PyTorch's autograd on the layers of transformers, with scaled-dot-product attention, which keeps
no scores, under bfloat16 autocast. Per token, for a layer of attention (q, k, v, o) and a gated MLP (gate, up, down):

=====================  ================================  ==========================================
kept by                frozen layer, bytes               trained layer (float32 weights) in addition
=====================  ================================  ==========================================
each norm of width w   4w (its input in float32)         2w (what the weight multiplies; 4w with a float32 base;
                                                         0 for a LayerNorm)
q, k, v                2(Hh + 2Gh)                       2d each (autocast casts the input for each)
attention              2Hh (its output) + 4H             0 (``o`` reads the same values)
gate, up               2 · 2f                            2d each
activation             2f (of the gate)                  2f (the product, which ``down`` reads)
k chosen experts       2k(3f + d)                        the same in 4 bytes, and 4k(d + f)
scores with a softcap  8HL (attention is then eager)     0
=====================  ================================  ==========================================

A matrix of another kind (latent attention, a router, the projections of a state-space mixer) counts by the same rule:
its output, and its input where it is trained. Approximate are: state-space and linear-attention mixers, of which only
the projections count (as with fused kernels; the plain torch code keeps several times as much), layers of families that
nobody described, and attention that keeps its scores for another reason than a softcap (eager by choice, or heads of
unequal sizes on some devices).

Reference: the way of counting is that of Korthikanti et al., arXiv 2205.05198, section 4.1, without tensor parallelism
and dropout, with the saved tensors of PyTorch 2.13 and transformers 5.23.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ..models.layouts import Transposed
from ..models.spec import RESIDUAL, Heads, TensorSpec

_EXPERT = re.compile(r"\bexperts\b(?:\.(\d+)\b)?")
_DOWN = re.compile(r"\b(down|down_proj|w2|fc2|output_linear)\b")
_HALF, _FULL = 2, 4  # bytes of a bfloat16 and a float32 number
_SCORE = 8  # of a score with a softcap: the tanh, the softmax in float32, and what it is rounded to


@dataclass(frozen=True)
class Weight:
    """A tensor as training sees it.

    Attributes:
        role: Its role in the layer, or its name.
        shape: Its sizes.
        nbytes: Its size in the checkpoint in bytes.
        quantized: Whether it is stored as codes.
        spec: The family's description, where there is one.
    """

    role: str
    shape: tuple[int, ...]
    nbytes: int
    quantized: bool = False
    spec: TensorSpec | None = None

    @cached_property
    def size(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether a linear layer multiplies by it."""
        return len(self.shape) > 1 and not self.role.endswith("bias")

    @cached_property
    def expert(self) -> bool:
        """Whether it belongs to one of the experts that a router chooses, or to all of them."""
        return bool(_EXPERT.search(self.role))

    @property
    def rows(self) -> int:
        """The size of its output per token: n of (n, columns)."""
        return self.shape[1] if self.spec and isinstance(self.spec.layout, Transposed) else self.shape[0]

    @property
    def columns(self) -> int:
        """The size of its input per token. A convolution over time (n, 1, w) reads as many channels as it writes."""
        if len(self.shape) != 2:
            return self.shape[0]
        return self.shape[0] + self.shape[1] - self.rows

    def writes(self, hidden: int) -> bool:
        """Whether its output is added to the residual stream of size ``hidden``, and so is not kept."""
        if self.spec is not None:
            return self.spec.writes_residual
        return self.rows == hidden < self.columns


@dataclass(frozen=True)
class LayerShape:
    """A layer as training sees it.

    Attributes:
        new: Whether it is trained.
        weights: Its tensors.
        heads: Its attention heads, where they are known.
    """

    new: bool
    weights: tuple[Weight, ...]
    heads: Heads | None = None

    @cached_property
    def parameters(self) -> int:
        """The number of its elements."""
        return sum(w.size for w in self.weights)

    @cached_property
    def cast(self) -> int:
        """Elements of the matrices that autocast copies to bfloat16; grouped products of experts are not cast."""
        return sum(w.size for w in self.matrices)

    @cached_property
    def matrices(self) -> tuple[Weight, ...]:
        """Its matrices, without those of experts that a router chooses."""
        return tuple(w for w in self.weights if w.is_matrix and not w.expert)

    @cached_property
    def by_role(self) -> Mapping[str, Weight]:
        """Its tensors by role."""
        return {w.role: w for w in self.weights}

    def kept(self, hidden: int, chosen: int, *, scores: int = 0, wide: bool = False) -> int:
        """Bytes per token that its backward pass needs.

        Args:
            hidden: The size of the residual stream, d.
            chosen: The number of experts that a token takes, k.
            scores: The attention scores of a token and a head that are kept, L or 0.
            wide: Whether the residual stream is float32.
        """
        total = sum(self._norm(w, hidden, wide) for w in self.weights)
        total += sum(self._writer(w) if w.writes(hidden) else self._reader(w) for w in self.matrices)
        if self.heads and any(w.writes(hidden) and not _is_mlp(w) for w in self.matrices):
            total += self.heads.query * (_FULL + _SCORE * scores)
        return total + self._experts(hidden, chosen)

    def widest(self, hidden: int, chosen: int) -> int:
        """The largest output of one of its matrices, in elements per token."""
        experts = any(w.expert for w in self.weights)
        return max([hidden, *(w.rows for w in self.matrices), chosen * hidden if experts else 0])

    def _norm(self, weight: Weight, hidden: int, wide: bool) -> int:
        spec, role = weight.spec, weight.role
        if len(weight.shape) != 1 or role.endswith("bias") or weight.expert:
            return 0
        if (spec is None or spec.opaque) and not ("norm" in role or weight.shape[0] == hidden):
            return 0
        width = weight.shape[0]
        if spec is not None and spec.follows is not None and spec.out_space != RESIDUAL:
            followed = self.by_role.get(spec.follows)
            width = max(width, followed.rows if followed else self._head_rows(spec.follows))
        fused = f"{role.removesuffix('.weight')}.bias" in self.by_role  # a LayerNorm keeps its input alone
        return (_FULL + (_FULL if wide else _HALF) * (self.new and not fused)) * width

    def _head_rows(self, role: str) -> int:
        """The rows of q or k, where these are part of a tensor."""
        counts = {"q": self.heads.query, "k": self.heads.key_value} if self.heads else {}
        return counts.get(role, 0) * (self.heads.size if self.heads else 0)

    def _reader(self, weight: Weight) -> int:
        rows = weight.rows
        if weight.role == "kv_b" and (queries := self.by_role.get("q_b")):
            rows += queries.rows  # keys are put together from latent and rotary components
        return _HALF * (rows + weight.columns * self.new)

    def _writer(self, weight: Weight) -> int:
        if not _is_mlp(weight):
            return _HALF * weight.columns
        beginning = weight.role.removesuffix("down")
        gated = weight.spec is None or any(beginning + role in self.by_role for role in ("gate", "gate_up"))
        return _HALF * weight.columns * (gated + self.new)

    def _experts(self, hidden: int, chosen: int) -> int:
        every = [w for w in self.weights if w.expert and w.is_matrix]
        if not every:
            return 0
        numbers = {match[1] for w in every if (match := _EXPERT.search(w.role)) and match[1]}
        count = len(numbers) or max(1, every[0].shape[0])
        down = [w for w in every if (w.spec and w.spec.writes_residual) or _DOWN.search(w.role)]
        neurons = sum(w.size for w in down) // (count * hidden)  # f
        rows = sum(w.size for w in every) // (count * hidden) - neurons  # 2f with a gate
        kept = rows + hidden + (neurons if rows >= 2 * neurons else 0)
        taken = min(chosen, count)
        return taken * (_FULL * (kept + hidden + neurons) if self.new else _HALF * kept)


def _is_mlp(weight: Weight) -> bool:
    """Whether a matrix that writes to the residual stream reads neurons, or nobody described what it reads."""
    return weight.spec is None or (weight.spec.in_space or "").startswith("neurons")
