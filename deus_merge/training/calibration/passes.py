"""Forward and backward passes of many windows, one layer in memory at a time and the hidden states in files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from .layer_runner import LayerRunner
from .options import Windows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: puts weights into the modules of a layer that is in memory
SetWeights = Callable[[], None]


class States:
    """Hidden states of windows, or gradients, in a file: (w, t, d).

    Args:
        path: The file.
        shape: Of one window, (t, d).
        dtype: Of the values.
        device: Where they are used.
    """

    def __init__(self, path: Path, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str):
        self._path, self._shape, self._dtype, self._device = path, shape, dtype, device
        self._file = path.open("w+b", buffering=0)

    def read(self, start: int, stop: int) -> Tensor:
        """Windows, as a tensor of their own: (stop - start, t, d)."""
        import torch

        found = torch.empty((stop - start, *self._shape), dtype=self._dtype)
        view = found.numpy().data.cast("B")
        self._file.seek(start * self._window)
        while view:
            count = self._file.readinto(view)
            if not count:
                raise OSError(f"{self._path} ends early")
            view = view[count:]
        return found.to(self._device)

    def write(self, start: int, values: Tensor) -> None:
        """Write windows from number ``start`` on."""
        view = values.detach().to("cpu", self._dtype).contiguous().numpy().data.cast("B")
        self._file.seek(start * self._window)
        while view:
            view = view[self._file.write(view) :]

    def remove(self) -> None:
        """Close and remove the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    @property
    def _window(self) -> int:
        return self._shape[0] * self._shape[1] * self._dtype.itemsize


class Passes:
    """The windows of a text on their way through a model.

    Args:
        runner: The model.
        windows: The text.
        folder: A folder for hidden states; it is emptied.
        batch: Windows that are computed at once.
        device: As the runner's.

    Attributes:
        position: The layer that the kept hidden states are in front of.
        skipped: Layers that are the identity, which are not run.
    """

    def __init__(
        self, runner: LayerRunner, windows: Windows, folder: Path, batch: int, device: torch.device | str = "cpu"
    ):
        import torch

        self.runner, self.windows, self.position = runner, windows, 0
        self.skipped: set[int] = set()
        self._folder, self._batch, self._device = folder, batch, device
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with runner.embedding(), torch.no_grad():
            runner.embed(windows.ids[: min(batch, windows.fitted)])  # says how wide the states are
            self._kept = self._states("kept")
            for start, stop in self.all:
                self._kept.write(start, runner.embed(windows.ids[start:stop]))

    @property
    def fitted(self) -> list[tuple[int, int]]:
        """The batches of fitted windows: start and stop."""
        return self._batches(0, self.windows.fitted)

    @property
    def held_out(self) -> list[tuple[int, int]]:
        """The batches of windows that are held out."""
        return self._batches(self.windows.fitted, len(self.windows.ids))

    @property
    def all(self) -> list[tuple[int, int]]:
        return [*self.fitted, *self.held_out]

    def kept(self, start: int, stop: int) -> Tensor:
        """Hidden states in front of layer `position`: (stop - start, t, d)."""
        return self._kept.read(start, stop)

    def advance(self, to: int) -> None:
        """Bring all windows in front of a layer."""
        while self.position < to:
            if self.position not in self.skipped:
                with self.runner.layers[self.position].held():
                    self.run_here()
            self.position += 1

    def run_here(self) -> None:
        """Run the layer at `position`, which is in memory, and keep what it gives."""
        import torch

        with torch.no_grad():
            for start, stop in self.all:
                self._kept.write(start, self.runner.layer(self.position, self.kept(start, stop)))

    @contextmanager
    def gradients(self) -> Iterator[tuple[States, float]]:
        """The gradients of the summed loss of the fitted windows with respect to the hidden states behind the layer at
        `position`, which must be the identity.

        Yields:
            The gradients, (w, t, d), and the mean loss in nats a token.
        """
        layers = self._above()
        with closing(self.backward(layers)) as steps:
            *_, (_, _, found, loss) = islice(steps, 1 + len(layers))
            yield found, loss

    def backward(self, layers: Sequence[int]) -> Generator[tuple[int | None, States, States, float], None, None]:
        """One forward pass of the fitted windows from the kept hidden states on, and one backward pass.

        Args:
            layers: The layers on the way, in their order; the others are the identity.

        Yields:
            First for the head, as None, and then for each layer from the highest to the lowest: its number, the hidden
            states in front of it, the gradients of the summed loss with respect to these, each (w, t, d), and the mean
            loss in nats a token. The files are used again: each pair is valid until the next one. Closing the iterator
            removes them.
        """
        import torch

        runner, inputs, total = self.runner, {}, 0.0
        here = self._kept
        with torch.no_grad():
            for index in layers:
                inputs[index], behind = here, self._states(f"behind-{index}")
                with runner.layers[index].held():
                    for start, stop in self.fitted:
                        behind.write(start, runner.layer(index, here.read(start, stop)))
                here = behind
        found = self._states("gradients")
        try:
            with runner.head():
                for at in range(self.windows.fitted):  # one by one: logits are large
                    hidden = here.read(at, at + 1).requires_grad_()  # (1, t, d)
                    losses = runner.losses(hidden, self.windows.ids[at : at + 1])  # (1,)
                    total += float(losses.detach().double().sum())
                    found.write(at, torch.autograd.grad(losses.sum(), hidden)[0])
            loss = self._mean(total, self.windows.fitted)
            yield None, here, found, loss
            for index in reversed(layers):
                with runner.layers[index].held():
                    for start, stop in self.fitted:
                        hidden = inputs[index].read(start, stop).requires_grad_()
                        output = runner.layer(index, hidden)
                        found.write(start, torch.autograd.grad(output, hidden, found.read(start, stop))[0])
                if here is not self._kept:
                    here.remove()
                here = inputs[index]
                yield index, here, found, loss
        finally:
            found.remove()

    def held_out_losses(self, candidates: Iterable[SetWeights]) -> list[float]:
        """The mean loss of the windows that are held out, for several weights of the layer at `position`.

        Args:
            candidates: Each puts weights into the layer.

        Returns:
            In nats a token, in the order of the candidates.
        """
        import torch

        runner, count, first = self.runner, 0, self.windows.fitted
        states = self._states("candidates")
        width = self.windows.held_out
        try:
            with torch.no_grad():
                with runner.layers[self.position].held():
                    for set_weights in candidates:
                        set_weights()
                        for start, stop in self.held_out:
                            output = runner.layer(self.position, self.kept(start, stop))
                            states.write(count * width + start - first, output)
                        count += 1
                places = [(c * width, start, stop) for c in range(count) for start, stop in self.held_out]
                for index in self._above():
                    with runner.layers[index].held():
                        for offset, start, stop in places:
                            at = offset + start - first
                            states.write(at, runner.layer(index, states.read(at, at + stop - start)))
                sums = [0.0] * count
                with runner.head():
                    for at in range(count * width):
                        window = first + at % width
                        losses = runner.losses(states.read(at, at + 1), self.windows.ids[window : window + 1])
                        sums[at // width] += float(losses.double().sum())
        finally:
            states.remove()
        return [self._mean(total, width) for total in sums]

    def close(self) -> None:
        """Remove all hidden states."""
        self._kept.remove()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _above(self) -> list[int]:
        """The layers above `position` that change something."""
        return [layer for layer in range(self.position + 1, self.runner.depth) if layer not in self.skipped]

    def _states(self, name: str) -> States:
        shape = (self.windows.length, self.runner.width)
        return States(self._folder / f"{name}.bin", shape, self.runner.dtype, self._device)

    def _batches(self, start: int, stop: int) -> list[tuple[int, int]]:
        return [(at, min(at + self._batch, stop)) for at in range(start, stop, self._batch)]

    def _mean(self, total: float, windows: int) -> float:
        return total / (windows * (self.windows.length - 1))
