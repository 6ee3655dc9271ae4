"""A model that a recipe reads: its tensors, sorted by layer and role."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ..checkpoint.dequantized import float_shapes
from ..checkpoint.hub import resolve, split_adapter
from ..checkpoint.lora import LoraSource
from ..checkpoint.quantized import is_packed, quantization_name, quantized_tensors
from ..checkpoint.reader import TensorSource
from ..checkpoint.side_files import side_files
from ..checkpoint.storage import LoadOptions, open_source
from ..checkpoint.tensor_source import FileStamp
from ..core.errors import ArchitectureError, DeusMergeError, nearest
from .built import state_depth
from .config_rules import check_config
from .modules import view_modules
from .reference import ModelRef
from .tokenizer.files import with_adapter
from .view import ModelView, view_model


@dataclass(frozen=True)
class SourceModel:
    """A model the plan reads.

    Attributes:
        ref: The recipe's reference to it.
        checkpoint: Its tensors.
        view: Its tensors by layer and role.
        stamp: The state of its files when they were opened.
        notes: Messages for the user about what was read.
    """

    ref: ModelRef
    checkpoint: TensorSource
    view: ModelView
    stamp: list[FileStamp]
    notes: tuple[str, ...] = ()

    @cached_property
    def modules(self) -> dict[str, ModelView]:
        """Its modules, by their names in recipes."""
        return view_modules(self.checkpoint.config, tuple(self.checkpoint.tensors), self.view)

    @cached_property
    def quantized(self) -> dict[str, str]:
        """Its quantised weights and their companions, each with one that it is read together with."""
        return quantized_tensors(self.checkpoint.tensors, self.checkpoint.config)

    @property
    def main(self) -> str:
        """The name of the module whose layers `view` describes."""
        return next(name for name, view in self.modules.items() if view.layer_prefix == self.view.layer_prefix)

    @classmethod
    def open(
        cls, ref: ModelRef, known: dict[str, TensorSource], load_options: LoadOptions | None = None
    ) -> SourceModel:
        """Find a model, and its adapter if it has one; read configs and headers, and check that they agree.

        Args:
            ref: The recipe's reference to it.
            known: Sources by name; one that is opened is added.
            load_options: The kinds of files that may be read.

        Raises:
            CheckpointError, ArchitectureError: with the place in the recipe that names the model.
        """
        load_options = load_options or LoadOptions()
        note = None
        name, adapter = split_adapter(ref.text)
        address, _ = split_adapter(ref.address or ref.text)
        try:
            if name not in known:
                known[name] = open_source(address, load_options)
                state_depth(known[name].config)
            checkpoint: TensorSource = known[name]
            if adapter is not None:
                folder = resolve(adapter, cache_dir=load_options.cache_dir)
                files, note = with_adapter(checkpoint.side_files, side_files(folder))
                checkpoint = LoraSource(checkpoint, folder, files)
            view = _view(checkpoint)
            check_config(checkpoint.config, view, float_shapes(checkpoint), checkpoint.where)
        except DeusMergeError as error:
            if name not in known:
                error.hint = error.hint or nearest(name, known)
            if ref.place.path:
                error.where = f"{ref.place.where}: {error.where}" if error.where else ref.place.where
            raise
        notes = (f"{ref}: its tokenizer {note}",) if note else ()
        return cls(ref, checkpoint, view, checkpoint.stamp(), notes)

    def shapes(self, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
        """Role -> shape, for role -> tensor name."""
        return {role: self.checkpoint.tensors[name].shape for role, name in names.items()}

    @cached_property
    def _layer_kinds(self) -> dict[str, frozenset]:
        return {}

    def layer_kinds(self, view: ModelView) -> frozenset:
        """The shapes of the layers of one of its stacks; an output layer must have the shapes of one of them."""
        key = view.layer_prefix
        if key not in self._layer_kinds:
            self._layer_kinds[key] = frozenset(frozenset(self.shapes(layer).items()) for layer in view.layers)
        return self._layer_kinds[key]


def _view(checkpoint: TensorSource) -> ModelView:
    """`view_model`, with a message of its own where layers lack tensors because they are stored packed."""
    try:
        return view_model(checkpoint.config, tuple(checkpoint.tensors), checkpoint.where)
    except ArchitectureError as error:
        if not is_packed(checkpoint.tensors):
            raise
        raise ArchitectureError(
            f"the weights are quantised ({quantization_name(checkpoint.config)}), and packed under other names",
            where=checkpoint.where,
            expected="weights in floating point",
            got=f"tensors like {next(n for n in checkpoint.tensors if is_packed([n]))}",
            hint="use the original model, or dequantise this one with transformers and save it in floating point",
        ) from error
