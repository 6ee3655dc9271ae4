"""Runs a model of transformers one layer at a time, with the arguments that its own forward pass gives each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...checkpoint.tensor_source import TensorSource
from ...models.built import build, resolved_config
from ...models.streamed import CannotStream, Part, StreamedModel, all_held
from ...models.view import ModelView

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class _Call:
    """The arguments of a layer besides the hidden states, and whether these are given by name."""

    arguments: tuple
    named: dict[str, Any]
    by_name: bool


class _Stop(Exception):
    """Ends a forward pass of which no more is needed."""


class LayerRunner:
    """The layers of a model, its embeddings and its head, each run alone.

    The model's own forward pass is run with functions in place of its layers: they record what each layer is given
    (masks, rotary embeddings), which must be the same for all windows, and they hand hidden states to the head.

    Args:
        source: The checkpoint.
        view: The checkpoint by layer and role.
        device: Where the arithmetic is done.
        dtype: Of the arithmetic; None for float32.

    Attributes:
        width: The size of a hidden state, d.

    Raises:
        CannotBuild: transformers cannot build the model.
        CannotStream: its parts cannot be run alone.
    """

    def __init__(
        self,
        source: TensorSource,
        view: ModelView,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ):
        config = resolved_config(source.config)
        if getattr(config, "is_encoder_decoder", False):
            raise CannotStream("it has an encoder and a decoder")
        self._streamed = StreamedModel(build(config, language_model=True), view, source, device=device, dtype=dtype)
        self._model, self._device = self._streamed.model, device
        self._embeddings: Any = self._model.get_input_embeddings()
        self._unembedding: Any = self._model.get_output_embeddings()
        if self._unembedding is None:
            raise CannotStream("it has no language model's head")
        self._layers = [part.module for part in self._streamed.layers]
        self._bottom = [part for part in self._streamed.others if part.module is self._embeddings]
        self._head = [part for part in self._streamed.others if part.module is not self._embeddings]
        self._streamed.load_when_called(self._streamed.others)
        self._calls: dict[int, list[_Call]] = {}  # by the number of windows in a batch
        self._in_tuple: bool | None = None  # whether layers give a tuple, whose first entry are the hidden states
        self.width = 0

    @property
    def depth(self) -> int:
        return len(self._layers)

    @property
    def layers(self) -> Sequence[Part]:
        """The layers with their weights; they are loaded by `Part.held`."""
        return self._streamed.layers

    @property
    def vocabulary(self) -> int:
        """The number of tokens that embeddings and head have rows for."""
        return min(int(module.weight.shape[0]) for module in (self._embeddings, self._unembedding))

    @property
    def dtype(self) -> torch.dtype:
        return self._streamed.dtype

    def module(self, name: str) -> torch.nn.Module:
        """A module by its name in the model."""
        return self._model.get_submodule(name)

    def read_from(self, source: TensorSource) -> None:
        """Read all weights from another checkpoint of the same layout from now on."""
        self._streamed.source = source

    def embedding(self) -> AbstractContextManager[None]:
        """Keep the embeddings in memory."""
        return all_held(self._bottom)

    def head(self) -> AbstractContextManager[None]:
        """Keep everything outside of the layers but the embeddings in memory."""
        return all_held(self._head)

    def embed(self, ids: Tensor) -> Tensor:
        """The hidden states in front of the first layer.

        Args:
            ids: Token ids, (b, t).

        Returns:
            (b, t, d).

        Raises:
            CannotStream: the layers cannot be run alone.
        """
        import torch

        with torch.no_grad():
            if self._in_tuple is None:
                hidden, calls = self._record(ids, 1)
                with self.layers[0].held():
                    self._in_tuple = isinstance(self._run(0, calls[0], hidden), tuple)
            hidden, calls = self._record(ids, self.depth)
        known = self._calls.setdefault(len(ids), calls)
        if not all(_same(one, other) for one, other in zip(calls, known, strict=True)):
            raise CannotStream("its layers are given more of the text than their hidden states")
        self.width = hidden.shape[-1]
        return hidden

    def layer(self, index: int, hidden: Tensor) -> Tensor:
        """One layer, whose weights must be in memory: (b, t, d) -> (b, t, d)."""
        found = self._run(index, self._calls[len(hidden)][index], hidden)
        return found[0] if self._in_tuple else found

    def losses(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The summed loss of each window's predictions, from the hidden states behind the last layer.

        Args:
            hidden: (b, t, d).
            ids: The windows, (b, t).

        Returns:
            In nats, (b,).
        """
        import torch

        output = (hidden,) if self._in_tuple else hidden
        functions: dict[Any, Callable] = {module: lambda *_, **__: output for module in self._layers}
        functions[self._embeddings] = lambda *_, **__: hidden.detach()
        with ExitStack() as stack:
            for part in self._bottom:
                stack.enter_context(part.idle())
            stack.enter_context(_replaced(functions))
            logits = self._model(ids.to(self._device), use_cache=False).logits  # (b, t, v)
        targets = ids.to(self._device).roll(-1, 1)  # (b, t)
        targets[:, -1] = -100  # of the last token nothing is known
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
        )
        return losses.view(len(ids), -1).sum(1)

    def _run(self, index: int, call: _Call, hidden: Tensor) -> Any:
        arguments = call.arguments if call.by_name else (hidden, *call.arguments)
        named = {**call.named, "hidden_states": hidden} if call.by_name else call.named
        with self._deterministic():
            return self._layers[index](*arguments, **named)

    def _deterministic(self) -> AbstractContextManager:
        """On CUDA, the attention whose gradients are the same every time."""
        if str(self._device).startswith("cuda"):
            from torch.nn.attention import SDPBackend, sdpa_kernel

            return sdpa_kernel(SDPBackend.MATH)
        return nullcontext()

    def _record(self, ids: Tensor, count: int) -> tuple[Tensor, list[_Call]]:
        """The hidden states in front of the layers, and the arguments of the first ``count`` of these."""
        calls: list[_Call] = []
        first: list[Tensor] = []

        def record(*arguments: Any, **named: Any) -> Any:
            by_name = not arguments
            hidden = named.pop("hidden_states") if by_name else arguments[0]
            if first and hidden is not first[0]:
                raise CannotStream("it changes the hidden states between its layers")
            if hidden.ndim != 3 or hidden.shape[:2] != ids.shape:
                raise CannotStream("its hidden states are not one vector for each token")
            first[:] = [hidden]
            calls.append(_Call(arguments[not by_name :], named, by_name))
            if not all(map(_is_plain, (*calls[-1].arguments, *named.values()))):
                raise CannotStream("its layers are given more than tensors")
            if len(calls) == count:
                raise _Stop
            return (hidden,) if self._in_tuple else hidden

        with _replaced(dict.fromkeys(self._layers, record)):
            try:
                self._model(ids.to(self._device), use_cache=False)
            except _Stop:
                return first[0], calls
        raise CannotStream("it does not run all of its layers")


@contextmanager
def _replaced(functions: Mapping[Any, Callable]) -> Iterator[None]:
    """Replace the forward functions of modules."""
    for module, function in functions.items():
        module.forward = function
    try:
        yield
    finally:
        for module in functions:
            del module.forward


def _is_plain(value: object) -> bool:
    """Whether this is a tensor, or something that no layer can change."""
    import torch

    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.Tensor)


def _same(one: object, other: object) -> bool:
    """Whether two calls, or their arguments, are equal."""
    import torch

    if one is other:
        return True
    if isinstance(one, _Call) and isinstance(other, _Call):
        named = one.named.keys() == other.named.keys() and all(_same(one.named[k], other.named[k]) for k in one.named)
        return named and one.by_name == other.by_name and _same(one.arguments, other.arguments)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other))
    return type(one) is type(other) and one == other
