"""The engine that has nothing left to make: workers, on any number of machines, have finished all pieces."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import VerifyError
from ...core.text import some_of
from ..block_runner import BlockRecord
from .base import Job, OnFinished


@dataclass(frozen=True)
class FinishedPieces:
    """The pieces of a plan, all of them finished.

    Attributes:
        files: Where each file is, by its name in the output.
        blocks: What the manifest will say of each block, by index.
        checksums: XXH3-128 of every tensor, in hex, as its worker read it back.
        identity: Everything but the plan that decided the bytes, by name: JSON values.
        seconds: Time that all workers took together.
        warnings: Messages for the user.
        received: Checksums of what was copied from other machines, by the name of the tensor.
    """

    files: Mapping[str, Path]
    blocks: Mapping[int, BlockRecord]
    checksums: Mapping[str, str]
    identity: Mapping[str, object]
    seconds: float
    warnings: tuple[str, ...]
    received: Mapping[str, str]

    workers = 1

    @property
    def run_record(self) -> dict[str, object]:
        """The options as the manifest records them."""
        return run_record_of(self.identity)

    def run(self, job: Job, on_finished: OnFinished) -> None:
        job.writer.received |= self.received
        for index in job.blocks:
            on_finished(job.plan.blocks[index], self.blocks[index])

    def compare(self, checksums: Mapping[str, str], changed: Collection[str]) -> None:
        """Check that the output holds what the workers wrote.

        Args:
            checksums: Those of the output's tensors.
            changed: Tensors that a calibration has changed since.

        Raises:
            VerifyError: a tensor is another one.
        """
        wrong = [n for n, checksum in self.checksums.items() if n not in changed and checksums.get(n) != checksum]
        if wrong:
            raise VerifyError(
                "the pieces are damaged: tensors differ from what their workers wrote",
                where=some_of(wrong),
                hint="remove the folder of the pieces, and make them again",
            )


def run_record_of(identity: Mapping[str, object]) -> dict[str, object]:
    """The options that the manifest records, of everything that decided the bytes of a piece."""
    return {name: identity[name] for name in ("device", "threads", "seed")}
