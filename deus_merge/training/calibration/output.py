"""The folder of a calibrated model: everything is copied but the outputs of the new layers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ... import __version__
from ...checkpoint.header import FileHeader, open_regular, read_small
from ...checkpoint.layout import ShardLayout, TensorEntry
from ...checkpoint.output_folder import OutputFolder
from ...checkpoint.reader import Checkpoint
from ...checkpoint.shards import ShardWriter
from ...core.errors import DeusMergeError, VerifyError
from ...core.tensors import Action
from ...core.typed_json import dump, parse
from ...models.side_files import copied_files
from ...report.card_edits import calibrated_card
from ...report.manifest import MANIFEST, USER_FILES, Manifest, read_manifest
from ...report.manifest_parts import CalibratedLayer, Calibration, ManifestLayer
from ...report.plan_manifest import sha256
from ...run.preflight import check_apart
from ...verify import verify
from ...verify.weights import TensorCheck, examine
from .memory import Needs, check_disk

if TYPE_CHECKING:
    from torch import Tensor

_CARD = "README.md"
_COPIES = "copies"  # the journal's name for all that is copied


class CalibratedOutput:
    """A new folder with a calibrated model. A context manager; nothing is final before `finish`.

    Args:
        out: The new folder.
        manifest: The manifest of the model that is calibrated.
        checkpoint: That model.
        identity: What decides the result besides the model, by name.
        resume, overwrite: As `CalibrationOptions`.

    Attributes:
        manifest: As given.
        scratch: A folder for hidden states, removed at the end.

    Raises:
        PlanError: ``out`` is not a local path.
        VerifyError: a file of the model is not as it was written.
    """

    def __init__(
        self,
        out: Path,
        manifest: Manifest,
        checkpoint: Checkpoint,
        identity: Mapping[str, object],
        *,
        resume: bool,
        overwrite: bool,
    ):
        self.manifest, self._checkpoint, self._resume = manifest, checkpoint, resume
        model = sha256(manifest.sealed() + checkpoint.fingerprint.encode())
        self._output = OutputFolder(
            out,
            plan_hash=sha256(f"calibrate {model}".encode()),
            identity={"deus_merge": __version__, **identity},
            overwrite=overwrite,
            resume=resume,
        )
        self.scratch = self._output.area.staging / "hidden"
        self._files = _files(checkpoint, manifest)
        self._writer: ShardWriter | None = None

    def earlier(self, settings: Calibration) -> Calibration | None:
        """The record of a finished output, where this is a resumed run that would make the same; else None.

        Args:
            settings: The record as far as it is known before the run.
        """
        out = self._output.out
        if not self._resume or self._output.area.resumable_blocks or not (out / MANIFEST).is_file():
            return None
        with suppress(DeusMergeError):
            found = read_manifest(out)
            outcome = {"loss_before": 0.0, "loss_after": 0.0, "layers": ()}
            if found.calibration is not None and found.plan_hash == self.manifest.plan_hash:
                same = replace(found.calibration, **outcome) == replace(settings, **outcome)
                return found.calibration if same else None
        return None

    def check(self, needs: Needs) -> None:
        """Raise all that entering would refuse, or too little disk; nothing is written.

        Raises:
            PlanError: ``out`` is in the way, contains a model or is in one, or there is too little disk.
        """
        out = self._output.out
        check_apart(out, [self._checkpoint, *_ancestors(self.manifest)])
        self._output.check()
        sizes = [*(header.size for header in self._checkpoint.headers), *map(len, self._files.values())]
        check_disk(needs, out, sum(sizes))

    def __enter__(self) -> CalibratedOutput:
        self._output.__enter__()
        try:
            self._writer = self._output.shards([_layout(header) for header in self._checkpoint.headers])
            if self._output.finished:
                self._put_files()
        except BaseException as error:
            self._output.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._output.__exit__(kind, error, trace)

    @property
    def hint(self) -> str | None:
        """How to continue after an error or an interrupt; None when nothing is saved."""
        return self._output.resume_hint if self._output.resumable else None

    @property
    def finished(self) -> tuple[CalibratedLayer, ...]:
        """The layers that an earlier run finished, in their order."""
        lines = (diagnostics for block, diagnostics in self._output.finished.items() if block != _COPIES)
        return tuple(parse(CalibratedLayer, line) for line in lines)

    def written(self) -> Checkpoint:
        """The new folder as it is now; only where an earlier run finished a layer."""
        return Checkpoint.open(self._output.folder)

    def unfinished(self) -> Checkpoint:
        """The checkpoint with the layers that are not finished yet."""
        return self._checkpoint

    def write_layer(self, layer: CalibratedLayer, values: Mapping[str, Tensor]) -> None:
        """Write a layer, and bring it to the disk.

        Args:
            layer: Its record.
            values: Its new values by tensor name.
        """
        assert self._writer is not None, "the output has not been entered"
        if _COPIES not in self._output.finished:
            self._put_files()
            self._writer.copy_many(self._checkpoint.tensors.items())
            self._output.record(_COPIES, {})
        for name, value in values.items():
            self._writer.write_tensor(name, value)
        self._output.record(f"layer {layer.layer}", dump(layer))
        self._output.flush()

    def finish(self, record: Calibration) -> tuple[str, ...]:
        """Write the manifest, check everything, and give the folder its name.

        Returns:
            Notes for the user.

        Raises:
            VerifyError: a tensor is not what it should be; the folder does not get its name.
        """
        self._output.put(MANIFEST, self._sealed(record))
        verification = verify(self._output.folder, quick=True)
        if failed := verification.failed:
            hint = "deus-merge verify shows whether the model that was calibrated is damaged"
            raise VerifyError(f"{failed[0].name}: {failed[0].detail}", where=self._output.out, hint=hint)
        self._output.finish()
        return tuple(self._output.notes)

    def _put_files(self) -> None:
        for name, content in self._files.items():
            self._output.put(name, content)

    def _sealed(self, record: Calibration) -> bytes:
        """The manifest's file."""
        names = {name for layer in record.layers for name in layer.tensors}
        if _CARD in self._files:
            card = self._files[_CARD].decode(errors="replace")
            self._output.put(_CARD, calibrated_card(card, record).encode())
        with self.written() as written:
            found = examine((TensorCheck(written[name], None) for name in sorted(names)), finite=False)
        known = {name: found[name].checksum for name in names if self.manifest.tensors[name].xxh3_128 is not None}
        files = {name: sha256(self._files[name]) for name in sorted(self._files.keys() - USER_FILES)}
        return replace(calibrated_manifest(self.manifest, record, known), files=files).sealed(self._output.out)


def calibrated_manifest(manifest: Manifest, record: Calibration, checksums: Mapping[str, str]) -> Manifest:
    """The manifest of a model whose zeroed outputs were set.

    Args:
        manifest: The manifest before that.
        record: What was done.
        checksums: Of the tensors that were set, as far as they are known.
    """
    names = {name for layer in record.layers for name in layer.tensors}
    tensors = dict(manifest.tensors)
    for name in names:
        tensors[name] = replace(tensors[name], action=Action.COMPUTE, xxh3_128=checksums.get(name))
    return replace(
        manifest,
        tensors=tensors,
        function_preserving=manifest.function_preserving and not names,
        layers=tuple(_calibrated_layer(manifest, layer, tensors, names) for layer in manifest.layers),
        calibration=record,
    )


def _calibrated_layer(manifest: Manifest, layer: ManifestLayer, tensors: Mapping, names: set[str]) -> ManifestLayer:
    """A layer with the actions that it has now."""
    own = [name for name in tensors if name.startswith(manifest.prefix_of(layer.layer))]
    if names.isdisjoint(own):
        return layer
    found = {*layer.actions, Action.COMPUTE} - {Action.ZEROS}
    found |= {Action.ZEROS} & {tensors[name].action for name in own}
    return replace(layer, actions=tuple(action for action in Action if action in found))


def _files(checkpoint: Checkpoint, manifest: Manifest) -> dict[str, bytes]:
    """All files but weights and manifest.

    Raises:
        VerifyError: one is not as it was written.
    """
    folder = checkpoint.folder
    names = {name for name in (*manifest.files, _CARD) if (folder / name).is_file()}
    found = {name: read_small(folder / name) for name in sorted(names)}
    for name, digest in manifest.files.items():
        if name in found and name not in USER_FILES and sha256(found[name]) != digest:
            raise VerifyError("the file is not as it was written", where=folder / name, hint="deus-merge verify")
    more = {name: c if isinstance(c, bytes) else read_small(c) for name, c in copied_files(checkpoint).items()}
    return {**more, **found}


def _layout(header: FileHeader) -> ShardLayout:
    """An existing file as the layout of a new one."""
    with os.fdopen(open_regular(header.file), "rb") as stream:
        prefix = stream.read(8)
        raw = prefix + stream.read(int.from_bytes(prefix, "little"))
    entries = {t.name: TensorEntry(t.name, t.dtype, t.shape) for t in header.tensors}
    places = {t.name: (t.offset, t.offset + t.nbytes) for t in header.tensors}
    return ShardLayout(header.file.name, raw, entries, places, header.size)


def _ancestors(manifest: Manifest) -> Iterable[Checkpoint]:
    """The models that the output, or its base, was made from, as far as they are there."""
    for source in (source for growth in manifest.growths for source in growth.sources):
        with suppress(DeusMergeError):
            if source.folder is not None:
                yield Checkpoint.open(source.folder)
