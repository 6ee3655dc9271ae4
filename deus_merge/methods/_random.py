"""Fast random numbers from a seeded stream, the same for any device and any number of threads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_LEVELS = 1 << 16


class Draws:
    """Random numbers of one stream, on the CPU: whoever needs them on another device moves them there.

    They come from NumPy's SFC64, several times as fast as torch's generator, which gives the seed.
    """

    def __init__(self, generator: torch.Generator):
        import numpy

        self._numpy = numpy.random.Generator(numpy.random.SFC64(generator.initial_seed()))

    def coins(self, probability: float, count: int) -> torch.Tensor:
        """Independent coins, (count,), uint8, each 1 with exactly this probability (0 to 1) and else 0.

        A coin is a whole number of 16 bits below a threshold; the fraction that the threshold lacks is supplied by
        chance, once a call.
        """
        import torch

        threshold = math.floor(probability * _LEVELS + float(self.uniform((1,))[0]))
        limit = threshold - (1 << 15)  # of numbers of 16 bits with sign; or above them all
        words = self._numpy.integers(0, 1 << 64, size=-(-count // 4), dtype="uint64")  # (count / 4,)
        numbers = words.view("int16")[:count]
        return torch.from_numpy((numbers < limit).view("uint8"))

    def uniform(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Numbers from [0, 1), float32."""
        import torch

        return torch.from_numpy(self._numpy.random(shape, dtype="float32"))
