"""How much memory it takes to train the new layers of a model: pure arithmetic on shapes.

It is assumed that the base is frozen, in bfloat16 or as it is quantised; that the new layers are float32 and run under
bfloat16 autocast; that nothing below the lowest new layer keeps anything for the backward pass; and that gradient
checkpointing, where it is used, is that of transformers with ``use_reentrant=False``, layer by layer. Symbols: B
sequences of L tokens, d hidden size, V vocabulary, n elements of the new layers, m elements of the frozen ones, a_i
bytes per token that layer i keeps (`activations`), r bytes of a number of the residual stream (2, or 4 with a float32
base).

==================  ===========================================================================================
term                bytes
==================  ===========================================================================================
base weights        2m (float32: 4m; 8bit: about m; 4bit: 0.5625m, both without embeddings, head and norms; weights
                    that are stored quantised as they are)
new weights         4n
gradients           4n
optimizer states    adamw 8n; adamw_8bit 2.03n; muon 4n for matrices, 8n for the rest; sgd 0
copies              2n: autocast's bfloat16 copies of new matrices, kept for the backward pass; float32 base: also 2
                    for each element of the head and of the frozen matrices above the lowest new layer
activations         B·L·sum(a_i) over the layers from the lowest new one up; with checkpointing B·L·r·d for every
                    layer of the model, and B·L·4d
loss                12·B·L·V: three float32 buffers (log-probabilities, their gradient, that of the logits)
overhead            1 GB: the device's context, its libraries, and fragments of the allocator
==================  ===========================================================================================

Not all of them exist at the same time. The peak is the largest of:

- the start of the backward pass: weights, states, copies, activations, loss; no gradients (unless they accumulate over
  several batches). With checkpointing the copies are freed by then, but exist next to 10·B·L·V of the forward pass.
- the backward pass of layer i: weights, states, activations and copies of the layers up to i, gradients of those from i
  up, and what the arithmetic of one layer takes; with checkpointing also what layer i keeps, computed anew.
- the optimizer's step: weights, states, gradients, and what the step takes (adamw: 4n).

With checkpointing the layers below the lowest new one count, because transformers then lets the output of the
embeddings require gradients. (``model.disable_input_require_grads()`` switches that off, and saves their time, too.)

benchmarks/training_memory.py compares the peak with measured ones.

Reference: PyTorch 2.13 (autograd's saved tensors, the autocast cache, ``foreach`` optimizers), the loss of transformers
5.23; bitsandbytes 0.49 (blocks of 64 with a float32 scale for 4 bits, of 256 for optimizer states); overhead: "Model
training anatomy" in the documentation of transformers, which measures 1.3 GB of an older context.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from ..core.errors import TrainingError, nearest
from .activations import LayerShape, Weight

OVERHEAD = 1_000_000_000
#: the dtypes that a base can be frozen in -> bytes of an element of its matrices
BASES = {"bfloat16": 2.0, "float32": 4.0, "8bit": 1.0, "4bit": 0.5 + 4 / 64}


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer takes, in bytes.

    Attributes:
        matrices: Of states for each element of a matrix.
        others: The same of other tensors.
        step: For each element while it makes a step.
    """

    matrices: float
    others: float
    step: float = 0.0


OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw": Optimizer(8, 8, 4),
    "adamw_8bit": Optimizer(2 + 8 / 256, 8),
    "muon": Optimizer(4, 8),
    "sgd": Optimizer(0, 0),
}


@dataclass(frozen=True)
class TrainingSettings:
    """How the new layers are trained.

    Attributes:
        batch: Sequences in one forward pass, B.
        length: Tokens of a sequence, L.
        optimizer: A name in `OPTIMIZERS`.
        checkpointing: Whether layers are computed anew in the backward pass.
        base: The dtype of the frozen base, a name in `BASES`; weights that are stored quantised stay so, unless it is
            ``float32``.
        accumulate: Whether gradients of several batches are added up before a step.

    Raises:
        TrainingError: a value that is none of these.
    """

    batch: int = 1
    length: int = 2048
    optimizer: str = "adamw"
    checkpointing: bool = False
    base: str = "bfloat16"
    accumulate: bool = False

    def __post_init__(self):
        for name, known in (("optimizer", OPTIMIZERS), ("base", BASES)):
            if (value := getattr(self, name)) not in known:
                raise TrainingError(
                    f"unknown {name}", expected=" | ".join(known), got=repr(value), hint=nearest(value, known)
                )
        for name in ("batch", "length"):
            if (value := getattr(self, name)) < 1:
                raise TrainingError(f"{name} must be positive", expected="at least 1", got=value)

    @property
    def tokens(self) -> int:
        """B·L."""
        return self.batch * self.length


@dataclass(frozen=True)
class ModelShape:
    """A model as training sees it.

    Attributes:
        layers: Of the main stack, the lowest first.
        outside: All other weights: embeddings, head, other stacks.
        hidden: The size of the residual stream, d.
        vocabulary: The rows of the head, V.
        chosen_experts: Experts that a token takes, k.
        capped: Whether the logits go through a tanh, which keeps its output.
        scores: Whether attention keeps its scores, because it caps them.
    """

    layers: tuple[LayerShape, ...]
    outside: tuple[Weight, ...]
    hidden: int
    vocabulary: int
    chosen_experts: int = 0
    capped: bool = False
    scores: bool = False

    @cached_property
    def parameters(self) -> int:
        """The number of all elements, of quantised weights those that they stand for. Tied weights count once."""
        return sum(layer.parameters for layer in self.layers) + sum(w.size for w in self.outside)

    @cached_property
    def new_parameters(self) -> int:
        """The number of elements of the new layers, n."""
        return sum(layer.parameters for layer in self.layers if layer.new)

    @property
    def new_layers(self) -> tuple[int, ...]:
        """Their places among the layers."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.new)

    @property
    def filled_gaps(self) -> tuple[int, ...]:
        """The base layers that new ones follow, counted from the lowest base layer."""
        return tuple(dict.fromkeys(gap for gap, layer in self._with_gaps() if layer.new))

    def with_gaps(self, gaps: Collection[int]) -> ModelShape:
        """The model without the new layers of other gaps.

        Args:
            gaps: Some of `filled_gaps`.
        """
        kept = tuple(layer for gap, layer in self._with_gaps() if not layer.new or gap in gaps)
        return replace(self, layers=kept)

    def _with_gaps(self) -> Iterator[tuple[int, LayerShape]]:
        """Every layer, with the number of the last base layer so far."""
        gap = -1
        for layer in self.layers:
            gap += not layer.new
            yield gap, layer


@dataclass(frozen=True)
class TrainingMemory:
    """The estimate, in bytes. The module's docstring has the formula of each term.

    Attributes:
        settings: How the new layers are trained.
        base_weights, new_weights, gradients, optimizer_states, copies, activations, loss, overhead: The terms.
        peak: The most that exists at the same time.
        phase: When that is: ``loss``, ``backward`` or ``step``.
    """

    settings: TrainingSettings
    base_weights: int
    new_weights: int
    gradients: int
    optimizer_states: int
    copies: int
    activations: int
    loss: int
    overhead: int
    peak: int
    phase: str

    def describe(self) -> dict[str, Any]:
        """The estimate as JSON data."""
        return asdict(self)


def training_memory(model: ModelShape, settings: TrainingSettings) -> TrainingMemory | None:
    """Estimate the memory that training the new layers takes.

    Args:
        model: The model's shape.
        settings: How it is trained.

    Returns:
        The estimate; None where there is nothing to train: no new layer, or new layers that are quantised.
    """
    new = [w for layer in model.layers if layer.new for w in layer.weights]
    if not new or any(w.quantized for w in new):
        return None
    optimizer = OPTIMIZERS[settings.optimizer]
    size = model.new_parameters
    in_matrices = sum(w.size for w in new if len(w.shape) == 2)
    states = round(optimizer.matrices * in_matrices + optimizer.others * (size - in_matrices))
    steps = round(max(optimizer.step * size, 8 * max(w.size for w in new)))
    passes = _Passes(model, settings)
    always = passes.base_weights + 4 * size + states + OVERHEAD
    phases = {
        "loss": passes.loss_peak,
        "backward": max(passes.backward(i) for i in range(passes.begin, passes.top)),
        "step": 4 * size + steps,
    }
    phase = max(phases, key=lambda name: phases[name])
    return TrainingMemory(
        settings=settings,
        base_weights=passes.base_weights,
        new_weights=4 * size,
        gradients=4 * size,
        optimizer_states=states,
        copies=passes.copies(passes.top),
        activations=passes.activations(passes.top),
        loss=passes.loss(12),
        overhead=OVERHEAD,
        peak=always + phases[phase],
        phase=phase,
    )


class _Passes:
    """The bytes that forward and backward pass take, for one model and its settings."""

    def __init__(self, model: ModelShape, settings: TrainingSettings):
        self._model, self._settings = model, settings
        lowest, self.top = model.new_layers[0], len(model.layers)
        self.begin = 0 if settings.checkpointing else lowest  # where the backward pass ends
        self._wide = settings.base == "float32"
        scores = settings.length if model.scores else 0
        sizes = model.hidden, model.chosen_experts
        kept = [layer.kept(*sizes, scores=scores, wide=self._wide) for layer in model.layers]  # per token
        self._kept = [settings.tokens * per_token for per_token in kept]
        copied = [2 * shape.cast * (shape.new or self._wide) for shape in model.layers]
        self._copied = copied
        # with checkpointing only those that autocast caches, of weights that are trained, outlive their layer
        outlive = [c * (shape.new or not settings.checkpointing) for c, shape in zip(copied, model.layers, strict=True)]
        self._gradients = [4 * shape.parameters * shape.new for shape in model.layers]
        self._sums = {
            "kept": _sums(self._kept, lowest),
            "copies": _sums(outlive, lowest),
            "gradients": _sums(self._gradients, lowest),
        }
        self._work = [4 * settings.tokens * shape.widest(*sizes) + self._dequantized(shape) for shape in model.layers]

    @cached_property
    def base_weights(self) -> int:
        """The frozen weights."""
        base, total = self._settings.base, 0.0
        frozen = [w for layer in self._model.layers if not layer.new for w in layer.weights]
        for weights, in_layers in ((self._model.outside, False), (frozen, True)):
            for weight in weights:
                if weight.quantized and not self._wide:
                    total += weight.nbytes
                else:
                    total += weight.size * BASES[base if self._wide or (in_layers and weight.is_matrix) else "bfloat16"]
        return round(total)

    def _dequantized(self, layer: LayerShape) -> int:
        """The bfloat16 values of the largest quantised matrix of a layer, which exist while it multiplies."""
        coded = self._settings.base in ("8bit", "4bit") and not layer.new
        return max((2 * w.size for w in layer.weights if w.is_matrix and (w.quantized or coded)), default=0)

    def activations(self, end: int) -> int:
        """What the layers up to ``end``, which is not included, keep from the forward pass."""
        if self._settings.checkpointing:  # the input of each layer; and that of the final norm in float32
            per_number = 4 * end if self._wide else 2 * end + 4
            return per_number * self._settings.tokens * self._model.hidden
        return self._sums["kept"][end]

    def copies(self, end: int) -> int:
        """What autocast's copies of the weights of the layers up to ``end`` take, and of the head."""
        head = 2 * self._model.vocabulary * self._model.hidden * self._wide
        return head + self._sums["copies"][end]

    def loss(self, per_logit: int) -> int:
        """Buffers of the loss.

        Args:
            per_logit: Bytes for each logit.
        """
        return (per_logit + 2 * self._model.capped) * self._settings.tokens * self._model.vocabulary

    @property
    def loss_peak(self) -> int:
        """The loss in forward and backward pass."""
        forward, backward = self.loss(10) + self.copies(self.top), self.loss(12)
        if not self._settings.checkpointing:
            backward += self.copies(self.top)
        accumulated = self._sums["gradients"][self.top] if self._settings.accumulate else 0
        return self.activations(self.top) + max(forward, backward) + accumulated

    def backward(self, layer: int) -> int:
        """The backward pass of a layer."""
        below = 0 if self._settings.accumulate else self._sums["gradients"][layer]
        gradients = self._sums["gradients"][self.top] - below
        held = self.activations(layer + 1) + gradients + self._work[layer]
        if self._settings.checkpointing:
            return held + self._kept[layer] + self._copied[layer]
        return held + self.copies(layer + 1)


def _sums(values: Sequence[int], first: int) -> list[int]:
    """Element i is the sum of the values from ``first`` up to i, which is not included."""
    return [0] * first + list(accumulate(values[first:], initial=0))
