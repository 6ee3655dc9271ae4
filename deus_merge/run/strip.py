"""Removes the new layers of an output: the base, byte for byte; after training, the base's layers as they are now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..checkpoint import Checkpoint, OutputFolder, ShardLayout, TensorEntry, index_json, plan_shards
from ..checkpoint.contents import contents_digest
from ..checkpoint.dequantized import dequantized, float_shapes
from ..checkpoint.header import read_small
from ..checkpoint.index import INDEX
from ..core.errors import DeusMergeError, PlanError, VerifyError, json_text
from ..core.tensors import UNCHANGED, StoredTensor
from ..core.units import parse_size, promoted
from ..models.config_json import Config, patched
from ..models.config_rules import check_config
from ..models.side_files import copied_files
from ..models.stacks import depth_at
from ..models.view import ModelView, prefix_of, view_model
from ..report.manifest import MANIFEST, RECIPE, RECIPES, Manifest, check_belongs, read_manifest
from ..report.manifest_parts import ManifestLayer, WeightFile
from ..report.plan_manifest import sha256
from ..verify.weights import TensorCheck, examine
from .preflight import check_apart
from .strip_config import base_config, with_nulls


@dataclass(frozen=True)
class Stripped:
    """A base that was recovered from an output.

    Attributes:
        folder: The folder that was written.
        num_layers: The number of its layers.
        removed: The output's layers that are not in it.
        tensors: The number of its tensors.
        equal: How many are equal to the base's, byte for byte; None when the base is not available.
        widened: How many more have the base's values in a wider dtype.
        different: The names of the others: trained since, cast when the output was written, or missing in the base.
        dequantized: How many quantised weights of the base are in floating point, because a trainer saved them so.
        same_files: Whether its config.json and its safetensors headers are equal to the base's.
        has_manifest: Whether it has the manifest of the growth before; None where there was no growth before.
    """

    folder: Path
    num_layers: int
    removed: tuple[int, ...]
    tensors: int
    equal: int | None
    widened: int
    different: tuple[str, ...]
    dequantized: int
    same_files: bool
    has_manifest: bool | None = None

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
            "dequantized": self.dequantized,
            "same_files": self.same_files,
            "manifest": self.has_manifest,
        }


def strip(
    folder: Path | str,
    out: Path | str,
    *,
    manifest: Path | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Stripped:
    """Write an output without the layers that its last growth added. Tensors are copied from file to file.

    Args:
        folder: The output, or a folder that a trainer saved it to.
        out: The folder for the base; it appears when it is complete and checked.
        manifest: The output's manifest (or its folder), when ``folder`` has none.
        max_shard_size: Upper bound of an output file.
        overwrite: Replace an existing ``out``.

    Returns:
        The base, compared with the original one where that is available.

    Raises:
        CheckpointError: there is no manifest, or it is not this checkpoint's.
        PlanError: the base's layers are not all in it in their order, or ``out`` exists.
        VerifyError: the written tensors are not equal to those that were read.
    """
    folder = Path(folder)
    place = folder if manifest is None else Path(manifest)
    record = read_manifest(place, ("donor_config", "layer_prefix"))
    checkpoint = Checkpoint.open(folder)
    _check_no_ancestor(Path(out), record, place.parent if place.is_file() else place)
    view = check_belongs(record, checkpoint, hint="name the right one with --manifest")
    layers = _base_layers(record, view, checkpoint.config)
    sources = _renamed(checkpoint, view, layers)
    base = _original_base(record)
    config = base_config(checkpoint, view, layers, record, sources)
    if base:
        config = with_nulls(config, base.config)
    # in the base's order; else sorted by name, as safetensors and transformers write a file
    order = base.tensors if base and base.tensors.keys() == sources.keys() else sorted(sources)
    entries = [TensorEntry(name, sources[name].dtype, sources[name].shape) for name in order]
    shards = plan_shards([[entry] for entry in entries], parse_size(max_shard_size))
    files = {name: c if isinstance(c, bytes) else read_small(c) for name, c in copied_files(checkpoint).items()}
    files["config.json"] = (json_text(config, indent=2) + "\n").encode()
    if len(shards) > 1:
        files[INDEX] = index_json(shards)
    earlier = _EarlierGrowth.of(record)
    files |= earlier.recipes

    identity = sha256(f"strip {record.plan_hash}".encode())
    output = OutputFolder(out, plan_hash=identity, overwrite=overwrite)
    check_apart(output.out, [checkpoint])
    with output:
        output.shards(shards).copy_many(sources.items())
        for name, content in files.items():
            output.put(name, content)
        written = Checkpoint.open(output.folder)
        _check_written(written, sources)
        equal, widened, different = _compare(written, base) if base else (None, 0, ())
        unchanged = equal is not None and not different and not widened
        content = earlier.sealed(shards, files, written, unchanged, record.base_trained, output.out)
        if content is not None:
            output.put(MANIFEST, content)
        output.finish()
    return Stripped(
        folder=Path(out),
        num_layers=len(layers),
        removed=record.new_layers,
        tensors=len(sources),
        equal=equal,
        widened=widened,
        different=different,
        dequantized=_dequantized(written, base) if base and different else 0,
        same_files=written.fingerprint == record.sources[record.donor].fingerprint,
        has_manifest=content is not None if earlier.expected else None,
    )


def _check_no_ancestor(out: Path, manifest: Manifest, grown: Path) -> None:
    """Check that ``out`` is not the output itself, and no model that the output, or its base, was made from.

    Raises:
        PlanError: it is.
    """
    folders = [Path(s.folder) for growth in manifest.growths for s in growth.sources if s.folder is not None]
    for folder in (*folders, grown):
        if folder.exists() and out.exists() and folder.samefile(out):
            raise PlanError(
                "this is the output itself, or a model that it was made from",
                where=out,
                expected="a new folder, for the base that is recovered from the output",
                hint="choose another folder: strip compares the new base with the original one by itself",
            )


@dataclass(frozen=True)
class _EarlierGrowth:
    """The growth that the base itself is the output of.

    Attributes:
        expected: Whether there was one; False also where the base is available and has no manifest.
        manifest: Its manifest, where that is available.
        recipes: Its recipes: name -> bytes; nothing where they are not available.
    """

    expected: bool
    manifest: Manifest | None = None
    recipes: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, manifest: Manifest) -> _EarlierGrowth:
        """The growth before the last one of a manifest."""
        growths = {growth.plan_hash: growth for growth in manifest.growths[:-1]}
        base = manifest.sources[manifest.donor].folder
        if not growths or base is None:
            return cls(expected=bool(growths))
        folder = Path(base)
        if folder.is_dir() and not (folder / MANIFEST).is_file():
            return cls(expected=False)
        try:
            earlier = read_manifest(folder)
            growth = growths[earlier.plan_hash]
        except (DeusMergeError, KeyError):
            return cls(expected=True)
        there = {name: read_small(folder / name) for name in RECIPES if (folder / name).is_file()}
        expected = {**{name: earlier.files.get(name) for name in RECIPES}, RECIPE: growth.recipe}
        return cls(True, earlier, {name: c for name, c in there.items() if sha256(c) == expected[name]})

    def sealed(
        self,
        shards: Sequence[ShardLayout],
        files: Mapping[str, bytes],
        written: Checkpoint,
        unchanged: bool,
        base_trained: bool,
        out: Path,
    ) -> bytes | None:
        """Its manifest's file for the weights that were written; None where it is not available, or where they were
        cast to a dtype that does not hold its tensors."""
        if self.manifest is None:
            return None
        for name, tensor in written.tensors.items():
            planned = self.manifest.tensors.get(name)
            if planned and planned.dtype and promoted([tensor.dtype, planned.dtype]) != tensor.dtype:
                return None
        manifest = replace(
            self.manifest,
            weights={s.filename: WeightFile(bytes=s.size, header_sha256=sha256(s.header)) for s in shards},
            files={name: sha256(content) for name, content in sorted(files.items())},
            trained=self.manifest.trained or not unchanged,
            base_trained=self.manifest.base_trained or base_trained,
        )
        return manifest.sealed(out)


def _base_layers(manifest: Manifest, view: ModelView, config: Config) -> list[int]:
    """The output's layers that are the base's; ``config`` is the output's.

    Raises:
        PlanError: the base's layers are not all in the output, unchanged and in their order.
    """
    if not manifest.new_layers:
        raise PlanError("there is no new layer to remove", hint="nothing was added to its main stack")
    base = manifest.sources[manifest.donor].model
    for name, module in (manifest.modules or {}).items():
        if any(layer.new or not _is_unchanged(layer) for layer in module.layers):
            raise PlanError(f"{name} is not that of {base} either", hint="only the main stack can be stripped")
    said = depth_at(patched(config, manifest.donor_config or {}), view.layers_path)
    depth = said if isinstance(said, int) else manifest.num_layers
    old = [layer for layer in manifest.layers if not layer.new]
    origins = [(layer.sources[0].model, layer.sources[0].layer) for layer in old]
    changed = [layer for layer in old if not _is_unchanged(layer)]
    if changed or origins != [(base, layer) for layer in range(depth)]:
        numbers = f"layers {[number for _, number in origins]}"
        raise PlanError(
            f"the layers of {base} are not all there as they were",
            expected=f"its layers 0 to {depth - 1}, copied, in order, with new ones between them",
            got=_describe(changed[0]) if changed else numbers,
            hint="only an output with added layers can be stripped, not one with merged or removed layers",
        )
    return [layer.layer for layer in old]


def _describe(layer: ManifestLayer) -> str:
    """A layer that is not one of the base's, for the message."""
    sources = f" of {len(layer.sources)} layers" if len(layer.sources) > 1 else ""
    return f"layer {layer.layer} is {layer.how}{sources}"


def _is_unchanged(layer: ManifestLayer) -> bool:
    """Whether a layer is one layer of a source, rounding to another dtype apart."""
    return len(layer.sources) == 1 and set(layer.actions) <= UNCHANGED


def _renamed(checkpoint: Checkpoint, view: ModelView, layers: Sequence[int]) -> dict[str, StoredTensor]:
    """The output's stored tensors by their names in the base, whose layers are these ones of the output."""
    tensors = dequantized(checkpoint).tensors
    names = {name: name for name in (*view.before, *view.after)}  # in the base -> in the output
    for layer, old in enumerate(layers):
        before, after = (prefix_of(i, view.layer_prefix) for i in (old, layer))
        names |= {after + name.removeprefix(before): name for name in view.layers[old].values()}
    sources: dict[str, StoredTensor] = {}
    for new, name in names.items():
        if quantization := tensors[name].quantization:
            sources |= {part: quantization.parts[label] for label, part in quantization.named(new).items()}
        else:
            sources[new] = tensors[name]
    return sources


def _check_written(written: Checkpoint, sources: Mapping[str, StoredTensor]) -> None:
    model = dequantized(written)
    view = view_model(model.config, tuple(model.tensors), written.folder)
    check_config(model.config, view, float_shapes(model), written.folder)
    results = examine((TensorCheck(written.tensors[name], info) for name, info in sources.items()), finite=False)
    if wrong := [name for name, result in results.items() if not result.equal]:
        raise VerifyError(f"{wrong[0]} differs from the tensor that was read", where=sources[wrong[0]].file)


def _original_base(manifest: Manifest) -> Checkpoint | None:
    """The original base; None where it is not available, or not as it was."""
    source = manifest.sources[manifest.donor]
    if source.folder is None or not Path(source.folder).is_dir():
        return None
    try:
        base = Checkpoint.open(source.folder)
    except DeusMergeError:  # pickled, or damaged since
        return None
    same = base.fingerprint == source.fingerprint and source.contents in (None, contents_digest(base))
    return base if same else None


def _compare(written: Checkpoint, base: Checkpoint) -> tuple[int, int, tuple[str, ...]]:
    """Compare a written base with the original one.

    Returns:
        How many tensors are equal byte for byte, how many have equal values in a wider dtype, and the names of the
        others.
    """
    names = sorted(written.tensors.keys() | base.tensors.keys())
    checks = {}
    for name in names:
        ours, theirs = written.tensors.get(name), base.tensors.get(name)
        if ours and theirs and ours.shape == theirs.shape and promoted([ours.dtype, theirs.dtype]) == ours.dtype:
            checks[name] = TensorCheck(ours, theirs)
    results = examine(checks.values(), finite=False)
    different = tuple(name for name in names if name not in results or not results[name].equal)
    widened = sum(checks[name].widened for name in names if name not in different)
    return len(names) - len(different) - widened, widened, different


def _dequantized(written: Checkpoint, base: Checkpoint) -> int:
    """The number of weights that are quantised in the original base, and not in the written one."""
    ours, theirs = dequantized(written).tensors, dequantized(base).tensors
    return sum(t.quantization is not None and n in ours and not ours[n].quantization for n, t in theirs.items())
