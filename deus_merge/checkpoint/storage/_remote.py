"""A checkpoint on another machine: config, headers and side files are fetched when it is opened, tensors by range."""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from ...core.errors import CheckpointError
from ...core.tensors import StoredTensor
from ...core.urls import url_path
from ..dequantized import dequantized
from ..header import MAX_JSON, FileHeader, header_length, parse_header, parse_json
from ..hub import is_needed
from ..index import INDEX, SINGLE, only_file, parse_weight_map
from ..reader import Checkpoint, checkpoint_fingerprint
from ..tensor_source import FileStamp, TensorSource
from ._spool import RemoteFile, Spool
from ._transfer import Absent, Identity, Remote

GUESS = 128 << 10  # bytes of a file that are asked for first: nearly every header is shorter
_AT_ONCE = 32  # requests while a model is opened
_WEIGHTS = ".safetensors"
_OTHER_WEIGHTS = (".bin", ".pt", ".pth")


class RemoteCheckpoint(Checkpoint):
    """A model in a store. Opened by `open_remote`. Pickles.

    Args:
        remote: Its folder.
        spool: What has been read of it.
        config: config.json.
        headers: The headers of its files.
        fingerprint: As `Checkpoint.fingerprint`.
        identities: The identity of each file, in the order of the headers.
        small: The other files: name -> content.
    """

    def __init__(
        self,
        remote: Remote,
        spool: Spool,
        config: dict,
        headers: Iterable[FileHeader],
        fingerprint: str,
        identities: Mapping[str, Identity],
        small: Mapping[str, bytes],
    ):
        super().__init__(url_path(remote.name), config, headers, fingerprint)
        self._remote, self._spool, self._identities, self._small = remote, spool, identities, small
        self._remote_files = {path: _remote_file(spool, remote, self._name(path), identities) for path in self.files}

    def __reduce__(self) -> tuple:
        parts = (self._remote, self._spool, self.config, self.headers, self.fingerprint, self._identities, self._small)
        return type(self), parts

    @property
    def remote(self) -> Remote:
        """Its folder in the store."""
        return self._remote

    @property
    def spool(self) -> Spool:
        """What has been read of it."""
        return self._spool

    @property
    def where(self) -> str:
        return self._remote.name

    @property
    def folders(self) -> tuple[Path, ...]:
        return ()

    @property
    def side_files(self) -> Mapping[str, bytes | Path]:
        return self._small

    @property
    def provenance(self) -> Mapping[str, object]:
        if self._remote.revision is not None:
            return {"url": self._remote.name, "revision": self._remote.revision}
        etags = {name: identity.etag for name, identity in self._identities.items() if identity.etag is not None}
        return {"url": self._remote.name, "etags": etags}

    def stamp(self) -> list[FileStamp]:
        """Makes no request: each request for bytes is refused once the file is another one, and changes this."""
        return [self._stamp(self._name(path)) for path in self.files]

    def prefetch(self, names: Iterable[str]) -> None:
        for path, begin, end in self._joined(names):
            self._spool.prefetch(self._remote_files[path], begin, end)

    def _stamp(self, name: str) -> FileStamp:
        identity = self._identities[name]
        tag = "changed" if self._remote.changed == name else self._remote.revision or identity.etag or "no ETag"
        return FileStamp(name, identity.size, identity.modified, tag)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _map(self, info: StoredTensor, begin: int, end: int) -> mmap.mmap:
        if self._closed:
            raise CheckpointError("the checkpoint is closed", where=self.where)
        return self._spool.view(self._remote_files[info.file], begin, end)


def _remote_file(spool: Spool, remote: Remote, name: str, identities: Mapping[str, Identity]) -> RemoteFile:
    return RemoteFile(spool, remote, name, identities[name])


def open_remote(remote: Remote, spool: Spool, names: Collection[str] | None) -> TensorSource:
    """Read the config, the headers and the side files of a model in a store: one request a file, many at once.

    Args:
        remote: The folder.
        spool: Where what is read of its tensors is kept.
        names: The files in the folder; None where the store does not list them: then the usual ones are tried.

    Raises:
        CheckpointError: as `Checkpoint.open`; or the store cannot be read.
    """
    folder = url_path(remote.name)
    with ThreadPoolExecutor(_AT_ONCE, "opening") as pool:

        def fetch(wanted: Iterable[str]) -> dict[str, bytes]:
            """The files of these names that are there."""
            listed = list(dict.fromkeys(wanted))
            found = pool.map(lambda name: _optional(remote, name, listed=names is not None), listed)
            return {name: content for name, content in zip(listed, found, strict=True) if content is not None}

        if names is None:
            small = fetch(("config.json", INDEX, MANIFEST))
            if "config.json" in small:
                small |= fetch(_usual_names(small).difference(small))
                if "tokenizer.json" not in small:
                    small |= fetch(_OTHER_TOKENIZERS)
        else:
            _check_listed(remote, names)
            small = fetch(sorted(name for name in names if is_needed(name) and not name.endswith(_WEIGHTS)))
        if "config.json" not in small:
            hint = "name the folder of the model, without the name of a file"
            raise CheckpointError("no config.json", where=remote.name, expected="the folder of a model", hint=hint)
        config = parse_json(small["config.json"], folder / "config.json", "config")
        weight_map = None
        if INDEX in small:
            single = SINGLE if names is not None and SINGLE in names else False
            weight_map = parse_weight_map(small[INDEX], folder / INDEX, single, (_WEIGHTS,))
            files = sorted(set(weight_map.values()))
        else:
            files = [SINGLE if names is None else only_file(sorted(names), folder)]
        opened = list(pool.map(lambda name: _open_file(remote, spool, name, folder), files))
    headers = [header for header, _ in opened]
    fingerprint = checkpoint_fingerprint(small["config.json"], files, headers)
    identities = {name: identity for name, (_, identity) in zip(files, opened, strict=True)}
    checkpoint = RemoteCheckpoint(remote, spool, config, headers, fingerprint, identities, dict(sorted(small.items())))
    checkpoint._check_promised(weight_map or {})
    return dequantized(checkpoint)


def _open_file(remote: Remote, spool: Spool, name: str, folder: Path) -> tuple[FileHeader, Identity]:
    path = folder / name
    try:
        begin, identity = remote.begin(name, GUESS)
    except Absent as error:
        _refuse_weights(remote, name, error)
    length = 8 + header_length(bytes(begin[:8]), identity.size, path)
    raw = bytes(begin[:length])
    if length > len(raw):
        raw += bytes(remote.range(name, len(raw), length, identity))
    file = RemoteFile(spool, remote, name, identity)
    return parse_header(raw, identity.size, (identity.size, identity.modified), path, file), identity


def _optional(remote: Remote, name: str, listed: bool) -> bytes | None:
    """A small file; None if it is not there."""
    try:
        return remote.whole(name, MAX_JSON)
    except Absent as error:
        if listed or (name == "config.json" and error.message.startswith("no right")):
            raise
        return None


#: The manifest of an output: it names every file.
MANIFEST = "deus_merge.json"
#: What is tried where a server lists no files: few enough that planning costs about one request a file of weights.
_USUAL = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "LICENSE",
)  # fmt: skip
#: Also, where there is no tokenizer.json, with which they say nothing new.
_OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")


def _usual_names(small: Mapping[str, bytes]) -> set[str]:
    """The names of the files that may be there, of a model whose files are not listed."""
    if MANIFEST in small:
        files = parse_json(small[MANIFEST], Path(MANIFEST), "manifest").get("files")
        if isinstance(files, dict):
            return {name for name in files if is_needed(name) and not name.endswith(_WEIGHTS)}
    return {*_USUAL, *_code_names(parse_json(small["config.json"], Path("config.json"), "config"))}


def _code_names(config: Mapping[str, Any]) -> set[str]:
    """The files of code that a config names: ``modeling_x.Class`` is in ``modeling_x.py``."""
    classes = config.get("auto_map")
    values = classes.values() if isinstance(classes, Mapping) else ()
    parts = (value.rpartition("--")[2].partition(".")[0] for value in values if isinstance(value, str))
    return {f"{part}.py" for part in parts if part.isidentifier()}


def _check_listed(remote: Remote, names: Collection[str]) -> None:
    """Refuse a folder without what this reads, by what it has.

    Raises:
        CheckpointError: no model, an adapter, a GGUF file, or pickles.
    """
    if not names:
        raise CheckpointError("there are no files under this address", where=remote.name, hint="check the address")
    local = "download it and name the folder"
    if "config.json" not in names and "adapter_config.json" in names:
        raise CheckpointError("the folder holds an adapter, not a model", where=remote.name, hint=local)
    if any(name.endswith(_WEIGHTS) for name in names):
        return
    if any(name.endswith(".gguf") for name in names):
        raise CheckpointError("GGUF files are read only from this machine", where=remote.name, hint=local)
    if any(name.endswith(_OTHER_WEIGHTS) for name in names):
        raise CheckpointError("pickled weights are read only from this machine", where=remote.name, hint=local)


def _refuse_weights(remote: Remote, name: str, error: Absent) -> NoReturn:
    if error.message == "no such file":
        hint = "only safetensors is read by range; other weights must be on this machine"
        raise CheckpointError("no such file", where=f"{remote.name}/{name}", hint=hint) from None
    raise error
