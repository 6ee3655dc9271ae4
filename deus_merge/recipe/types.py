"""A recipe as frozen dataclasses.

Reference: mergekit's merge configuration; its keys have the same meaning here. ``merge_method``, ``base_model`` and
``parameters`` of a slice, and ``upscale``, are additions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.located import Located, Plain
from ..core.text import plural
from ..models.reference import ModelRef
from ..models.tokenizer.settings import TokenizerSettings
from .calibrate import Calibrate
from .parameters import Settings


@dataclass(frozen=True)
class SliceSource:
    """Layers of one model.

    Attributes:
        model: The model.
        layer_range: First layer and last layer + 1, zero-based; None for all layers.
        parameters: Settings of this source.
        place: The place in the recipe.
    """

    model: ModelRef
    layer_range: tuple[int, int] | None = None
    parameters: Settings = field(default_factory=dict)
    place: Located = field(compare=False, repr=False, default=Located(None))

    @property
    def num_layers(self) -> int | None:
        """Number of layers; None where it is the model's depth, which a recipe does not know."""
        return self.layer_range and self.layer_range[1] - self.layer_range[0]


@dataclass(frozen=True)
class Align:
    """An ``align:`` section: sources are aligned to the base model (or to the last source) before the method runs.

    Attributes:
        given: The parameters that the recipe sets, ``alignment`` first.
        values: The value of every parameter of `align.parameters.PARAMETERS`, whose types depend on the parameters.
        place: The place in the recipe.
    """

    given: Mapping[str, Plain]
    values: Mapping[str, Any] = field(compare=False, repr=False)
    place: Located = field(compare=False, repr=False, default=Located(None))


@dataclass(frozen=True)
class OutputSlice:
    """Consecutive output layers that one method computes from sources of equal length.

    Attributes:
        sources: The layers to merge.
        merge_method: The method's name.
        base_model: The base model, where the slice sets one.
        align: The alignment of the sources; None for none.
        parameters: Settings of this slice.
        place: The place in the recipe.
        shared: Settings of the slice's module. They apply after the slice's own and before the recipe's.
    """

    sources: tuple[SliceSource, ...]
    merge_method: str
    base_model: ModelRef | None = None
    align: Align | None = None
    parameters: Settings = field(default_factory=dict)
    place: Located = field(compare=False, repr=False, default=Located(None))
    shared: Settings = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether it has no layers: it then only chooses embeddings (as the first slice) or the head (as the last)."""
        return all(s.num_layers == 0 for s in self.sources)


@dataclass(frozen=True)
class Module:
    """One module of a model: a stack of layers with its embeddings and norms.

    Attributes:
        slices: Its output layers.
        parameters: Settings of the module.
        place: The place in the recipe.
    """

    slices: tuple[OutputSlice, ...]
    parameters: Settings = field(default_factory=dict)
    place: Located = field(compare=False, repr=False, default=Located(None))


@dataclass(frozen=True)
class Upscale:
    """The ``upscale:`` shorthand, which `presets.expand` turns into slices once the depth is known.

    Attributes:
        preset: The preset's name.
        insert: The places of new layers, which `presets.expand` reads; None for the preset's own.
        parameters: Settings of the preset's method.
        place: The place in the recipe.
    """

    preset: str
    insert: Located | None = None
    parameters: Settings = field(default_factory=dict)
    place: Located = field(compare=False, repr=False, default=Located(None))


@dataclass(frozen=True)
class Recipe:
    """A whole recipe. Exactly one of ``slices`` (which ``models`` also gives), ``modules`` and ``upscale`` is set.

    Attributes:
        slices: The output's layers.
        modules: Modules by name; the others are copied from the donor.
        upscale: The shorthand for a deeper model.
        base_model: The base model.
        parameters: Settings of the recipe.
        dtype: safetensors code of the dtype of arithmetic and output.
        out_dtype: safetensors code of the output's dtype, where it differs from ``dtype``.
        quantize_new: Whether new layers are written in the format of a quantised base, not in floating point.
        calibrate: How the zeroed outputs of new layers are set from a text; None to leave them at zero.
        tokenizer: Settings of the output's tokenizer; None to copy the donor's.
        chat_template: ``auto``, the name of a template, or a template.
        name: The name of a document whose result other documents use as a model.
        documents: The other documents of the recipe, each after the documents that it needs.
        notes: Warnings about values that have no effect.
        source: The recipe as YAML.
        text: The recipe as its user wrote it; None where it was not read from text.
    """

    slices: tuple[OutputSlice, ...] = ()
    modules: Mapping[str, Module] = field(default_factory=dict)
    upscale: Upscale | None = None
    base_model: ModelRef | None = None
    parameters: Settings = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    quantize_new: bool = False
    calibrate: Calibrate | None = None
    tokenizer: TokenizerSettings | None = None
    chat_template: str | None = None
    name: str | None = None
    documents: tuple[Recipe, ...] = ()
    notes: tuple[str, ...] = field(compare=False, default=())
    source: Located = field(compare=False, repr=False, default=Located(None))
    text: str | None = field(compare=False, repr=False, default=None)

    def __repr__(self) -> str:
        models = ", ".join(dict.fromkeys(str(ref.text) for ref in self.references()))
        what = f"upscale {self.upscale.preset}" if self.upscale else plural(len(self.all_slices()), "slice")
        return f"Recipe({what} of {models})"

    def all_slices(self) -> tuple[OutputSlice, ...]:
        """Every slice, also those of modules."""
        return (*self.slices, *(part for module in self.modules.values() for part in module.slices))

    def references(self) -> tuple[ModelRef, ...]:
        """Every place where the recipe names a model: the base model first, slices without layers last."""
        refs = [self.base_model] if self.base_model else []
        for part in sorted(self.all_slices(), key=lambda part: part.empty):
            refs += [s.model for s in part.sources]
            refs += [part.base_model] if part.base_model else []
        return tuple(refs)

    def models(self) -> tuple[ModelRef, ...]:
        """Every model that the recipe names, the base model first, each once."""
        return tuple(dict.fromkeys(self.references()))

    @property
    def donor(self) -> ModelRef:
        """The model whose config, tokenizer, embeddings and head the output takes: the base, or the first model."""
        return self.models()[0]
