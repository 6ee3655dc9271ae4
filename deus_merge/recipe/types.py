"""A recipe as frozen dataclasses.

Reference: mergekit's merge configuration, whose keys mean here what they mean there; ``merge_method``, ``base_model``
and ``parameters`` of a slice, and ``upscale``, are additions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..core.located import Located
from ..models.reference import ModelRef
from ..models.tokenizer.settings import TokenizerSettings
from .parameters import Settings


@dataclass(frozen=True)
class SliceSource:
    """Layers of one model; ``layer_range`` is zero-based and half-open, None for all layers."""

    model: ModelRef
    layer_range: tuple[int, int] | None = None
    parameters: Settings = field(default_factory=dict)
    place: Located = field(compare=False, repr=False, default=Located(None))

    @property
    def num_layers(self) -> int | None:
        """None when only the model's depth tells."""
        return self.layer_range and self.layer_range[1] - self.layer_range[0]


@dataclass(frozen=True)
class Align:
    """What ``align:`` says: sources are brought to the base model (or to the last one) before the method runs.

    Attributes:
        given: The parameters that are set, ``alignment`` first.
        values: Of all parameters of `alignment.ALIGNMENT`.
    """

    given: Mapping[str, object]
    values: Mapping[str, object] = field(compare=False, repr=False)
    place: Located = field(compare=False, repr=False, default=Located(None))


@dataclass(frozen=True)
class OutputSlice:
    """Consecutive output layers, made from equally long sources by one method.

    Attributes:
        shared: Parameters of the module that it is in: behind its own, before the recipe's.
    """

    sources: tuple[SliceSource, ...]
    merge_method: str
    base_model: ModelRef | None = None
    align: Align | None = None
    parameters: Settings = field(default_factory=dict)
    place: Located = field(compare=False, repr=False, default=Located(None))
    shared: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Module:
    """One of the stacks of layers that a model has, with what is around it: its slices."""

    slices: tuple[OutputSlice, ...]
    parameters: Settings = field(default_factory=dict)
    place: Located = field(compare=False, repr=False, default=Located(None))


@dataclass(frozen=True)
class Upscale:
    """The ``upscale:`` shorthand; `presets.expand` turns it into slices once the depth is known."""

    preset: str
    insert: Located | None = None  # its forms need the depth: presets reads them
    parameters: Settings = field(default_factory=dict)
    place: Located = field(compare=False, repr=False, default=Located(None))


@dataclass(frozen=True)
class Recipe:
    """A whole recipe. Exactly one of ``slices`` (also made from ``models``), ``modules`` and ``upscale`` is set.

    Attributes:
        modules: By name; those that are not named are the donor's.
        name: Of a document whose result others use as a model.
        documents: Those that a recipe of several documents needs, each behind the ones that it needs itself.
    """

    slices: tuple[OutputSlice, ...] = ()
    modules: Mapping[str, Module] = field(default_factory=dict)
    upscale: Upscale | None = None
    base_model: ModelRef | None = None
    parameters: Settings = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: TokenizerSettings | None = None
    chat_template: str | None = None
    name: str | None = None
    documents: tuple[Recipe, ...] = ()
    source: Located = field(compare=False, repr=False, default=Located(None))

    def pieces(self) -> tuple[OutputSlice, ...]:
        """Every slice, also those of modules."""
        return (*self.slices, *(piece for module in self.modules.values() for piece in module.slices))

    def models(self) -> tuple[ModelRef, ...]:
        """Every model named, base first, each once."""
        refs = [self.base_model] if self.base_model else []
        for piece in self.pieces():
            refs += [s.model for s in piece.sources]
            refs += [piece.base_model] if piece.base_model else []
        return tuple(dict.fromkeys(refs))

    @property
    def donor(self) -> ModelRef:
        """The model whose config, tokenizer, embeddings and head the output takes: the base, or the first one named."""
        return self.models()[0]
