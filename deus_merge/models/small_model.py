"""A small model with lively random weights that is run to find out what its layers do."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from .built import main_stack, model_class, reason, stacks
from .stacks import LAYER, find_stacks, side_of
from .tiny_config import HIDDEN, VOCABULARY

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

_TOKENS = 24
_EXPERT = re.compile(r"(expert\w*)[._]\d+(?=\.)")


def pattern_of(name: str) -> str:
    """A tensor's name with ``*`` for the number of an expert."""
    return _EXPERT.sub(r"\1.*", name)


class Misbehaviour(Exception):
    """A layer, or the model, is not what is looked for; the message says what was found."""


class _Enough(Exception):
    """Ends a forward pass."""


class SmallModel:
    """A small model in float32 on the CPU.

    Args:
        config: Small, see `tiny_config`.
        layer_prefix: The prefix of a layer's tensor names with ``{layer}``; without one, of the text stack.

    Raises:
        Misbehaviour: it cannot be built or run.
    """

    def __init__(self, config: PreTrainedConfig, layer_prefix: str = ""):
        import torch

        try:
            kind = model_class(config, language_model=True)
            self.model = kind._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        except Exception as error:  # a model's constructor may raise anything
            raise Misbehaviour(reason(error)) from None
        if self.model.main_input_name != "input_ids":
            raise Misbehaviour(f"it takes {self.model.main_input_name}, not tokens")
        self.path = main_stack(self.model, layer_prefix)
        if (side := side_of(layer_prefix)) and side_of(self.path) not in (None, side):
            raise Misbehaviour(f"{kind.__name__} has no {side}")
        self.layers = list(stacks(self.model)[self.path])
        self._generator = torch.Generator().manual_seed(1)
        self._enliven(self.model.named_parameters())
        stored = self.model.state_dict().keys()
        for name, buffer in self.model.named_buffers():
            if name in stored and buffer.is_floating_point():
                noise = torch.randn(buffer.shape, generator=self._generator)
                buffer.mul_(1 + 0.2 * noise).add_(0.1 * noise if "bias" in name else 0)
        self.ids = torch.randint(3, VOCABULARY, (2, _TOKENS), generator=self._generator)  # (2, tokens)
        self._uses: dict[int, int] = {}
        try:
            with torch.no_grad(), _note_uses(self._uses):
                self._run()
        except Misbehaviour:
            raise
        except Exception as error:  # a forward pass may raise anything
            raise Misbehaviour(reason(error)) from None

    def writers(self, layers: Sequence[int]) -> tuple[set[str], set[str]]:
        """The writers of layers of one kind, proved.

        Args:
            layers: Their numbers.

        Returns:
            The names under a layer's prefix of tensors that must be zero for the layer to be the identity, and of all
            others: those of the modules and those that `save_pretrained` writes.

        Raises:
            Misbehaviour: no zeros make these layers the identity, or these zeros have no gradient, or the layer reaches
                later ones in another way, or a tensor is not used.
        """
        first = layers[0]
        candidates = self._candidates(first)
        if not self._is_identity(first, candidates):
            raise Misbehaviour(self._what_is_left(first, candidates))
        zeroed = self._least(first, candidates)
        if not zeroed:
            raise Misbehaviour(f"layer {first} returns its input whatever its weights are")
        if dead := self._without_gradient(layers, zeroed):
            zeroed = self._least(first, list(reversed(candidates)))
            if self._without_gradient(layers, zeroed):
                raise Misbehaviour(f"{dead[0]} gets no gradient when the writers of a layer are zero")
        self._check_all(layers, zeroed)
        self._check_isolated(first, zeroed)
        if unused := self._unused(first):
            raise Misbehaviour(f"{unused[0]} of layer {first} is not used where a model reads nothing but tokens")
        return self._by_name(first, zeroed)

    # weights -----------------------------------------------------------------------------------------------------

    def _enliven(self, parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        """Random values of a size that keeps every part of the function alive."""
        import torch

        with torch.no_grad():
            for name, parameter in parameters:
                noise = torch.randn(parameter.shape, generator=self._generator)
                last = name.rpartition(".")[2]
                if "bias" in last:
                    parameter.copy_(0.2 * noise)
                elif re.search(r"A_log|decay|dt", last):
                    parameter.copy_(0.2 + noise.abs().clamp(max=1))
                elif parameter.ndim < 2:
                    parameter.copy_(1 + 0.2 * noise)
                else:
                    parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5))

    def _groups(self, layer: int) -> dict[str, list[torch.nn.Parameter]]:
        """The parameters of a layer by their names, those of all experts together."""
        found: dict[str, list[torch.nn.Parameter]] = {}
        for name, parameter in self.layers[layer].named_parameters():
            found.setdefault(pattern_of(name), []).append(parameter)
        return found

    def _candidates(self, layer: int) -> list[str]:
        """Names of weights that may write: one of their sizes is the hidden size. In the order of their use."""
        found = []
        for position, (name, parameters) in enumerate(self._groups(layer).items()):
            shape, last = parameters[0].shape, name.rpartition(".")[2]
            if HIDDEN in shape and (len(shape) > 1 or "bias" in last):
                used = min(self._uses.get(id(p), len(self._uses)) for p in parameters)
                found.append((used, position, name))
        return [name for *_, name in sorted(found)]

    @contextmanager
    def _zero(self, layer: int, names: Iterable[str]):
        """With zeros in weights of a layer."""
        import torch

        groups = self._groups(layer)
        changed = [p for name in names for p in groups.get(name, ())]
        before = [p.detach().clone() for p in changed]
        with torch.no_grad():
            for parameter in changed:
                parameter.zero_()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, values in zip(changed, before, strict=True):
                    parameter.copy_(values)

    # proofs ------------------------------------------------------------------------------------------------------

    def _is_identity(self, layer: int, zeroed: Iterable[str]) -> bool:
        import torch

        with self._zero(layer, zeroed):
            given, returned = self._watch([layer])[layer]
        return returned is not None and given.shape == returned.shape and torch.equal(given, returned)

    def _check_all(self, layers: Sequence[int], zeroed: Sequence[str]) -> None:
        """Check that the same zeros make every layer of a kind the identity, all at once."""
        import torch

        with ExitStack() as changed:
            for layer in layers:
                changed.enter_context(self._zero(layer, zeroed))
            for layer, (given, returned) in self._watch(layers).items():
                if returned is None or not torch.equal(given, returned):
                    names = ", ".join(zeroed)
                    raise Misbehaviour(f"zeros in {names} make layer {layers[0]} the identity, not layer {layer}")

    def _least(self, layer: int, candidates: Sequence[str]) -> list[str]:
        """Those that must stay zero when the others are given back in turn."""
        zeroed = list(candidates)
        for name in candidates:
            others = [z for z in zeroed if z != name]
            if self._is_identity(layer, others):
                zeroed = others
        return zeroed

    def _without_gradient(self, layers: Sequence[int], zeroed: Sequence[str]) -> list[str]:
        """Zeroed weights that the first step of training would not change."""
        with self._zero(layers[0], zeroed), self._gradients():
            groups = self._groups(layers[0])
            moved = {n for n in zeroed if any(p.grad is not None and bool(p.grad.abs().max() > 0) for p in groups[n])}
        return [name for name in zeroed if name not in moved]

    def _unused(self, layer: int) -> list[str]:
        """Weights that no output depends on, of which nothing can be proved: cross-attention to what was not given."""
        with self._gradients():
            groups = self._groups(layer).items()
            return [n for n, ps in groups if not any(id(p) in self._uses or p.grad is not None for p in ps)]

    @contextmanager
    def _gradients(self):
        """With the gradients of a random function of the logits."""
        import torch

        self.model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            result = self._run()
            weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(2))
            (result * weights).sum().backward()
        yield
        self.model.zero_grad(set_to_none=True)

    def _check_isolated(self, layer: int, zeroed: Sequence[str]) -> None:
        """Check that the rest of the model does not depend on the other weights of a layer whose writers are zero."""
        import torch

        others = [n for n in self._groups(layer) if n not in zeroed]
        with torch.no_grad(), self._zero(layer, zeroed):
            before = self._run()
            with self._zero(layer, others):
                groups = self._groups(layer)
                self._enliven((name, p) for name in others for p in groups[name])
                after = self._run()
        if not torch.equal(before, after):
            raise Misbehaviour(f"layer {layer} reaches the rest of the model by more than its output")

    def _what_is_left(self, layer: int, candidates: Sequence[str]) -> str:
        with self._zero(layer, candidates):
            given, returned = self._watch([layer])[layer]
        if returned is None or given.shape != returned.shape:
            return f"layer {layer} does not return what it takes: it is not x + f(x)"
        far = float((given - returned).abs().max() / given.abs().max())
        return (
            f"with zeros in every weight of the hidden size, layer {layer} still changes its input by {far:.2g} of its"
            " size: it is not x + f(x)"
        )

    # running -----------------------------------------------------------------------------------------------------

    def _run(self) -> torch.Tensor:
        """The logits of one forward pass, or the hidden states of a model without a head: (2, tokens, n)."""
        import torch

        inputs = {"input_ids": self.ids, "use_cache": False}
        if "decoder_input_ids" in inspect.signature(self.model.forward).parameters:
            inputs["decoder_input_ids"] = self.ids.flip(1)
        result = self.model(**inputs)
        found = result.logits if getattr(result, "logits", None) is not None else result[0]
        if not torch.isfinite(found).all():
            raise Misbehaviour("its logits are not finite")
        return found

    def _watch(self, layers: Sequence[int]) -> dict[int, tuple[torch.Tensor, torch.Tensor | None]]:
        """What layers take and return in a forward pass, which ends after the last of them."""
        import torch

        given: dict[int, torch.Tensor] = {}
        returned: dict[int, torch.Tensor | None] = {}

        def taken(layer: int):
            def hook(_, positional, named):
                tensors = (v for v in (*positional, *named.values()) if isinstance(v, torch.Tensor))
                given[layer] = next(t for t in tensors if t.is_floating_point()).detach().clone()

            return hook

        def left(layer: int):
            def hook(_, __, result):
                result = result[0] if isinstance(result, (tuple, list)) else result
                returned[layer] = result.detach().clone() if isinstance(result, torch.Tensor) else None
                if len(returned) == len(layers):
                    raise _Enough

            return hook

        handles = [self.layers[i].register_forward_pre_hook(taken(i), with_kwargs=True) for i in layers]
        handles += [self.layers[i].register_forward_hook(left(i)) for i in layers]
        try:
            with torch.no_grad():
                self._run()
        except _Enough:
            return {layer: (given[layer], returned[layer]) for layer in layers}
        finally:
            for handle in handles:
                handle.remove()
        raise Misbehaviour(f"layer {layers[0]} is not called as other layers are")

    # names -------------------------------------------------------------------------------------------------------

    def _by_name(self, layer: int, zeroed: Sequence[str]) -> tuple[set[str], set[str]]:
        """The names of zeroed tensors and of all others, as transformers has them and as it saves them."""
        import torch
        from transformers.core_model_loading import revert_weight_conversion

        inside = f"{self.path}.{layer}."
        marked, zero, kept = {}, set(), set()
        for name, tensor in self.model.state_dict().items():
            writes = name.startswith(inside) and pattern_of(name.removeprefix(inside)) in zeroed
            marked[name] = (torch.zeros if writes else torch.ones)(tensor.shape)
            if name.startswith(inside):
                (zero if writes else kept).add(name.removeprefix(inside))
        saved = revert_weight_conversion(self.model, marked)
        words = set(self.path.split("."))
        ends = [p for p in find_stacks(list(saved)) if p.rpartition(".")[2] == self.path.rpartition(".")[2]]
        stack = max(ends or find_stacks(list(saved)), key=lambda p: len(words & set(p.split("."))))
        for name, tensor in saved.items():
            match = LAYER.fullmatch(name)
            if match is None or match["prefix"] != stack or int(match["index"]) != layer:
                continue
            writes = bool((tensor == 0).all())
            if not writes and bool((tensor == 0).any()):
                raise Misbehaviour(f"only a part of the stored tensor {match['suffix']} writes to the residual stream")
            (zero if writes else kept).add(match["suffix"])
        return zero, kept


def _note_uses(uses: dict[int, int]):
    """A context that notes when each parameter is used for the first time: id -> its place in the order."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Uses(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if getattr(func, "__name__", "") not in ("__get__", "size", "dim", "stride"):  # these read no values
                for value in (*args, *(kwargs or {}).values()):
                    for each in value if isinstance(value, (list, tuple)) else (value,):
                        if isinstance(each, torch.nn.Parameter):
                            uses.setdefault(id(each), len(uses))
            return func(*args, **(kwargs or {}))

    return Uses()
