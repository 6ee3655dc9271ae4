"""The models that a finished output was made from, opened again."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence

from ..checkpoint.contents import contents_digest
from ..checkpoint.dequantized import DequantizedSource
from ..checkpoint.gguf import GgufSource, is_gguf
from ..checkpoint.hub import PRIVATE
from ..checkpoint.reader import Checkpoint, TensorSource
from ..checkpoint.storage import LoadOptions, open_source
from ..core.errors import DeusMergeError, PlanError
from ..core.urls import public_url
from ..models.built import state_depth
from ..report.manifest import Manifest
from ..report.manifest_parts import ManifestSource


def reopened(manifest: Manifest, quick: bool, named: Collection[str] = ()) -> list[TensorSource | str]:
    """The models an output was made from; for one that is not available, the reason.

    Args:
        manifest: The manifest, with the places that the user has named.
        quick: Read nothing from other machines.
        named: The ``model`` of the sources whose place the user has named.

    Raises:
        PlanError: such a source is not there, or another model is.
    """
    found: list[TensorSource | str] = []
    for source in manifest.sources:
        remote = source.url is not None and source.folder is None  # not one that is somewhere else now
        if remote and quick:
            found.append(f"{_address(source)} is not read with --quick")
            continue
        opened = _remote(source) if remote else _local(source)
        if isinstance(opened, str) and source.model in named:
            raise PlanError(opened, where=source.model, expected="the model that the output was made from")
        found.append(opened)
    return [f"{x}; {_how(s)}" if isinstance(x, _Unread) else x for x, s in zip(found, manifest.sources, strict=True)]


class _Unread(str):
    """Why a source could not be read: another place may help."""


def _local(source: ManifestSource) -> TensorSource | str:
    """A model on this machine; the reason where it is not what it was."""
    if source.folder is None:
        return f"{source.model} is derived when it is read: it has no folder to compare with"
    if source.folder.startswith(PRIVATE):
        return _Unread(f"the manifest does not name the folder of source {source.model}")
    try:
        gguf = is_gguf(source.folder)
        checkpoint = GgufSource.open(source.folder) if gguf else Checkpoint.open(source.folder)
        state_depth(checkpoint.config)
    except DeusMergeError as error:
        return _Unread(f"source {source.folder} cannot be read: {error.message}")
    return checkpoint if checkpoint.fingerprint == source.fingerprint else f"source {source.folder} has changed since"


def _address(source: ManifestSource) -> str:
    """The address of a source elsewhere, without the secrets that ``--source`` may have given it."""
    assert source.url is not None
    return public_url(source.url)


def _remote(source: ManifestSource) -> TensorSource | str:
    """A model on another machine, as it is stored; the reason where it is not what it was."""
    assert source.url is not None
    repository = "/".join(source.url.split("/")[-2:])
    try:
        place = f"{repository}@{source.revision}" if source.revision else source.url
        opened = open_source(place, LoadOptions(stream=True))
    except DeusMergeError as error:
        return _Unread(f"source {_address(source)} cannot be read: {error.message}")
    stored = opened.stored if isinstance(opened, DequantizedSource) else opened
    same = stored.fingerprint == source.fingerprint and source.etags in (None, stored.provenance.get("etags"))
    return stored if same else f"source {_address(source)} has changed since"


def _how(source: ManifestSource) -> str:
    return f"--source {shlex.quote(source.model)}=PLACE says where it is"


def changed_source(opened: Sequence[TensorSource | str], manifest: Manifest) -> str | None:
    """A local source whose contents are not those that the manifest notes, by a sample; None where there is none.

    Args:
        opened: What `reopened` gave for the manifest.
        manifest: The manifest.
    """
    for checkpoint, source in zip(opened, manifest.sources, strict=True):
        known = source.contents is not None and source.url is None
        if known and isinstance(checkpoint, Checkpoint) and contents_digest(checkpoint) != source.contents:
            return source.folder or source.model
    return None
