"""Takes new layers out again: the base back, byte for byte; after training, the base's layers as they now are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint import Checkpoint, OutputFolder, ShardLayout, TensorEntry, index_json, plan_shards
from ..checkpoint.header import read_small
from ..checkpoint.index import INDEX
from ..core.errors import DeusMergeError, PlanError, VerifyError, json_text
from ..core.tensors import UNCHANGED, StoredTensor
from ..core.units import dtype_name, parse_size, promoted
from ..models.config_rules import LayerEntries, check_config, deeper_config
from ..models.side_files import copied_files
from ..models.view import ModelView, prefix_of, view_model
from ..report.lineage import generations
from ..report.manifest import MANIFEST, RECIPE, check_belongs, read_manifest, sealed
from ..verify.weights import Wanted, examine
from .preflight import check_apart

_NEEDED = ("donor", "donor_config", "layer_prefix", "layers", "new_layers", "num_layers", "sources")


@dataclass(frozen=True)
class Stripped:
    """A base that was taken out of its output.

    Attributes:
        folder: Where it is.
        num_layers: Its depth.
        removed: The output's layers that are not in it.
        tensors: How many it has.
        equal: How many are the base's, byte for byte; None when the base is not there to compare with.
        widened: How many more have the base's values in a wider dtype.
        different: The others' names: trained since, cast when the output was made, or not in the base.
        same_files: Whether its config.json and its safetensors headers are the base's, too.
        carried: Whether it has the manifest of an earlier growth; None: there was none.
    """

    folder: Path
    num_layers: int
    removed: tuple[int, ...]
    tensors: int
    equal: int | None
    widened: int
    different: tuple[str, ...]
    same_files: bool
    carried: bool | None = None

    def describe(self) -> dict:
        """As JSON data."""
        return {
            "folder": str(self.folder),
            "num_layers": self.num_layers,
            "removed_layers": list(self.removed),
            "tensors": self.tensors,
            "equal_to_base": self.equal,
            "widened": self.widened,
            "different": list(self.different),
            "same_files": self.same_files,
            "manifest": self.carried,
        }


def strip(
    folder: Path | str,
    out: Path | str,
    *,
    manifest: Path | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Stripped:
    """Write an output without the layers that its last growth put in. Tensors go from file to file.

    Args:
        folder: The output, or a folder that a trainer saved it to.
        out: Where to write the base; it appears when it is whole and checked.
        manifest: The output's manifest (or its folder), when ``folder`` has none.
        max_shard_size: Upper bound of an output file.
        overwrite: Replace an existing ``out``.

    Raises:
        CheckpointError: there is no manifest, or it is not this checkpoint's.
        PlanError: the base's layers are not all in it in their order, or ``out`` is in the way.
        VerifyError: what was written is not what was read.
    """
    folder = Path(folder)
    told_by = folder if manifest is None else Path(manifest)
    record = read_manifest(told_by, _NEEDED)
    checkpoint = Checkpoint.open(folder)
    _check_no_source(Path(out), record, told_by.parent if told_by.is_file() else told_by)
    view = check_belongs(record, checkpoint, hint="name the right one with --manifest")
    kept = _kept_layers(record, view)
    sources = _renamed(checkpoint, view, kept)
    config = _base_config(checkpoint, view, kept, record, sources)
    base = _base(record)
    # in the base's order; else sorted by name, as safetensors and transformers write a file
    order = base.tensors if base and base.tensors.keys() == sources.keys() else sorted(sources)
    entries = [TensorEntry(name, sources[name].dtype, sources[name].shape) for name in order]
    shards = plan_shards([[entry] for entry in entries], parse_size(max_shard_size))
    files = {name: c if isinstance(c, bytes) else read_small(c) for name, c in copied_files(checkpoint).items()}
    files["config.json"] = (json_text(config, indent=2) + "\n").encode()
    if len(shards) > 1:
        files[INDEX] = index_json(shards)
    earlier = _Earlier.of(record)
    if earlier.recipe is not None:
        files[RECIPE] = earlier.recipe

    identity = hashlib.sha256(f"strip {record['plan_hash']}".encode()).hexdigest()
    output = OutputFolder(out, plan_hash=identity, overwrite=overwrite)
    check_apart(output.out, [checkpoint])
    with output:
        output.shards(shards).copy_many(sources.items())
        for name, content in files.items():
            output.put(name, content)
        written = Checkpoint.open(output.folder)
        _check_written(written, sources)
        equal, widened, different = _compare(written, base) if base else (None, 0, ())
        same_files = written.fingerprint == record["sources"][record["donor"]]["fingerprint"]
        unchanged = equal is not None and not different and not widened
        content = earlier.sealed(shards, files, written, unchanged) if earlier.there else None
        if content is not None:
            output.put(MANIFEST, content)
        output.finish()
    removed = tuple(record["new_layers"])
    carried = None if earlier.there is None else content is not None
    return Stripped(Path(out), len(kept), removed, len(sources), equal, widened, different, same_files, carried)


def _check_no_source(out: Path, record: Mapping, grown: Path) -> None:
    """What is written is a base of its own: it replaces no model that the output, or what it was grown from, was made
    from."""
    sources = [s for growth in generations(record) for s in growth["sources"] if isinstance(s, Mapping)]
    folders = [Path(s["folder"]) for s in sources if isinstance(s.get("folder"), str)]
    for folder in (*folders, grown):
        if folder.exists() and out.exists() and folder.samefile(out):
            raise PlanError(
                "this is the output itself, or a model that it was made from",
                where=out,
                expected="a new folder, for the base that is taken out of the output",
                hint="give a folder of its own: strip compares what it writes with the base by itself",
            )


@dataclass(frozen=True)
class _Earlier:
    """What the base has of its own growth, where that is still to be found.

    Attributes:
        there: None: the base came of no growth.
        record: Its manifest.
        recipe: Its recipe's bytes.
    """

    there: bool | None
    record: Mapping = field(default_factory=dict)
    recipe: bytes | None = None

    @classmethod
    def of(cls, record: Mapping) -> _Earlier:
        growths = {entry["plan_hash"]: entry for entry in generations(record)[:-1]}
        folder = Path(record["sources"][record["donor"]].get("folder", ""))
        if not growths or (folder.is_dir() and not (folder / MANIFEST).is_file()):
            return cls(None)
        try:
            earlier = read_manifest(folder)
            growth = growths[earlier["plan_hash"]]
        except (DeusMergeError, KeyError):
            return cls(False)
        recipe = read_small(folder / RECIPE) if (folder / RECIPE).is_file() else b""
        return cls(True, earlier, recipe if _sha256(recipe) == growth["recipe"] else None)

    def sealed(
        self, shards: Sequence[ShardLayout], files: Mapping[str, bytes], written: Checkpoint, unchanged: bool
    ) -> bytes | None:
        """Its manifest for what was written; None where that was cast to a dtype that does not hold its tensors."""
        planned = {name: origin.get("dtype") for name, origin in self.record["tensors"].items()}
        dtypes = [(t.dtype, planned.get(name) or t.dtype) for name, t in written.tensors.items()]
        if any(now != then and promoted([now, then]) != now for now, then in dtypes):
            return None
        weights = {s.filename: {"bytes": s.size, "header_sha256": _sha256(s.header)} for s in shards}
        digests = {name: _sha256(content) for name, content in sorted(files.items())}
        trained = bool(self.record.get("trained")) or not unchanged
        return sealed({**self.record, "weights": weights, "files": digests, "trained": trained})


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _kept_layers(record: Mapping, view: ModelView) -> list[int]:
    """The output's layers that are the base's, all of them and in order."""
    if not record["new_layers"]:
        raise PlanError("there is no new layer to take out", hint="nothing was put into its main stack")
    base = record["sources"][record["donor"]]["model"]
    for name, module in record.get("modules", {}).items():
        if any(e["new"] or len(e["sources"]) > 1 or not _is_unchanged(e) for e in module["layers"]):
            raise PlanError(f"{name} is not that of {base} either", hint="only the main stack can be stripped")
    patch: object = record["donor_config"]
    for key in view.layers_path:
        patch = patch.get(key) if isinstance(patch, Mapping) else None
    depth = patch if isinstance(patch, int) else record["num_layers"]
    kept = [entry for entry in record["layers"] if not entry["new"]]
    origins = [(e["sources"][0]["model"], e["sources"][0]["layer"]) for e in kept]
    merged = [e for e in kept if len(e["sources"]) > 1 or not _is_unchanged(e)]
    if merged or origins != [(base, layer) for layer in range(depth)]:
        said = (
            f"layer {merged[0]['layer']} is {' + '.join(merged[0]['actions'])}"
            if merged
            else f"layers {[o[1] for o in origins]}"
        )
        raise PlanError(
            f"the layers of {base} are not all there as they were",
            expected=f"its layers 0 to {depth - 1}, copied, in order, with new ones between them",
            got=said,
            hint="only what was made deeper can be stripped, not what was merged or cut",
        )
    return [entry["layer"] for entry in kept]


def _is_unchanged(layer: Mapping) -> bool:
    """Whether a layer of the output is one of the base's."""
    return set(layer["actions"]) <= {action.value for action in UNCHANGED}


def _renamed(checkpoint: Checkpoint, view: ModelView, kept: list[int]) -> dict[str, StoredTensor]:
    """Name in the base -> the output's stored tensor."""
    sources = {name: checkpoint.tensors[name] for name in (*view.before, *view.after)}
    for layer, old in enumerate(kept):
        before, after = (prefix_of(i, view.layer_prefix) for i in (old, layer))
        sources |= {after + name.removeprefix(before): checkpoint.tensors[name] for name in view.layers[old].values()}
    return sources


def _base_config(
    checkpoint: Checkpoint, view: ModelView, kept: list[int], record: Mapping, sources: Mapping[str, StoredTensor]
) -> dict:
    """The checkpoint's config.json with the base's depth and lists, without what the growth added to it."""
    origins = [LayerEntries(checkpoint.config, layer, str(checkpoint.folder), view.layers_path) for layer in kept]
    config = deeper_config(checkpoint.config, view.layers_path, origins, None)
    _drop_added(config, record["donor_config"])
    stored = {dtype_name(info.dtype) for info in sources.values()}
    for key in ("dtype", "torch_dtype"):
        before = record["donor_config"].get(key)
        if key in config and before is not None and {before} == stored:  # not when the tensors were cast
            config[key] = before
    return config


def _drop_added(config: dict, patch: Mapping) -> None:
    for key, value in patch.items():
        if value is None:
            config.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(config.get(key), dict):
            _drop_added(config[key], value)


def _check_written(written: Checkpoint, sources: Mapping[str, StoredTensor]) -> None:
    view = view_model(written.config, tuple(written.tensors), written.folder)
    shapes = {name: tensor.shape for name, tensor in written.tensors.items()}
    check_config(written.config, view, shapes, written.folder)
    seen = examine((Wanted(written.tensors[name], info) for name, info in sources.items()), finite=False)
    if wrong := [name for name, tensor in seen.items() if not tensor.same]:
        raise VerifyError(f"{wrong[0]} is not what was read", where=sources[wrong[0]].file)


def _base(record: Mapping) -> Checkpoint | None:
    """The base itself, where it still is as it was."""
    source = record["sources"][record["donor"]]
    folder = Path(source.get("folder", ""))
    if "folder" not in source or not folder.is_dir():
        return None
    try:
        base = Checkpoint.open(folder)
    except DeusMergeError:  # pickled, or damaged since
        return None
    return base if base.fingerprint == source["fingerprint"] else None


def _compare(written: Checkpoint, base: Checkpoint) -> tuple[int, int, tuple[str, ...]]:
    """How many tensors are the base's, byte for byte and in a wider dtype, and the names of the others."""
    names = sorted(written.tensors.keys() | base.tensors.keys())
    alike = {}
    for name in names:
        ours, theirs = written.tensors.get(name), base.tensors.get(name)
        if ours and theirs and ours.shape == theirs.shape and promoted([ours.dtype, theirs.dtype]) == ours.dtype:
            alike[name] = Wanted(ours, theirs)
    seen = examine(alike.values(), finite=False)
    different = tuple(name for name in names if name not in seen or not seen[name].same)
    widened = sum(alike[name].widened for name in names if name not in different)
    return len(names) - len(different) - widened, widened, different
