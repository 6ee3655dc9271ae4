"""The parts of a manifest. docs/manifest.schema.json is generated from these classes and their docstrings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

from ..core.tensors import Action
from ..core.typed_json import Range

Count = Annotated[int, Range(0, 99_999)]  # of layers and the like: small enough to loop over
Size = Annotated[int, Range(0)]


@dataclass(frozen=True, kw_only=True)
class ManifestSource:
    """A model that the output was made from, or a checkpoint that copied tensors are stored in.

    Attributes:
        model: The model in the recipe: a folder's name, ``org/name[@revision]``, an address without its
            secrets, each perhaps with ``+adapter``, or the name of a document.
        fingerprint: sha256 over its config and its headers: the same for all fine-tunes of a model.
        contents: sha256 over that and samples of every file, 4 KiB for every 4 MiB; missing in earlier versions,
            for results of documents, and for models on other machines.
        folder: The folder of a checkpoint, or a GGUF file, relative to the output, ``org/name@revision``, or
            ``<private>/name``; None where the tensors are derived from other sources.
        url: The address of a checkpoint on another machine that was read by range, without its secrets.
        revision: The commit of one on the hub.
        etags: The ETags of the files of one elsewhere, by their names.
        layers: The number of its layers; None for checkpoints that the recipe does not name.
        adapter: The folder of an adapter.
        base: The source that the adapter was applied to.
        document: The name of the recipe's document that the source is the result of.
    """

    model: str
    fingerprint: str
    contents: str | None = None
    folder: str | None = None
    url: str | None = None
    revision: str | None = None
    etags: Mapping[str, str] | None = None
    layers: Count | None = None
    adapter: str | None = None
    base: Mapping[str, Any] | None = None
    document: str | None = None


@dataclass(frozen=True, kw_only=True)
class LayerSource:
    """A layer of a source.

    Attributes:
        model: The ``model`` of one of the manifest's sources.
        layer: The number of the layer there.
    """

    model: str
    layer: Count


class _RequiredDiagnostics(TypedDict):
    role: str
    tensor: str


class TensorDiagnostics(_RequiredDiagnostics, total=False):
    """What a merge method reported about a tensor; methods add keys of their own.

    Attributes:
        role: The role of the tensor in its layer.
        tensor: The name of the tensor.
        queries: The query head of A in the place of each query head of B.
    """

    queries: Sequence[Count]


@dataclass(frozen=True, kw_only=True)
class ManifestLayer:
    """A layer of the output.

    Attributes:
        layer: Its number.
        new: Whether it was added, to be trained.
        actions: How its tensors came about, each action once.
        method: The name of the merge method.
        sources: The layers that it was made from, at least one.
        diagnostics: What the method reported.
    """

    layer: Count
    new: bool
    actions: tuple[Action, ...]
    method: str
    sources: tuple[LayerSource, ...]
    diagnostics: tuple[TensorDiagnostics, ...]

    @property
    def how(self) -> str:
        """Its actions in words, for tables."""
        return " + ".join(self.actions)


@dataclass(frozen=True, kw_only=True)
class ManifestModule:
    """Another stack of layers than the main one (a vision tower, an encoder).

    Attributes:
        num_layers: The number of its layers.
        layers: Its layers.
    """

    num_layers: Count
    layers: tuple[ManifestLayer, ...]


@dataclass(frozen=True, kw_only=True)
class ManifestTensor:
    """How a tensor of the output came about.

    Attributes:
        action: How. Where it is ``copy``, ``model`` and ``tensor`` are given, and the source has a folder.
        dtype: safetensors dtype code; missing in format 1 only.
        shape: Its sizes; missing in format 1 only.
        model: The index of the source that it was copied from.
        tensor: The name of the tensor that it was copied from.
        weight: The name of the quantised weight that it is part of, as a model in floating point calls it.
        derived: The indices of the sources whose stored tensor is changed before the method sees it.
        xxh3_128: Checksum of its bytes; missing where the run was not verified.
    """

    action: Action
    dtype: str | None = None
    shape: tuple[Size, ...] | None = None
    model: Count | None = None
    tensor: str | None = None
    weight: str | None = None
    derived: tuple[Count, ...] = ()
    xxh3_128: str | None = None


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A safetensors file of the output.

    Attributes:
        bytes: Its size.
        header_sha256: sha256 over its length prefix and its header.
    """

    bytes: Size
    header_sha256: str


@dataclass(frozen=True, kw_only=True)
class Growth:
    """A run that added layers, as the manifests of later runs record it.

    Attributes:
        plan_hash: The hash of its plan.
        sources: The models that its output was made from.
        recipe: sha256 of its deus_merge.yml.
        new_layers: The layers that it added, as they are numbered in this output.
        trained: Whether its output was trained afterwards.
    """

    plan_hash: str
    sources: tuple[ManifestSource, ...]
    recipe: str | None
    new_layers: tuple[Count, ...]
    trained: bool


class BlockSeconds(TypedDict):
    """What the making of a block took its time for: seconds of all threads that made it, each moment of a thread once.

    Attributes:
        read: Tensors that were read onto the device, dequantised or adapted, and bytes that came from other machines.
        computed: Computing: of a processor, the time on it.
        wrote: Tensors that were written, and copies from file to file, which the kernel reads and writes at once.
        waited: For what another thread reads or writes, for pages of mapped files, and for a processor that others use.
    """

    read: float
    computed: float
    wrote: float
    waited: float


@dataclass(frozen=True, kw_only=True)
class ManifestBlock:
    """A block of the plan: what was made as one.

    Attributes:
        block: Its title: a layer, several layers, embeddings, the head.
        seconds: What its making took its time for.
    """

    block: str
    seconds: BlockSeconds


class _RequiredSettings(TypedDict):
    device: str
    threads: Count


class RunSettings(_RequiredSettings, total=False):
    """The options of the run; versions of deus_merge add keys of their own.

    Attributes:
        device: The type of the device that computed; ``none`` where nothing was computed.
        threads: The number of CPU threads.
        date: The day on which it ended, in UTC: ``2026-11-29``; earlier versions did not write it.
    """

    date: str


class VocabularyRecord(TypedDict):
    """The outcome of the recipe's tokenizer settings; versions of deus_merge add keys of their own.

    Attributes:
        tokens: The number of tokens.
        digest: A digest of all tokens with their ids.
    """

    tokens: Size
    digest: str


class DocumentRecord(TypedDict):
    """A document of the recipe whose result was used as a model; versions of deus_merge add keys of their own.

    Attributes:
        name: Its name.
        plan_hash: The hash of its plan.
    """

    name: str
    plan_hash: str


@dataclass(frozen=True, kw_only=True)
class CalibratedLayer:
    """A new layer whose zeroed outputs were set in closed form.

    Attributes:
        layer: Its number.
        tensors: The tensors that were set; none where no step lowered the loss.
        alpha: The size of the step; 0 where no step lowered the loss.
        loss_before: The loss of the windows that were held out, in nats a token, before this layer was set.
        loss_after: That loss afterwards.
    """

    layer: Count
    tensors: tuple[str, ...]
    alpha: float
    loss_before: float
    loss_after: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How the zeroed outputs of new layers were set in closed form, after the run and before any training.

    Attributes:
        method: `ridge` or `kfac`.
        text_sha256: sha256 of the text in UTF-8.
        tokens: The number of tokens that were fitted. They count as training tokens.
        held_out_tokens: The number of tokens that chose the step sizes.
        length: Tokens of a window.
        damping: The multiple of the mean diagonal entry that was added to the diagonals.
        seed: The seed that chose the windows that were held out.
        loss_before: The loss of the windows that were held out, in nats a token, before the calibration.
        loss_after: That loss afterwards.
        layers: The new layers that were calibrated, from the lowest to the highest.
    """

    method: str
    text_sha256: str
    tokens: Size
    held_out_tokens: Size
    length: Size
    damping: float
    seed: Size
    loss_before: float
    loss_after: float
    layers: tuple[CalibratedLayer, ...]
