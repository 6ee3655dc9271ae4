"""An output in a bucket: who may write there, and when it is a model.

::

    s3://bucket/out/
        model-00001-of-00190.safetensors ...   each with its last name, as soon as a worker has made it
        config.json, tokenizer.json ...        when all pieces are there
        deus_merge.json                        last: from then on this is an output
        .deus-pieces/PLAN/                     until then; PLAN: the beginning of the plan's hash
            begun.json                         a run of this plan writes here: what lies here is its own
            replacing                          it is removing the model that was here before
            done/00003-of-00190.json           the record of a finished piece
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from ..core.errors import PlanError
from ..core.text import some_of
from ..core.urls import url_path
from .index import INDEX
from .side_files import PART
from .staging import check_replaceable, is_model_file
from .storage import open_sink
from .storage._remote import MANIFEST
from .storage._transfer import Identity

PIECES = ".deus-pieces"
_HASH_LETTERS = 16  # of the plan's hash in the name of a folder
#: What makes a folder look like a model: the first that are removed.
_FIRST = (MANIFEST, "config.json", INDEX)


class _Contents(NamedTuple):
    """What lies under an address: objects, those in folders of a model by names like ``1_Pooling/config.json``; folders
    that no model has; and the plans that runs have begun."""

    objects: Mapping[str, Identity]
    folders: tuple[str, ...]
    plans: tuple[str, ...]


class BucketOutput:
    """A folder of a bucket that runs of one plan write an output to.

    Args:
        address: Its address.
        plan_hash: The hash of the plan.
        names: The names of all files of the output.
        sources: The names and ETags of sources' weights: such an object is never removed, whatever a source's address.

    Attributes:
        sink: The folder.
        out: The address as a path, for messages.
        folder: The folder of this plan's records, as a path, for messages.

    Raises:
        PlanError: outputs cannot be written there.
        CheckpointError: not a valid address, or obstore is not installed.
    """

    def __init__(self, address: str, plan_hash: str, names: Collection[str], sources: Collection[tuple[str, str]] = ()):
        self.sink = open_sink(address)
        self.out = url_path(self.sink.name)
        self._plan_hash, self._names = plan_hash, frozenset(names)
        self._sources = {(name, _plain(etag)) for name, etag in sources}
        self._plan = plan_hash[:_HASH_LETTERS]
        self._folder = f"{PIECES}/{self._plan}"
        self._done, self._begun = f"{self._folder}/done", f"{self._folder}/begun.json"
        self._replacing = f"{self._folder}/replacing"
        self.folder = url_path(f"{self.sink.name}/{self._folder}")

    def check(self, overwrite: bool) -> bool:
        """Check that a run of this plan may write here; changes nothing.

        Args:
            overwrite: Whether a model that lies here may be replaced.

        Returns:
            Whether it must be removed first.

        Raises:
            PlanError: something is in the way.
            CheckpointError: no such bucket, or no right to list it.
        """
        return self._check(self._contents(), overwrite)

    def claim(self, overwrite: bool) -> None:
        """Begin, or go on: remove what is replaced, and note that a run of this plan writes here.

        Args:
            overwrite: As for `check`.

        Raises:
            PlanError: something is in the way, or a run of another plan begins at the same time.
            CheckpointError: no such bucket, or no right to write to it.
        """
        found = self._contents()
        if self._check(found, overwrite):
            self.sink.put(self._replacing, b"{}\n")
            self._remove(found)
        head = json.dumps({"format": 1, "plan_hash": self._plan_hash}) + "\n"
        first = self.sink.identity(self._begun) is None
        self.sink.put(self._begun, head.encode(), create=True)
        self.sink.delete([self._replacing])
        if others := [plan for plan in self._plans() if plan != self._plan]:
            if first:
                self.sink.delete([self._begun])
            raise PlanError(
                "a run of another plan has begun here at the same time",
                where=self.out,
                got=f"plan {some_of(others)}",
                hint="choose another address for one of them",
            )

    @property
    def begun(self) -> bool:
        """Whether a run of this plan writes here, and no other process has ended it."""
        return self.sink.identity(self._begun) is not None

    @property
    def other_plans(self) -> list[str]:
        """The plans of other runs that have begun here, or left something."""
        return [plan for plan in self._plans() if plan != self._plan]

    def put_files(self, files: Mapping[str, bytes]) -> None:
        """Write all files but the weights and the manifest: config.json last.

        Raises:
            CheckpointError: no such bucket, or no right to write to it.
        """
        for name in sorted(files, key=lambda name: (name in _FIRST, name == "config.json")):
            self.sink.put(name, files[name])

    def put_manifest(self, manifest: bytes, weights: Mapping[str, Identity], others: Iterable[str]) -> bool:
        """Write the manifest, if everything that it speaks of is there.

        Args:
            manifest: Its content.
            weights: The files of weights as they were recorded.
            others: The names of the other files.

        Returns:
            Whether it is there now; False where another one was there before.

        Raises:
            PlanError: a file is missing, or another one than was recorded. The manifest is not there.
        """
        self._check_there(weights, others)
        if not self.sink.put(MANIFEST, manifest, create=True):
            return False
        try:
            self._check_there(weights, others)  # a run with --overwrite may have begun to remove them
        except PlanError:
            self.sink.delete([MANIFEST])
            raise
        return True

    def discard(self) -> None:
        """Remove the records of this plan.

        Raises:
            CheckpointError: no right to do so.
        """
        records, _ = self.sink.listed(self._done)
        self.sink.delete(f"{self._done}/{name}" for name in records)
        self.sink.delete([self._replacing, self._begun])

    def _check_there(self, weights: Mapping[str, Identity], others: Iterable[str]) -> None:
        found = self._contents().objects
        wrong = [name for name, identity in weights.items() if not same_object(found.get(name), identity)]
        wrong += [name for name in others if name not in found]
        if wrong:
            raise PlanError(
                "files of the output were changed or removed while it was put together",
                where=self.out,
                got=some_of(sorted(wrong)),
                hint="run the same command again: what is missing is made again",
            )

    def _check(self, found: _Contents, overwrite: bool) -> bool:
        strange = sorted(name for name in (*found.objects, *found.folders) if name not in self._names)
        others = [plan for plan in found.plans if plan != self._plan]
        begun = self._plan in found.plans
        if not (found.objects or found.folders or others):
            return False
        replacing = begun and self.sink.identity(self._replacing) is not None
        if begun and not replacing and MANIFEST not in found.objects and not strange and not others:
            return False  # an interrupted run of this plan goes on
        if not overwrite:
            got = f"an unfinished run of plan {some_of(others)}" if others and MANIFEST not in found.objects else None
            raise PlanError(
                "the output is not empty",
                where=self.out,
                got=got or some_of(strange or sorted(found.objects)),
                hint="choose another address, or replace what is there with --overwrite, which removes it first",
            )
        if ours := [n for n, identity in found.objects.items() if (n, _plain(identity.etag)) in self._sources]:
            raise PlanError(
                "a source of this output lies here, and would be removed",
                where=self.out,
                got=some_of(sorted(ours)),
                hint="choose another address",
            )
        check_replaceable((*found.objects, *found.folders), self.out, unfinished=bool(found.plans))
        return True

    def _remove(self, found: _Contents) -> None:
        """Remove a model, and what unfinished runs of other plans left: first what makes it look like one."""
        for name in _FIRST:
            if name in found.objects:
                self.sink.delete([name])
        self.sink.delete(name for name in found.objects if name not in _FIRST and is_model_file(name))
        for plan in found.plans:
            folder = f"{PIECES}/{plan}"
            self.sink.delete(f"{folder}/done/{name}" for name in self.sink.listed(f"{folder}/done")[0])
            if plan != self._plan:
                self.sink.delete(f"{folder}/{name}" for name in self.sink.listed(folder)[0])

    def _contents(self) -> _Contents:
        objects, folders = self.sink.listed()
        parts = [name for name in folders if PART.fullmatch(name)]
        objects |= {f"{part}/{name}": found for part in parts for name, found in self.sink.listed(part)[0].items()}
        strange = tuple(f"{name}/" for name in folders if name not in (*parts, PIECES))
        return _Contents(objects, strange, self._plans() if PIECES in folders else ())

    def _plans(self) -> tuple[str, ...]:
        return tuple(self.sink.listed(PIECES)[1])


def same_object(found: Identity | None, recorded: Identity) -> bool:
    """Whether an object is the one that was recorded: by its ETag, where the store has such, and its size."""
    return found is not None and found.size == recorded.size and _plain(found.etag) == _plain(recorded.etag)


def _plain(etag: str | None) -> str | None:
    """An ETag without quotes: Azure's lists leave them out."""
    return etag and etag.strip('"')
