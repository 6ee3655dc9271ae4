"""The pieces of an output in a bucket: made in a scratch folder, uploaded under their last names, and recorded.

No lock is needed. A file gets its name when its last part has come; a piece is finished when its record appears, which
names the ETags of its files. Where two workers make the same piece, the record that fits the files counts, and a piece
whose record does not fit is made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..core.errors import MachineError
from ..core.typed_json import Misfit, parse
from .bucket_output import BucketOutput, same_object
from .piece_store import PieceRecord, attempt_name
from .scratch import scratch_folder
from .storage._sink import GivenUp
from .storage._transfer import Identity

_AT_ONCE = 16  # requests while records are read


class BucketPieces(BucketOutput):
    """The pieces of one plan for an output in a bucket: the same calls as `piece_store.PieceStore`."""

    def record(self, piece: str) -> PieceRecord | None:
        """The record of a finished piece; None where there is none, or one that does not match its files.

        Args:
            piece: The name of the piece.

        Raises:
            CheckpointError: the bucket cannot be read.
        """
        record = self._read(piece)
        return record if record and self._fits(record, None) else None

    def records(self, pieces: Iterable[str]) -> dict[str, PieceRecord]:
        """The records of those of these pieces that are finished, as `record` gives them."""
        there, _ = self.sink.listed(self._done)
        found, _ = self.sink.listed()
        wanted = [piece for piece in pieces if f"{piece}.json" in there]
        with ThreadPoolExecutor(_AT_ONCE, "records") as pool:
            records = list(pool.map(self._read, wanted))
        return {r.piece: r for r in records if r is not None and self._fits(r, found)}

    def any_record(self) -> PieceRecord | None:
        """The record of a finished piece of this plan; None where there is none."""
        names = sorted(name.removesuffix(".json") for name in self.sink.listed(self._done)[0])
        return next((record for name in names if (record := self.record(name))), None)

    def files(self, record: PieceRecord) -> dict[str, Path]:
        """Files of this machine that a finished piece has: none."""
        return {}

    @contextmanager
    def attempt(self, piece: str) -> Iterator[Path]:
        """A new folder of this machine for one attempt at a piece, which is removed afterwards.

        Raises:
            MachineError: no space left, or the disk fails.
        """
        with scratch_folder(attempt_name(piece)) as self._attempt:
            yield self._attempt

    def finish(self, record: PieceRecord) -> None:
        """Make the attempt the piece: upload its files, then its record.

        Raises:
            CheckpointError: no such bucket, or no right to write to it.
            MachineError: the store does not answer, or the records were removed meanwhile.
        """

        def check() -> None:
            if self.record(record.piece):
                raise GivenUp
            if not self.begun:
                raise MachineError(
                    "the pieces were removed while this one was made",
                    where=self.folder,
                    hint="another process has finished the output, or removed these objects",
                )

        try:
            check()
            uploaded = {name: self.sink.upload(name, self._attempt / name, check) for name in record.files}
        except GivenUp:
            return  # another worker was faster
        record = replace(record, folder="", etags={n: i.etag for n, i in uploaded.items() if i.etag is not None})
        name = f"{self._done}/{record.piece}.json"
        if not self.sink.put(name, record.content, create=True) and self.record(record.piece) is None:
            self.sink.put(name, record.content)

    def _read(self, piece: str) -> PieceRecord | None:
        """A record of this plan, whether or not its files are there."""
        content = self.sink.read(f"{self._done}/{piece}.json")
        try:
            record = parse(PieceRecord, json.loads(content)) if content else None
        except (ValueError, RecursionError, Misfit):
            return None
        return record if record and record.is_of(piece, self._plan_hash) else None

    def _fits(self, record: PieceRecord, listed: Mapping[str, Identity] | None) -> bool:
        """Whether the files of a record are there, and are those that were uploaded."""
        find = self.sink.identity if listed is None else listed.get
        return all(same_object(find(name), identity) for name, identity in uploaded_files(record).items())


def uploaded_files(record: PieceRecord) -> dict[str, Identity]:
    """The files of a record in a bucket."""
    return {name: Identity(size, record.etags.get(name)) for name, size in record.files.items()}
