"""Which outputs stay quantised, and the section of config.json that says so."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..checkpoint.formats.registry import formats
from ..checkpoint.lora import LoraSource
from ..checkpoint.quantized import format_settings, is_cache_scale, quantization, with_quantization
from ..checkpoint.tensor_source import TensorSource
from ..checkpoint.untied import UntiedSource
from ..core.tensors import Action, StoredTensor
from ..core.text import some_of
from ..methods.base import OutputTensor
from ..models.source import SourceModel
from ..recipe.types import Recipe
from .blocks import BlockPlan


class QuantizedOutputs:
    """Decides which outputs are written as codes.

    A copy keeps its codes where the output's config, which is the donor's, describes them. All else is written in
    floating point, and config.json then says that these modules are not quantised.

    Args:
        recipe: ``dtype`` and ``quantize_new``.
        models: The models, the donor first.
    """

    def __init__(self, recipe: Recipe, models: Sequence[SourceModel]):
        self._recipe, self._donor = recipe, models[0]
        own = quantization(self._donor.checkpoint.config)
        settings = [format_settings(quantization(m.checkpoint.config) or {}) for m in models]
        self._readable = [own is not None and other == settings[0] for other in settings]
        self._models = models
        self._roles: dict[str | None, frozenset[str]] = {}
        self._formats = [_format_of(model) for model in models]
        self.format = self._formats[0]
        if recipe.quantize_new:
            self._check_quantizes()

    def kept(self, taken: StoredTensor, model: int, role: str, module: str | None, new: bool) -> bool:
        """Whether a copy of a stored weight keeps its codes.

        Args:
            taken: The weight.
            model: The index of its model.
            role: Its role in its layer, or its name outside of layers.
            module: The module that the layers belong to; None as in `BlockPlan.module`.
            new: Whether it is part of a new layer.
        """
        if taken.quantization is None or self._recipe.out_dtype or self._recipe.dtype:
            return False
        if new and not self._recipe.quantize_new:
            return False
        stored = not any(part.derived for part in taken.quantization.parts.values())
        return stored and self._readable[model] and self._quantized_in_donor(role, module)

    def with_new(self, block: BlockPlan, source: int) -> BlockPlan:
        """A block of new layers with the outputs that are to be quantised, where the recipe asks for that.

        Args:
            block: The block.
            source: The source whose layer's config entries the new layers take.
        """
        if not self._recipe.quantize_new or self._recipe.out_dtype or self._recipe.dtype:
            return block
        outputs = []
        for output in block.outputs:
            like = output.inputs[source].quantization
            if like is not None and not output.quantization and self._readable[block.sources[source].model]:
                self._check_refusal(output.inputs[source])
                output = replace(output, quantization=like)
            outputs.append(output)
        return replace(block, outputs=tuple(outputs))

    def without_cache_scales(self, blocks: Sequence[BlockPlan]) -> list[BlockPlan]:
        """The blocks without the scales of caches of keys and values, where config.json will not speak of them."""
        quantized = any(o.quantization for b in blocks for o in b.outputs)

        def belongs(block: BlockPlan, output: OutputTensor) -> bool:
            known = quantized and all(self._readable[source.model] for source in block.sources)
            return known or not is_cache_scale(output.name) or not self._formats[block.sources[0].model]

        kept = ((block, tuple(o for o in block.outputs if belongs(block, o))) for block in blocks)
        return [replace(block, outputs=outputs) for block, outputs in kept]

    def config(self, config: Mapping[str, Any], blocks: Sequence[BlockPlan]) -> dict[str, Any]:
        """The output's config.json: without a section about quantisation where nothing is quantised; else its section
        names the modules that are written in floating point, but are quantised in the donor.

        Args:
            config: The config so far.
            blocks: The plan's blocks.
        """
        section = quantization(config)
        if section is None or self.format is None:
            return dict(config)
        outputs = [(b, o) for b in blocks for o in b.outputs]
        if not any(o.quantization for _, o in outputs):
            return with_quantization(config, None)
        plain = [module_of(o.name) for b, o in outputs if self._is_excepted(b, o)]
        if not plain:
            return dict(config)
        changed = formats()[self.format].except_modules(
            section,
            _with_built(plain),
            self._left_out(),
            quantized=[module_of(o.name) for _, o in outputs if o.quantization],
        )
        return with_quantization(config, changed)

    def _left_out(self) -> list[str]:
        """The modules behind the layers that loaders leave out by themselves. Those that hold quantised modules are not
        among them: their names would leave these out, too."""
        tensors = self._donor.checkpoint.tensors
        quantized = [module_of(name) for name, tensor in tensors.items() if tensor.quantization]
        named = [module_of(n) for n in self._donor.view.after if len(tensors[n].shape) > 1]
        return [
            name
            for name in _with_built([*named, "lm_head"])  # a tied head is not stored
            if not any(q == name or q.startswith(f"{name}.") or q.endswith(f".{name}") for q in quantized)
        ]

    def warnings(self, blocks: Sequence[BlockPlan]) -> list[str]:
        """Messages about quantised weights that are not written as they are."""
        found: Counter[tuple[str, str, str]] = Counter()
        wanted = self._recipe.out_dtype or self._recipe.dtype
        for block in blocks:
            for output in block.outputs:
                if output.action in (Action.CAST, Action.DERIVE) and output.stored.quantization and not block.new:
                    model = self._models[block.source_of(output).model]
                    quantized = output.stored.quantization
                    pickled = any(part.derived for part in quantized.parts.values())
                    why = "they are in pickled files" if pickled else "the output's config describes no such codes"
                    why = "leave dtype out to keep their codes" if wanted else why
                    found[f"{quantized.format} weights of {model.ref} are", output.dtype, why] += 1
        notes = [f"{count} {what} written as {dtype}: {why}" for (what, dtype, why), count in found.items()]
        if self.format and any(o.quantization for b in blocks for o in b.outputs):
            plain = [module_of(o.name) for b in blocks for o in b.outputs if self._is_excepted(b, o)]
            notes += [note] if (note := formats()[self.format].note(plain)) else []
        return notes

    def _is_excepted(self, block: BlockPlan, output: OutputTensor) -> bool:
        """Whether an output is in floating point, and a loader must be told so."""
        if output.quantization is not None:
            return False
        if self._quantized_in_donor(output.role if block.layers else output.name, block.module):
            return True
        foreign = not all(self._readable[source.model] for source in block.sources)
        return foreign and bool(block.layers) and len(output.shape) > 1

    def _quantized_in_donor(self, role: str, module: str | None) -> bool:
        """Whether any layer of the donor has a tensor of this role quantised; outside of layers: a tensor's name."""
        if module not in self._roles:
            donor = self._donor
            view = donor.modules[module] if module and module in donor.modules else donor.view
            quantized = _formats(donor.checkpoint).keys()
            layers = {role for layer in view.layers for role, name in layer.items() if name in quantized}
            self._roles[module] = frozenset(layers | quantized)
        return role in self._roles[module]

    def _check_quantizes(self) -> None:
        place = self._recipe.source.child("quantize_new")
        if self._recipe.out_dtype or self._recipe.dtype:
            place.fail("quantize_new needs an output whose copies stay quantised", expected="no dtype", got="a dtype")
        if self.format is None:
            place.fail(
                "quantize_new writes new layers in the format of the base",
                expected="a quantised base",
                got=f"{self._donor.ref}, which is not quantised",
            )

    def _check_refusal(self, like: StoredTensor) -> None:
        assert like.quantization is not None
        if reason := formats()[like.quantization.format].refusal(like):
            able = [name for name, format_ in formats().items() if format_.quantizes]
            self._recipe.source.child("quantize_new").fail(
                f"new layers cannot be quantised like those of {self._donor.ref}: {reason}",
                expected=some_of(able, len(able)),
                got=like.quantization.format,
                hint="leave quantize_new out: the new layers are then in floating point, and can be trained",
            )


def _format_of(model: SourceModel) -> str | None:
    """The format of a model's quantised weights; None where it has none that can be read."""
    return next(iter(_formats(model.checkpoint).values()), None)


def _formats(source: TensorSource) -> dict[str, str]:
    """The formats of a model's quantised weights by their names: also of those that an adapter changes, which
    config.json speaks of as well."""
    under = _formats(source.base) if isinstance(source, LoraSource | UntiedSource) else {}
    return under | {name: t.quantization.format for name, t in source.tensors.items() if t.quantization}


#: parts of stored names -> parts of the names of modules in transformers, where these are others
_BUILT = (
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^language_model\.lm_head$"), "lm_head"),
    (re.compile(r"^embed_out$"), "lm_head"),
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),
)


def _with_built(modules: Sequence[str]) -> list[str]:
    """Names of modules by the names of their tensors, and the names that transformers gives them."""
    found: dict[str, None] = {}
    for name in modules:
        built = name
        for pattern, new in _BUILT:
            built = pattern.sub(new, built)
        found |= {name: None, built: None}
    return list(found)


def module_of(name: str) -> str:
    """The module that a weight is a parameter of."""
    return name.rpartition(".")[0] or name
