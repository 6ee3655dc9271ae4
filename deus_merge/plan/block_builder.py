"""The blocks of a plan: what each output tensor is made from, in which dtype, with which parameters, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..align.parameters import check_alignment
from ..checkpoint.quantized import is_cache_scale
from ..core.errors import PlanError, RecipeError
from ..core.tensors import CONSTANT, Action, StoredTensor
from ..core.text import some_of
from ..core.units import promoted
from ..methods.base import MergeMethod, OutputTensor, copy_of
from ..methods.registry import methods
from ..models.config_rules import LayerEntries
from ..models.facts.base import Pinned
from ..models.head_layout import layer_heads
from ..models.layer_facts import LayerFacts, alike, expand
from ..models.reference import ModelRef
from ..models.source import SourceModel
from ..models.tokenizer.blocks import VocabularyPlan
from ..models.view import ModelView, prefix_of
from ..recipe.parameters import Settings, resolve_setting
from ..recipe.presets import MAX_LAYERS
from ..recipe.types import OutputSlice, Recipe, SliceSource
from .blocks import AlignTo, BlockPlan, BlockSource
from .compatibility import Part, base_source, check_given, check_like_donor, check_same
from .dtypes import FLOATS, check_castable, check_plain
from .quantization import QuantizedOutputs


@dataclass
class BlockBuilder:
    """Builds the blocks of a plan, one after another.

    Attributes:
        recipe: The recipe, with slices or modules.
        models: Every model it names, the donor first; with their tokens in the output's order where that was needed.
        vocabulary: Reorders embeddings and heads to the output's tokens.
        warnings: Messages for the user so far.
        module: Whose layers are being built; None: all of a model at once.
        origins: For each of the module's output layers, the layer whose config entries it takes.
        blocks: Those built so far.
        described: Views whose layers were described for this plan, by model and module.
    """

    recipe: Recipe
    models: list[SourceModel]
    vocabulary: VocabularyPlan
    warnings: list[str]
    module: str | None = None
    origins: list[LayerEntries] = field(default_factory=list)
    blocks: list[BlockPlan] = field(default_factory=list)
    described: dict[tuple[ModelRef, str | None], ModelView] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.index = {model.ref: i for i, model in enumerate(self.models)}
        self.facts: dict[tuple[ModelRef, str | None], Sequence[LayerFacts]] = {}
        self._unlike: dict[tuple[str, str], tuple[int, list[str]]] = {}
        self.quantized = QuantizedOutputs(self.recipe, self.models)

    def begin(self, module: str | None) -> None:
        """Continue with the layers of a module."""
        self.module, self.origins = module, []

    def view(self, ref: ModelRef) -> ModelView:
        """A model's part of the module at hand; all of it when recipes do not speak of modules."""
        model = self.models[self.index[ref]]
        if (ref, self.module) in self.described:
            return self.described[ref, self.module]
        if self.module is None:
            return model.view
        if self.module not in model.modules:
            have = " | ".join(model.modules)
            raise PlanError(f"{ref} has no module {self.module}", where=ref.place.where, expected=have)
        return model.modules[self.module]

    def model(self, source: SliceSource) -> SourceModel:
        return self.models[self.index[source.model]]

    def add_layers(
        self,
        slice_: OutputSlice,
        layers: Sequence[int],
        position: float,
        *,
        count: int = 1,
        new: bool = False,
        defaults: bool = False,
        between: tuple[int, int] | None = None,
    ) -> None:
        """Add a block that makes the next layers of the output.

        Args:
            slice_: The slice, its sources those of the block.
            layers: Which layer of each source.
            position: Where in the slice, from 0 to 1, for gradients.
            count: How many layers.
            new: Whether they are to be trained.
            defaults: Whether the recipe's parameters do not apply.
            between: The sources that are the new layer's neighbours, where it is made from more than these.
        """
        first = len(self.origins)
        last = first + count - 1
        if last >= MAX_LAYERS:
            slice_.place.fail("the output has too many layers", expected=f"at most {MAX_LAYERS}", got="more")
        title = self.title(f"layers {first}-{last}" if count > 1 else f"layer {last}")
        sources = slice_.sources
        views = [self.view(s.model) for s in sources]
        roles = [view.layers[layer] for view, layer in zip(views, layers, strict=True)]
        parts = [
            Part.of(s, self.model(s), f"layer {layer}", names)
            for s, layer, names in zip(sources, layers, roles, strict=True)
        ]
        of = zip(sources, views, strict=True)
        kinds = dict.fromkeys(f"{s.model} is of model_type {v.model_type}" for s, v in of)
        mixed = len({view.model_type for view in views}) > 1
        check_same(parts, f"models of one architecture can be merged; {some_of(kinds)}" if mixed else None)
        donor = self.view(self.recipe.donor)
        check_like_donor(parts[0], self.models[0], donor)
        base = base_source(slice_, slice_.base_model or self.recipe.base_model)
        heads = layer_heads(self.model(sources[0]).checkpoint.config, views[0], layers[0], parts[0].shapes)
        outputs, levels = [], self._levels(slice_, defaults)
        shared = _block_parameters(slice_, levels, position)
        for slot in range(count):
            prefix = prefix_of(first + slot, donor.layer_prefix)
            for role in roles[0]:
                spec = views[0].spec(role, layers[0])
                name = prefix + (spec.name if spec else role)
                names = [r[role] for r in roles]
                facts = {"spec": spec, "heads": heads, "slot": slot, "between": between, "base": base}
                outputs.append(self._output(slice_, role, name, names, position, levels, shared, **facts))
        block_sources = [BlockSource(self.index[s.model], layer) for s, layer in zip(sources, layers, strict=True)]
        block = self._add(slice_, title, range(first, first + count), block_sources, base, outputs, new)
        neighbours = block.sources_of(0)
        copied = {o.source for o in block.outputs if o.action not in CONSTANT}
        entries_of = neighbours[0 if copied == {0} else -1] if new else neighbours[block.base or 0]
        assert entries_of.layer is not None
        if new:
            self.blocks[-1] = self.quantized.with_new(block, block.sources.index(entries_of))
        model = self.models[entries_of.model]
        origin = LayerEntries(
            model.checkpoint.config, entries_of.layer, str(model.ref), self.view(model.ref).layers_path, new
        )
        self.origins += [origin] * count
        if len(neighbours) > 1:
            self._report_types(title, [*(s for s in neighbours if s is not entries_of), entries_of])

    def add_other(
        self, title: str, slice_: OutputSlice, names: Sequence[Sequence[str]], position: float, *, defaults: bool
    ) -> None:
        """Add a block of tensors that belong to no layer.

        Args:
            title: Their description: ``embeddings``.
            slice_: The slice, its sources those of the block.
            names: The tensors' names in each source.
            position, defaults: As in `add_layers`.
        """
        sources, title = slice_.sources, self.title(title)
        base = base_source(slice_, slice_.base_model or self.recipe.base_model)
        indices = [self.index[s.model] for s in sources]
        views = [self.view(s.model) for s in sources]
        by_role = [views[0].names_beside(own, v, names[0]) for own, v in zip(names, views, strict=True)]
        self._check_rows(sources, by_role)
        every = {name for own in names for name in own}
        for i, checkpoint in zip(indices, self.vocabulary.reordered(indices, every, base, title), strict=True):
            self.models[i] = replace(self.models[i], checkpoint=checkpoint)
        parts = [Part.of(s, self.model(s), title, own) for s, own in zip(sources, by_role, strict=True)]
        check_same(parts, self.vocabulary.hint(indices))
        depth, levels = len(self.origins) or views[0].num_layers, self._levels(slice_, defaults)
        shared = _block_parameters(slice_, levels, position)
        outputs = []
        for n in names[0]:
            name, stored = views[0].output_name(n, depth), [own[n] for own in by_role]
            outputs.append(self._output(slice_, n, name, stored, position, levels, shared, base=base))
        self._add(slice_, title, (), [BlockSource(i, None) for i in indices], base, outputs)

    def _check_rows(self, sources: Sequence[SliceSource], by_role: Sequence[Mapping[str, str]]) -> None:
        """Refuse to reorder the rows of tensors that have other names in each model."""
        for source, own in zip(sources, by_role, strict=True):
            other = next((pair for pair in own.items() if pair[0] != pair[1]), None)
            if self.vocabulary.vocabulary is not None and other is not None:
                source.place.fail(
                    "rows of tokens are only merged between tensors of one name",
                    expected=other[0],
                    got=f"{other[1]} in {source.model}",
                    hint="save one of the models with the class of the other; or merge them without tokenizer settings",
                )

    def title(self, title: str) -> str:
        """A block's title with its module."""
        return ", ".join(part for part in (self.module, title) if part)

    def _output(
        self,
        slice_: OutputSlice,
        role: str,
        name: str,
        names: Sequence[str],
        position: float,
        levels: Sequence[Settings],
        shared: Mapping[str, Any],
        **facts: Any,
    ) -> OutputTensor:
        """One output tensor with its inputs and parameters, before it is decided how it comes about.

        Args:
            slice_, position: As in `add_layers`.
            role: Its role in its layer, or its name outside of layers.
            name: Its name in the output.
            names: The names of its inputs.
            levels: Settings in order of precedence.
            shared: The parameters of the whole block.
            facts: More of its attributes.
        """
        models = [self.model(s) for s in slice_.sources]
        inputs = tuple(model.checkpoint.tensors[n] for model, n in zip(models, names, strict=True))
        parameters, per_source = {}, [{} for _ in models]
        for p in methods()[slice_.merge_method].parameters:
            if p.scope != "source":
                block = p.scope == "block"
                parameters[p.name] = shared[p.name] if block else resolve_setting(p, levels, name, position)
                continue
            for values, source, stored in zip(per_source, slice_.sources, names, strict=True):
                values[p.name] = resolve_setting(p, [source.parameters, *levels], stored, position)
        dtype = self._dtype(inputs)
        return OutputTensor(role, name, inputs[0].shape, dtype, inputs, parameters, tuple(per_source), **facts)

    def _levels(self, slice_: OutputSlice, defaults: bool) -> list[Settings]:
        """Settings for a slice in order of precedence, without those that set nothing."""
        levels = [slice_.parameters, *(() if defaults else (slice_.shared, self.recipe.parameters))]
        return [settings for settings in levels if settings]

    def _decided(
        self,
        output: OutputTensor,
        method: MergeMethod,
        align: AlignTo | None,
        sources: Sequence[BlockSource],
        new: bool,
    ) -> OutputTensor:
        """The output with the way it comes about: the only place where that is decided."""
        decision = method.decide(output)
        if is_cache_scale(output.name) and decision.action is Action.COMPUTE:  # of the run, not of the weights
            decision = copy_of(output.base or 0)
        action, source, quantization = decision.action, decision.source, output.quantization
        if action is Action.COPY and source is not None:
            taken = output.inputs[source]
            if align and align.moves(source) and not (output.spec and output.spec.opaque):
                action = Action.ALIGN
            elif self.quantized.kept(taken, sources[source].model, output.role, self.module, new):
                quantization = taken.quantization
            elif taken.dtype != output.dtype:
                action = Action.CAST
            elif taken.derived:
                action = Action.DERIVE
        output = replace(output, action=action, source=source, quantization=quantization)
        if action is not Action.COPY:
            check_plain(output, [self.models[s.model] for s in sources])
        if action not in (Action.COPY, *CONSTANT) and (lost := check_castable(output)):
            self._warn(lost)
        return output

    def _dtype(self, inputs: Sequence[StoredTensor]) -> str:
        """As the recipe says; else the dtype that holds those of all sources."""
        stored = promoted([i.dtype for i in inputs])
        wanted = self.recipe.out_dtype or self.recipe.dtype
        return wanted if wanted and stored in FLOATS else stored

    def _add(
        self,
        slice_: OutputSlice,
        title: str,
        layers: Sequence[int],
        sources: Sequence[BlockSource],
        base: int | None,
        outputs: Sequence[OutputTensor],
        new: bool = False,
    ) -> BlockPlan:
        """Add a block, if its method accepts it. That is checked before anything else about the method."""
        method = methods()[slice_.merge_method]
        align = None
        if slice_.align and layers:
            align = AlignTo(base if base is not None else len(sources) - 1, slice_.align.values)
            if problem := check_alignment(align.values, outputs):
                message = f"{problem.parameter}: {problem.message}"
                raise RecipeError(message, where=f"{slice_.align.place.where}, {title} of the output")
        if refusal := method.check(outputs, len(sources)):
            for output in outputs:
                check_plain(replace(output, action=Action.COMPUTE), [self.models[s.model] for s in sources])
            name = refusal.parameter
            levels = (slice_.parameters, slice_.shared, self.recipe.parameters)
            place = next((level[name].place for level in levels if name and name in level), slice_.place)
            views = [self.view(self.models[s.model].ref) for s in sources]
            undescribed = [v.model_type for v in views if method.inserts and v.family is None]
            raise RecipeError(
                f"{name}: {refusal.message}" if name else refusal.message,
                where=f"{place.where}, {title} of the output",
                expected="a described family (deus-merge methods lists them)" if undescribed else None,
                got=f"model_type {undescribed[0]}" if undescribed else None,
            )
        check_given(slice_, base, outputs)
        if warning := method.warning(outputs[0]):
            self._warn(warning)
        decided = tuple(self._decided(output, method, align, sources, new) for output in outputs)
        index, method_name = len(self.blocks), slice_.merge_method
        block = BlockPlan(
            index, title, tuple(layers), method_name, tuple(sources), base, decided, new, align, self.module
        )
        self.blocks.append(block)
        return block

    def _warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)

    def _report_types(self, title: str, sources: Sequence[BlockSource]) -> None:
        models = [self.models[s.model] for s in sources]
        facts = [self._facts(model)[s.layer or 0] for model, s in zip(models, sources, strict=True)]
        for name in facts[-1]:
            values = [layer.get(name) for layer in facts]
            if not alike(values) and not any(isinstance(v, Pinned) for v in values):
                self._warn_of_types(title, f"layers whose {name} differ ({values})", repr(values[-1]))

    def _warn_of_types(self, title: str, differing: str, taken: str) -> None:
        """One warning for all layers of which the same is to be said."""
        place, titles = self._unlike.setdefault((differing, taken), (len(self.warnings), []))
        titles.append(title.removeprefix("layer "))
        text = f"{title} fuses {differing}; it takes {taken}"
        if titles[1:]:
            text = f"layers {some_of(titles)} fuse {differing}; they take {taken}"
        self.warnings[place : place + 1] = [text]

    def fixed_depth(self, ref: ModelRef) -> str | None:
        """Why the depth of a model cannot change at all, in words; None where it can."""
        facts = [fact for layer in self._facts(self.models[self.index[ref]]) for fact in layer.items()]
        for key, value in facts:
            if isinstance(value, Pinned) and value.depth is not None:
                return f"nor can its depth change in another way: config.json's {key} {value.reason}"
        return None

    def _facts(self, model: SourceModel) -> Sequence[LayerFacts]:
        """What a model's config says of each of its layers, of the module at hand."""
        key = model.ref, self.module
        if key not in self.facts:
            self.facts[key] = expand(model.checkpoint.config, self.view(model.ref).layers_path, model.view.model_type)
        return self.facts[key]


def _block_parameters(slice_: OutputSlice, levels: Sequence[Settings], position: float) -> dict[str, Any]:
    """The parameters of a slice's method that have one value for a whole block."""
    parameters = (p for p in methods()[slice_.merge_method].parameters if p.scope == "block")
    return {p.name: resolve_setting(p, levels, None, position) for p in parameters}
