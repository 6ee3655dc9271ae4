"""The frozen layers below the lowest one that trains: their output is computed once, and every run reads it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from torch.nn import Module, ModuleList


class FrozenPrefix:
    """The lowest layers of a decoder, which are frozen and can be replaced by stored hidden states.

    Args:
        model: The decoder.
        layers: Its layers.
        count: The number of layers of the prefix, at least 1.
        arithmetic: Makes the context of a forward pass.
    """

    def __init__(self, model: Any, layers: ModuleList, count: int, arithmetic: Callable[[], AbstractContextManager]):
        self._model, self._layers, self._count, self._arithmetic = model, layers, count, arithmetic
        self._states: Tensor | None = None

    def digest(self) -> str:
        """Sixteen hexadecimal digits of the weights that decide its output."""
        import torch
        import xxhash

        digest = xxhash.xxh3_64()
        for module in (self._model.get_input_embeddings(), *self._layers[: self._count]):
            for parameter in module.parameters():
                digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def hidden(self, windows: Tensor, batch: int, file: Path) -> np.ndarray:
        """The hidden states behind the prefix, mapped from a file, which is written when it is missing.

        Args:
            windows: Token ids, (w, t).
            batch: The number of windows that are computed at once.
            file: The file.

        Returns:
            (w, t, d) float32.
        """
        import numpy as np

        with _locked(file):
            if not file.exists():
                part, states = file.with_name(f"{file.name}.part"), None
                for start in range(0, len(windows), batch):
                    found = self._output(windows[start : start + batch])
                    if states is None:
                        shape = (len(windows), *found.shape[1:])
                        states = np.lib.format.open_memmap(part, "w+", dtype=np.float32, shape=shape)
                        _reserve(part)
                    states[start : start + len(found)] = found.float().cpu().numpy()
                del states  # flushes it
                os.replace(part, file)
        return np.load(file, mmap_mode="r")

    def fits(self, window: Tensor, loss: Callable[[Tensor], Tensor]) -> bool:
        """Whether the loss is the same, bit for bit, with stand-ins in the place of the layers. They stay.

        Args:
            window: Token ids, (1, t).
            loss: Computes the loss of windows.
        """
        import torch

        kept, whole = list(self._layers), loss(window)
        try:
            self._states = self._output(window)
            self.replace()
            return torch.equal(loss(window), whole)
        except (AttributeError, TypeError, RuntimeError, ValueError, LookupError, NameError):  # it asks more of layers
            return False
        finally:
            for index in range(self._count):
                self._layers[index] = kept[index]

    def replace(self) -> None:
        """Put stand-ins in the place of the layers, so that each forward pass needs `use` before it."""
        for index in range(self._count):
            self._layers[index] = self._stand_in(index)

    def use(self, states: np.ndarray) -> None:
        """Set the hidden states of the next forward pass, (b, t, d)."""
        import numpy as np
        import torch

        assert self._states is not None
        self._states = torch.from_numpy(np.array(states)).to(self._states)

    def _output(self, windows: Tensor) -> Tensor:
        """The output of the last layer of the prefix, (b, t, d)."""
        import torch

        found: list[Any] = []

        def stop(module: Module, arguments: Any, output: Any) -> None:
            found.append(output)
            raise _Done

        handle = self._layers[self._count - 1].register_forward_hook(stop)
        try:
            with torch.no_grad(), self._arithmetic():
                self._model(input_ids=windows, use_cache=False)
        except _Done:
            pass
        finally:
            handle.remove()
        self._in_tuple = isinstance(found[0], tuple)
        return found[0][0] if self._in_tuple else found[0]

    def _stand_in(self, index: int) -> Module:
        """A module without weights that the model can run in a layer's place."""
        from torch import nn

        prefix, in_tuple = self, self._in_tuple

        class StandIn(nn.Module):
            def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
                output = hidden_states if index else prefix._states
                return (output,) if in_tuple else output

        module = StandIn()
        for name, value in vars(self._layers[index]).items():  # what models ask of their layers, like their kind
            if not name.startswith("_") and name not in vars(module):
                object.__setattr__(module, name, value)
        return module


class _Done(Exception):
    """Ends a forward pass of which no more is needed."""


def layer_list(model: Module, names: Sequence[str]) -> tuple[str, ModuleList] | None:
    """The outermost list of modules that holds all of these parameters, with its name; None where there is none."""
    from torch import nn

    for name, module in model.named_modules():  # outer ones first
        if isinstance(module, nn.ModuleList) and names and all(n.startswith(f"{name}.") for n in names):
            return name, module
    return None


def _reserve(file: Path) -> None:
    """Take a file's space now: a full disk is an error here, and would end the process when a page is written."""
    try:
        with open(file, "r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, os.path.getsize(file))
    except OSError:
        file.unlink()
        raise


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Let one process at a time make a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(f"{file.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
