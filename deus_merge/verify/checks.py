"""The checks of a finished output, one method each. What an early check opens, later ones use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from ..checkpoint.header import parse_json, read_small
from ..checkpoint.index import INDEX
from ..checkpoint.reader import Checkpoint, TensorSource
from ..core.errors import DeusMergeError
from ..core.tensors import StoredTensor
from ..core.units import dtype_name, promoted
from ..models.config_json import section
from ..models.config_rules import check_config
from ..models.modules import view_modules
from ..models.view import ModelView, view_model
from ..report.lineage import grown_names
from ..report.manifest import MANIFEST
from . import logits
from . import transformers_model as model
from .weights import ALGORITHM, ZEROS, Seen, Wanted, examine

#: files that change what is loaded from a folder: none may stand there that the run did not write
_LOADED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.py", "vocab.txt", "merges.txt")

Found = tuple[bool | None, str] | tuple[bool | None, str, Mapping[str, object]]


class Skipped(Exception):
    """A check that cannot be made; the message says why."""


class Output:
    """A folder and what its manifest says of it.

    Args:
        folder: The output.
        record: Its manifest.
        sources: The models it was made from, if it was made just now; its checksums are then still to be taken.
        finite: Whether the pass over the weights looks for NaN and infinity.
    """

    def __init__(self, folder: Path, record: Mapping, sources: Sequence[TensorSource] | None, *, finite: bool):
        self.folder, self.record, self.finite = folder, record, finite
        self.fresh, self.trained = sources is not None, bool(record.get("trained"))
        self._sources: Sequence[TensorSource | str] = _reopened(record) if sources is None else sources
        self._checkpoint: Checkpoint | None = None
        self._view: ModelView | None = None
        self._seen: Mapping[str, Seen] | None = None

    # files -------------------------------------------------------------------------------------------------------

    def other_files(self) -> Found:
        """Everything beside the weights as it was written, and nothing else that a loader would read."""
        self._only_before_training()
        digests, wrong = self.record["files"], []
        for name, digest in digests.items():
            path = self.folder / name
            if not path.is_file():
                wrong.append(f"{name} is missing")
            elif hashlib.sha256(read_small(path)).hexdigest() != digest:
                wrong.append(f"{name} is not as it was written")
        if self.record["format"] > 1:  # format 1 does not name all files
            known = {*digests, *self.record["weights"], MANIFEST}
            strange = sorted(path.name for path in self.folder.iterdir() if path.name not in known)
            wrong += [f"{n} was not written by the run" for n in strange if any(fnmatch(n, p) for p in _LOADED)]
        return (False, _some(wrong)) if wrong else (True, f"{len(digests)} as written")

    def headers(self) -> Found:
        """The index and every header: strict, as written, and of one mind."""
        checkpoint = self._checkpoint = Checkpoint.open(self.folder)
        planned, wrong = {} if self.trained else self.record["weights"], []
        names = {header.file.relative_to(self.folder).as_posix(): header for header in checkpoint.headers}
        for name, header in names.items():
            wanted = planned.get(name)
            if wanted and (header.size, header.digest.hex()) != (wanted["bytes"], wanted["header_sha256"]):
                wrong.append(f"{name} does not have the header that was written")
        wrong += [f"{name} is no part of the checkpoint any more" for name in planned if name not in names]
        index = self.folder / INDEX
        if index.exists():
            promised = parse_json(read_small(index), index, "index")
            unnamed = sorted(checkpoint.tensors.keys() - promised["weight_map"].keys())
            if unnamed:
                wrong.append(f"{INDEX} does not name {_some(unnamed)}")
            size = sum(t.nbytes for t in checkpoint.tensors.values())
            if promised.get("metadata", {}).get("total_size") != size:
                wrong.append(f"{INDEX}: total_size is not {size}")
        files = "1 file" if len(names) == 1 else f"{len(names)} files"
        found = f"{files}, {len(checkpoint.tensors)} tensors, no hole and no overlap"
        return (False, _some(wrong)) if wrong else (True, found)

    @property
    def checkpoint(self) -> Checkpoint:
        if self._checkpoint is None:
            raise Skipped("the weights cannot be opened")
        return self._checkpoint

    @property
    def view(self) -> ModelView:
        if self._view is None:
            raise Skipped("config and tensors do not make a model")
        return self._view

    # names and config --------------------------------------------------------------------------------------------

    def tensors(self) -> Found:
        """Names, dtypes and shapes as planned."""
        planned, found = self.record["tensors"], self.checkpoint.tensors
        tied = self.trained and self.checkpoint.config.get("tie_word_embeddings") is True
        dropped = {"lm_head.weight"} if tied else set()  # transformers saves a tied head once, as the embeddings
        wrong = [f"{name} is missing" for name in planned if name not in found and name not in dropped]
        wrong += [f"{name} in {found[name].file.name} was not planned" for name in found if name not in planned]
        for name, info in found.items():
            origin = planned.get(name, {})
            is_now, planned_as = f"{info.dtype} {list(info.shape)}", f"{origin.get('dtype')} {origin.get('shape')}"
            if "dtype" in origin and is_now != planned_as and not self.trained:
                wrong.append(f"{name} in {info.file.name} is {is_now}, planned {planned_as}")
        if wrong:
            return False, _some(wrong)
        other = sorted({i.dtype for i in found.values() if i.dtype != planned[i.name].get("dtype", i.dtype)})
        dtypes = f"shapes; now {', '.join(map(dtype_name, other))}" if other else "dtypes, shapes"
        return True, f"{len(found)} as planned: names, {dtypes}"

    def config(self) -> Found:
        """config.json, the tensors and the plan agree on family, depth, sizes and every list with an entry a layer."""
        checkpoint, record = self.checkpoint, self.record
        view = view_model(checkpoint.config, tuple(checkpoint.tensors), self.folder)
        check_config(checkpoint.config, view, {n: t.shape for n, t in checkpoint.tensors.items()}, self.folder)
        self._view = view
        if view.num_layers != record["num_layers"]:
            return False, f"config.json: {view.num_layers} layers, planned {record['num_layers']}"
        modules = view_modules(checkpoint.config, tuple(checkpoint.tensors), view)
        for name, planned in record.get("modules", {}).items():
            got = modules[name].num_layers if name in modules else "no"
            if got != planned["num_layers"]:
                return False, f"config.json: {name} has {got} layers, planned {planned['num_layers']}"
        layer_settings = section(checkpoint.config, view.layers_path)
        for key in record["layer_lists"]:
            entries = layer_settings.get(key)
            if not isinstance(entries, list) or len(entries) != view.num_layers:
                return False, f"config.json: {key} is no list of {view.num_layers} entries, one a layer"
        dtype = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
        if dtype != record.get("dtype", dtype) and not self.trained:
            return False, f"config.json: dtype {dtype}, planned {record['dtype']}"
        lists = f", lists: {', '.join(record['layer_lists'])}" if record["layer_lists"] else ""
        return True, f"{view.num_layers} layers, {len(record['new_layers'])} new{lists}"

    # bytes -------------------------------------------------------------------------------------------------------

    def checksums(self) -> Found:
        """The one pass over the weights; what else it sees, later checks tell."""
        wanted = []
        for name, tensor in self.checkpoint.tensors.items():
            action = self.record["tensors"].get(name, {}).get("action")
            like = ZEROS if action == "zeros" else self._source_of(tensor) if action == "copy" else None
            wanted.append(Wanted(tensor, like))
        seen = self._seen = examine(wanted, finite=self.finite)
        if self.fresh:
            return True, f"{len(seen)} tensors, taken now"
        self._only_before_training()
        if not any(ALGORITHM in origin for origin in self.record["tensors"].values()):
            raise Skipped("the run took none (it had --no-verify, or was an older version's)")
        wrong = [name for name in seen if not self._as_written(name)]
        if wrong:
            return False, self._places(wrong, "is not as it was written")
        return True, f"{len(seen)} tensors as written ({ALGORITHM})"

    def _as_written(self, name: str) -> bool:
        return self.seen[name].checksum == self.record["tensors"].get(name, {}).get(ALGORITHM)

    @property
    def seen(self) -> Mapping[str, Seen]:
        if self._seen is None:
            raise Skipped("the weights cannot be read")
        return self._seen

    @property
    def taken(self) -> dict[str, str]:
        """Checksums by name, as far as they were taken."""
        return {name: seen.checksum for name, seen in (self._seen or {}).items()}

    def zeroed(self) -> Found:
        self._only_before_training()
        names = self._made_by("zeros")
        wrong = [name for name in names if not self.seen[name].same]
        return (False, self._places(wrong, "is not zero")) if wrong else (True, f"{len(names)} zero")

    def copied(self) -> Found:
        names = self._made_by("copy")
        gone = {i: source for i, source in enumerate(self._sources) if isinstance(source, str)}
        there = [name for name in names if self.record["tensors"][name]["model"] not in gone]
        wrong = [name for name in there if not self.seen[name].same]
        if wrong:
            changed = all(map(self._as_written, wrong))
            hint = " (the checksums fit, so it may be the source that has changed)" if changed else ""
            theirs = self._sources[self.record["tensors"][wrong[0]]["model"]].tensors
            was = theirs.get(self.record["tensors"][wrong[0]]["tensor"])
            if was and was.dtype != self._dtype_of(wrong[0]) and self.trained:
                now, then = dtype_name(self._dtype_of(wrong[0])), dtype_name(was.dtype)
                hint = f" (it is {now}, its source {then}: save the model in a dtype that holds its base)"
            return False, self._places(wrong, "differs from its source") + hint
        widened = sum(self._source_of(self.checkpoint.tensors[name]).dtype != self._dtype_of(name) for name in there)
        equal = f"{len(there)} equal to their sources, " + (
            f"{widened} of them in a wider dtype" if widened else "byte for byte"
        )
        return (True, equal) if len(there) == len(names) else (None, f"{equal}; {_some(gone.values())}")

    def finite_values(self) -> Found:
        wrong = [name for name, seen in self.seen.items() if seen.finite is False]
        looked_at = sum(seen.finite is not None for seen in self.seen.values())
        return (False, self._places(wrong, "holds NaN or infinity")) if wrong else (True, f"{looked_at} tensors")

    def _made_by(self, action: str) -> list[str]:
        tensors, new = self.record["tensors"], grown_names(self.record) if self.trained else ()
        names = (name for name in self.checkpoint.tensors if tensors.get(name, {}).get("action") == action)
        return [name for name in names if name not in new]

    def _only_before_training(self) -> None:
        """After it, only the frozen base can be compared: the trainer wrote the files anew."""
        if self.trained:
            raise Skipped("the model was trained")

    def _source_of(self, ours: StoredTensor) -> StoredTensor | None:
        """The stored tensor a copy was made from, where it is still there."""
        origin = self.record["tensors"][ours.name]
        source = self._sources[origin["model"]]
        theirs = None if isinstance(source, str) else source.tensors.get(origin["tensor"])
        if not theirs or theirs.shape != ours.shape:
            return None
        holds = theirs.dtype == ours.dtype or (self.trained and promoted([ours.dtype, theirs.dtype]) == ours.dtype)
        return theirs if holds else None

    def _dtype_of(self, name: str) -> str:
        return self.checkpoint.tensors[name].dtype

    def _places(self, names: Sequence[str], what: str) -> str:
        return _some([f"{name} in {self.checkpoint.tensors[name].file.name} {what}" for name in names])

    # transformers ------------------------------------------------------------------------------------------------

    def tokenizer(self) -> Found:
        return model.tokenizer(self.checkpoint, self.view, self.record)

    def transformers(self) -> Found:
        return model.transformers_model(self.checkpoint, self.view, self.taken)

    def logits(self, text: str) -> Found:
        base = self._sources[self.record["donor"]]
        if isinstance(base, str):
            raise Skipped(base)
        equal = self.record["function_preserving"] and not self.trained
        return logits.compare(base.folder, self.folder, text, equal=equal)


def _reopened(record: Mapping) -> list[Checkpoint | str]:
    """The models an output was made from; instead of one that is not what it was, what became of it."""
    found: list[Checkpoint | str] = []
    for source in record["sources"]:
        if "folder" not in source:
            found.append(f"{source['model']} is made when it is read: there is no folder to compare with")
            continue
        try:
            checkpoint = Checkpoint.open(source["folder"])
            changed = checkpoint.fingerprint != source["fingerprint"]
            found.append(f"source {source['folder']} has changed since" if changed else checkpoint)
        except DeusMergeError as error:
            found.append(f"source {source['folder']} cannot be read: {error.message}")
    return found


#: name, check, and whether it needs transformers or a look at every value
CHECKS = (
    ("other files", Output.other_files, False),
    ("files and headers", Output.headers, False),
    ("tensors against the plan", Output.tensors, False),
    ("layers and config", Output.config, False),
    ("checksums", Output.checksums, False),
    ("zeroed tensors", Output.zeroed, False),
    ("copied tensors", Output.copied, False),
    ("finite values", Output.finite_values, True),
    ("tokenizer", Output.tokenizer, True),
    ("transformers", Output.transformers, True),
)


def _some(items: Iterable[str]) -> str:
    """The first three, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more
