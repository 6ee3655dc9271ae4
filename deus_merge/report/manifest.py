"""``deus_merge.json``: how an output was made, and checksums of every byte that was written. docs/manifest.md is its
specification, and docs/manifest.schema.json is generated from the classes here and in `manifest_parts`.

The last line of the file is the sha256 of all bytes before that line (the seal), so damage is found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from ..checkpoint.dequantized import dequantized
from ..checkpoint.header import parse_json, read_small
from ..checkpoint.quantized import is_cache_scale
from ..checkpoint.reader import TensorSource
from ..core.errors import CheckpointError, VerifyError, json_text
from ..core.tensors import Action
from ..core.typed_json import Misfit, Range, dump, parse, step
from ..models.view import ModelView, prefix_of, view_model
from ..recipe.references import ORIGINAL, WRITTEN
from .manifest_parts import (
    Calibration,
    Count,
    DocumentRecord,
    Growth,
    ManifestBlock,
    ManifestLayer,
    ManifestModule,
    ManifestSource,
    ManifestTensor,
    RunSettings,
    VocabularyRecord,
    WeightFile,
)
from .old_formats import upgraded
from .shareable import found_manifest, shared_manifest

MANIFEST = "deus_merge.json"
RECIPE = WRITTEN
RECIPES = (WRITTEN, ORIGINAL)
#: 1: the first. 2: weights, dtype, layer_lists, checksums, dtype and shape of tensors, the seal. 3: `Action` words.
FORMAT = 3
#: Files that the run writes for the user to edit: they have no checksum.
USER_FILES = frozenset({"README.md"})
_SEAL = ' "sha256": "%s"\n}\n'


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of an output.

    Attributes:
        format: The format of the file that it was read from; `sealed` always writes the newest.
        deus_merge: The version that wrote it.
        plan_hash: The hash of the plan.
        versions: Python and the libraries that were used.
        options: The options of the run.
        donor: The index of the source whose config, tokenizer, embeddings and head the output has.
        donor_config: A JSON merge patch (RFC 7386) that turns the output's config.json into the donor's; missing in
            format 1 only.
        layer_prefix: How the names of a layer's tensors begin, with ``{layer}`` for its number; missing in format 1
            only.
        sources: The models of the plan, then the checkpoints behind them that copies come from.
        num_layers: The number of layers.
        dtype: The dtype in config.json; null where it names none.
        layer_lists: The keys of config.json that have one entry for each layer.
        layer_facts: What config.json says of each layer: by the name of the fact, JSON text for each layer; earlier
            versions did not write it.
        function_preserving: Whether the output computes what the donor computes.
        new_layers: The layers to train.
        new_parameters: The exact names of the tensors to train.
        layers: The layers of the main stack.
        modules: The layers of other stacks, by the name of the stack.
        documents: The documents of the recipe whose results were used as models.
        tensors: How each tensor came about, by its name.
        files: sha256 of each file other than weights, manifest and model card, by its name.
        weights: The safetensors files, by their names.
        warnings: The warnings of the plan.
        blocks: The blocks of the plan and what their making took its time for; earlier versions did not write it.
        vocabulary: The outcome of the recipe's tokenizer settings, where it has any.
        lineage: The runs that added layers, the oldest first and this one last; missing where this is the first.
        trained: Whether the weights were trained after the run.
        base_trained: Whether the base's weights were trained, too.
        calibration: How zeroed outputs of new layers were set in closed form, where they were.
    """

    format: Annotated[int, Range(1, FORMAT)]
    deus_merge: str
    plan_hash: str
    versions: Mapping[str, str]
    options: RunSettings
    donor: Count
    donor_config: Mapping[str, Any] | None = None
    layer_prefix: str | None = None
    sources: tuple[ManifestSource, ...]
    num_layers: Count
    dtype: str | None = None
    layer_lists: tuple[str, ...]
    layer_facts: Mapping[str, tuple[str, ...]] | None = None
    function_preserving: bool
    new_layers: tuple[Count, ...]
    new_parameters: tuple[str, ...]
    layers: tuple[ManifestLayer, ...]
    modules: Mapping[str, ManifestModule] | None = None
    documents: tuple[DocumentRecord, ...] = ()
    tensors: Mapping[str, ManifestTensor]
    files: Mapping[str, str]
    weights: Mapping[str, WeightFile]
    warnings: tuple[str, ...]
    blocks: tuple[ManifestBlock, ...] = ()
    vocabulary: VocabularyRecord | None = None
    lineage: tuple[Growth, ...] = ()
    trained: bool = False
    base_trained: bool = False
    calibration: Calibration | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """A manifest from its JSON data, in any format.

        Raises:
            Misfit: a part is missing, has another type, or contradicts another part.
        """
        manifest = parse(cls, upgraded(data))
        manifest._check()
        return manifest

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON data in the newest format, without the seal."""
        return {"format": FORMAT, **{key: value for key, value in dump(self).items() if key != "format"}}

    def sealed(self, folder: Path | None = None) -> bytes:
        """The manifest's file.

        Args:
            folder: The output's folder: the file names its sources by the rule of `shareable`. None writes them as
                they are, with absolute paths.
        """
        data = self.to_json()
        return seal(shared_manifest(data, folder) if folder else data)

    def with_checksums(self, checksums: Mapping[str, str]) -> Manifest:
        """The same manifest with the XXH3-128 checksum of each tensor."""
        tensors = {name: replace(tensor, xxh3_128=checksums[name]) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)

    @property
    def growth(self) -> Growth:
        """This run's own entry in the lineage."""
        return Growth(
            plan_hash=self.plan_hash,
            sources=self.sources,
            recipe=self.files.get(RECIPE),
            new_layers=self.new_layers,
            trained=self.trained,
        )

    @property
    def growths(self) -> tuple[Growth, ...]:
        """All growths, the oldest first, its own last: at least one."""
        return (*self.lineage[:-1], self.growth)

    @cached_property
    def model_tensors(self) -> Mapping[str, ManifestTensor]:
        """The tensors by their names in a model: a quantised weight by its name in floating point, with the record of
        its codes."""
        found: dict[str, ManifestTensor] = {}
        for name, tensor in self.tensors.items():
            found.setdefault(tensor.weight or name, tensor)
        return found

    @cached_property
    def grown_names(self) -> frozenset[str]:
        """Names of the tensors that any growth added."""
        prefixes = tuple(self.prefix_of(layer) for growth in self.growths[:-1] for layer in growth.new_layers)
        names = {*self.tensors, *self.model_tensors}
        return frozenset(self.new_parameters) | {name for name in names if name.startswith(prefixes)}

    def prefix_of(self, layer: int) -> str:
        """How the names of a layer's tensors begin.

        Raises:
            CheckpointError: the manifest does not say it.
        """
        if self.layer_prefix is None:
            raise _lacks("layer_prefix", MANIFEST)
        return prefix_of(layer, self.layer_prefix)

    def _check(self) -> None:
        """Compare the parts with each other.

        Raises:
            Misfit: two contradict each other.
        """
        if self.donor >= len(self.sources):
            raise Misfit(f"the index of one of {len(self.sources)} sources", str(self.donor), "donor")
        depths = {source.model: source.layers for source in self.sources}
        for place, layers in self._stacks():
            for i, layer in enumerate(layers):
                _check_layer_sources(layer, depths, f"{place}[{i}].sources", own_depth=place == "layers")
        for name, tensor in self.tensors.items():
            if tensor.action is Action.COPY:
                index = len(self.sources) if tensor.model is None else tensor.model
                folders = [source.folder or source.url for source in self.sources[index : index + 1]]
                if folders in ([], [None]) or tensor.tensor is None:
                    expected = "model and tensor: the index of a source that has a folder, and a tensor's name there"
                    raise Misfit(expected, "the copy of no stored tensor", f"tensors{step(name)}")
        for name in self.files:
            if not _is_inside(name):
                raise Misfit(
                    "the name of a file in the output folder, or in a folder of it",
                    repr(name[:200]),
                    f"files{step(name)}",
                )

    def _stacks(self) -> Iterable[tuple[str, tuple[ManifestLayer, ...]]]:
        yield "layers", self.layers
        for name, module in (self.modules or {}).items():
            yield f"modules{step(name)}.layers", module.layers


def _is_inside(name: str) -> bool:
    """Whether this is the name of a file in a folder, or in a folder of that folder."""
    parts = name.split("/")
    return len(parts) <= 2 and all(part not in ("", ".", "..") and Path(part).name == part for part in parts)


def _check_layer_sources(
    layer: ManifestLayer, depths: Mapping[str, int | None], place: str, *, own_depth: bool
) -> None:
    """Check that a layer comes from layers that its sources have.

    Args:
        layer: The layer.
        depths: The number of layers of the main stack of each source, by its ``model``.
        place: Where ``sources`` of the layer are.
        own_depth: Whether the layer is one of the main stack, so that the depths apply.

    Raises:
        Misfit: it does not.
    """
    if not layer.sources:
        raise Misfit("at least one source", "an empty list", place)
    for i, source in enumerate(layer.sources):
        if source.model not in depths:
            raise Misfit("the model of one of the sources", repr(source.model[:200]), f"{place}[{i}].model")
        depth = depths[source.model]
        if own_depth and depth is not None and source.layer >= depth:
            raise Misfit(f"one of the source's {depth} layers", str(source.layer), f"{place}[{i}].layer")


def seal(data: Mapping[str, Any]) -> bytes:
    """JSON data as a manifest's file: with its seal as the last line."""
    text = json_text({key: value for key, value in data.items() if key != "sha256"}, indent=1)
    body = text.removesuffix("\n}").encode() + b",\n"
    return body + (_SEAL % hashlib.sha256(body).hexdigest()).encode()


def read_manifest(folder: Path, needed: Sequence[str] = ()) -> Manifest:
    """The manifest of a finished output.

    Args:
        folder: The output, or the manifest itself.
        needed: Attributes that must not be None: format 1 lacks some.

    Raises:
        CheckpointError: there is none, or it lacks something that is needed.
        VerifyError: it is damaged or malformed, or has an unknown format.
    """
    path = folder if folder.is_file() else folder / MANIFEST
    if not path.exists():
        hint = "merge and upscale write one; training.carry_manifest copies it to a trained model"
        raise CheckpointError("no manifest", where=path, hint=hint)
    try:
        raw = read_small(path)
    except CheckpointError as error:
        raise VerifyError(error.message, where=path, got=error.got) from None
    manifest = parse_manifest(raw, path)
    for name in needed:
        if getattr(manifest, name) is None:
            raise _lacks(name, path)
    return manifest


def parse_manifest(raw: bytes, path: Path) -> Manifest:
    """A manifest from the content of its file.

    Args:
        raw: The content.
        path: The file, for messages.

    Raises:
        VerifyError: it is damaged or malformed, or has an unknown format.
    """
    try:
        data = parse_json(raw, path, "manifest")
    except CheckpointError as error:
        raise VerifyError(error.message, where=path, got=error.got) from None
    found = data.get("format")
    if type(found) is not int or not 1 <= found <= FORMAT:
        raise VerifyError("not a manifest this version reads", where=path, expected=f"format 1 to {FORMAT}", got=found)
    if found > 1 and not _is_sealed(raw):
        hint = "it was damaged or edited: restore it from a backup, or write the output again"
        raise VerifyError("the manifest is not as it was written", where=path, hint=hint)
    try:
        return Manifest.from_json(found_manifest(data, path.parent))
    except Misfit as misfit:
        got = "nothing" if misfit.got is None else misfit.got
        place = f"the manifest is malformed: {misfit.place}"
        raise VerifyError(place, where=path, expected=misfit.expected, got=got) from None


def manifest_among(files: Mapping[str, bytes | Path]) -> Manifest | None:
    """The manifest among the side files of a model; None where it has none.

    Raises:
        VerifyError: as `parse_manifest`.
    """
    file = files.get(MANIFEST)
    if file is None:
        return None
    return read_manifest(file) if isinstance(file, Path) else parse_manifest(file, Path(MANIFEST))


def _is_sealed(raw: bytes) -> bool:
    length = len(_SEAL % "") + 64
    return raw[-length:] == (_SEAL % hashlib.sha256(raw[:-length]).hexdigest()).encode()


def _lacks(name: str, where: object) -> CheckpointError:
    hint = "an earlier version wrote it: write the output again"
    return CheckpointError(f"the manifest lacks {name!r}", where=where, hint=hint)


def check_belongs(manifest: Manifest, checkpoint: TensorSource, hint: str) -> ModelView:
    """Check that a manifest describes a checkpoint: the same layers, with the same tensors.

    Args:
        manifest: With ``layer_prefix``.
        checkpoint: The output, or the same model after training.
        hint: What to do where it does not.

    Returns:
        The checkpoint by layer and role.

    Raises:
        CheckpointError: it does not, or it lacks ``layer_prefix``.
    """
    checkpoint = dequantized(checkpoint)
    view = view_model(checkpoint.config, tuple(checkpoint.tensors), checkpoint.where)
    if manifest.layer_prefix is None:
        raise _lacks("layer_prefix", MANIFEST)
    head = manifest.layer_prefix.rpartition("{layer}")[0]
    found = {name for layer in view.layers for name in layer.values() if not is_cache_scale(name)}
    planned = {name for name in manifest.model_tensors if name.startswith(head) and not is_cache_scale(name)}
    if view.num_layers != manifest.num_layers or found != planned:
        odd = sorted(found ^ planned)
        raise CheckpointError(
            "the manifest is not this checkpoint's",
            where=checkpoint.where,
            expected=f"{manifest.num_layers} layers with {len(planned)} tensors",
            got=f"{view.num_layers} layers with {len(found)} tensors" + (f", odd: {odd[0]}" if odd else ""),
            hint=hint,
        )
    return view
