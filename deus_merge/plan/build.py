"""Recipe + configs + headers -> `Plan`. Reads no tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from ..checkpoint.layout import plan_shards
from ..checkpoint.reader import TensorSource
from ..checkpoint.storage import LoadOptions
from ..core.errors import PlanError, nearest
from ..core.garbage import collector_paused
from ..core.located import locate
from ..core.text import plural
from ..core.units import parse_size
from ..methods.registry import methods
from ..models.config_rules import cache_warnings, deeper_config, typed_config
from ..models.heads import config_of_heads, with_heads
from ..models.modules import DEFAULT
from ..models.side_files import output_side_files
from ..models.source import SourceModel
from ..models.tokenizer.blocks import plan_vocabulary
from ..models.tokenizer.files import is_tokenizer_file
from ..models.view import ModelView
from ..recipe.parameters import filters, resolve_setting
from ..recipe.presets import MAX_LAYERS, PRESETS, expand
from ..recipe.types import OutputSlice, Recipe, SliceSource
from .block_builder import BlockBuilder
from .blocks import BlockPlan, file_groups, learned_by_role, mark_repeats
from .calibration import plan_calibration
from .compatibility import check_configs
from .documents import PlannedResult, document_plans
from .dtypes import dtyped_config
from .layer_kinds import PlannedStack, check_layer_kinds
from .parents import Parents, describe_copied
from .types import Plan

DEFAULT_SHARD_SIZE = "5GB"


def build_plan(
    recipe: Recipe,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    load_options: LoadOptions | None = None,
    copy_tokenizer: bool = True,
) -> Plan:
    """Plan a recipe.

    Args:
        recipe: As read.
        max_shard_size: Upper bound of an output file in bytes, or like ``"5GB"``.
        load_options: How models may be read.
        copy_tokenizer: Take a tokenizer along; one that the recipe asks for comes anyway.

    Raises:
        RecipeError, ArchitectureError, CheckpointError, PlanError: whatever is wrong, before a tensor is read.
    """
    size, load_options = parse_size(max_shard_size), load_options or LoadOptions()
    with collector_paused():
        return _planned(recipe, size, load_options, copy_tokenizer)


def _planned(recipe: Recipe, size: int, load_options: LoadOptions, copy_tokenizer: bool) -> Plan:
    known: dict[str, TensorSource] = {}
    results: list[PlannedResult] = []
    for document in recipe.documents:
        if document.quantize_new:
            place = document.source.child("quantize_new")
            place.fail("only the last document is written", expected="quantize_new in the last document", got="true")
        if document.calibrate:
            place = document.calibrate.place
            place.fail("only the last document is written", expected="calibrate in the last document, without a name")
        results.append(PlannedResult(_planned_document(document, known, load_options, size)))
        known[results[-1].name] = results[-1]
    plan = _planned_document(recipe, known, load_options, size, copy_tokenizer)
    warnings = [f"{r.where}: {warning}" for r in results for warning in r.plan.warnings]
    return replace(
        plan,
        calibration=plan_calibration(plan),
        recipe=replace(plan.recipe, documents=tuple(r.plan.recipe for r in results)),
        warnings=(*warnings, *plan.warnings),
        documents=document_plans(plan, results),
    )


def _planned_document(
    recipe: Recipe, known: dict[str, TensorSource], load_options: LoadOptions, size: int, copy_tokenizer: bool = True
) -> Plan:
    """The plan of one document. New layers whose places the recipe does not name are in the top half of a model that
    refuses them elsewhere."""
    try:
        return _Planner(recipe, known, load_options).plan(size, copy_tokenizer)
    except PlanError as refused:
        upscale = recipe.upscale
        if upscale is None or upscale.insert is not None or PRESETS[upscale.preset].insert != "even":
            raise
        top = replace(recipe, upscale=replace(upscale, insert=locate("top_half", "upscale.insert")))
        try:
            plan = _Planner(top, known, load_options).plan(size, copy_tokenizer)
        except PlanError:
            raise refused from None
        warning = f"new layers are in the top half, since the model refuses them elsewhere: {refused.message}"
        return replace(plan, warnings=(*plan.warnings, warning))


class _Planner:
    """Plans one document."""

    def __init__(self, recipe: Recipe, known: dict[str, TensorSource], load_options: LoadOptions):
        models = _with_heads([SourceModel.open(ref, known, load_options) for ref in recipe.models()], recipe)
        self.donor = models[0]
        warnings = [*recipe.notes, *(note for m in models for note in m.notes)] + check_configs(models, self.donor)
        vocabulary = plan_vocabulary(
            recipe.tokenizer, [(m.ref, m.checkpoint, m.view) for m in models], load_options.cache_dir
        )
        if recipe.upscale and recipe.base_model:
            slices = expand(recipe.upscale, recipe.base_model, self.donor.view.num_layers)
            recipe = replace(recipe, slices=slices, upscale=None)
        self.recipe = recipe
        self.builder = BlockBuilder(recipe, models, vocabulary, warnings)

    def plan(self, max_shard_size: int, copy_tokenizer: bool = True) -> Plan:
        recipe, builder, donor, vocabulary = self.recipe, self.builder, self.donor, self.builder.vocabulary
        config = typed_config(donor.checkpoint.config, recipe.out_dtype or recipe.dtype)
        if donor.ref.architecture:
            config = {**config, "architectures": [donor.ref.architecture]}
        stacks = []
        for name, slices in self._modules():
            builder.begin(name)
            self._add_module(slices)
            view = builder.view(donor.ref)
            if view.layers:
                config = deeper_config(config, view.layers_path, builder.origins, str(donor.ref))
                stacks.append(PlannedStack(view, tuple(builder.origins), name or ""))
        builder.warnings += cache_warnings(config, donor.checkpoint.config)
        if builder.module is not None:
            self._add_other_modules()
        blocks = learned_by_role(builder.quantized.without_cache_scales(mark_repeats(builder.blocks)))
        self._report_idle_filters(blocks)
        outside = [
            (o.name, [builder.models[s.model] for s in b.sources]) for b in blocks if not b.layers for o in b.outputs
        ]
        config = config_of_heads(config, donor, outside)
        config = vocabulary.config(config, donor.view.layers_path)
        config = builder.quantized.config(config, blocks)
        builder.warnings += builder.quantized.warnings(blocks)
        sources = {str(m.ref): m.checkpoint for m in builder.models}
        chat_template = recipe.source.child("chat_template") if recipe.chat_template else None
        files, file_warnings = output_side_files(sources, donor.checkpoint, vocabulary.vocabulary, chat_template)
        if not copy_tokenizer and recipe.tokenizer is None:
            files = {name: content for name, content in files.items() if not is_tokenizer_file(name)}
        if not (recipe.out_dtype or recipe.dtype):
            config, dtype_warnings = dtyped_config(config, blocks, donor)
            builder.warnings += dtype_warnings
        shapes = {o.name: o.shape for block in blocks for o in block.outputs}
        unchecked = check_layer_kinds(config, stacks, donor, shapes)
        shards = plan_shards(file_groups(blocks), max_shard_size)
        warnings = (*unchecked, *builder.warnings, *vocabulary.warnings, *file_warnings)
        return Plan(
            recipe,
            tuple(builder.models),
            tuple(blocks),
            shards,
            config,
            files,
            warnings,
            vocabulary=vocabulary.describe(),
        )

    def _add_module(self, slices: Sequence[OutputSlice]) -> None:
        """The blocks of a module, or of a whole model."""
        layers = sum(len(self._range(slice_.sources[0])) for slice_ in slices)
        if layers > MAX_LAYERS:  # those between layers are counted when they are planned
            self.recipe.source.fail("the output has too many layers", expected=f"at most {MAX_LAYERS}", got=layers)
        has_layers = bool(self.builder.view(self.donor.ref).layers)
        if has_layers and not layers:
            slices[0].place.fail("the output has no layers", expected="a layer_range with layers", got="none of them")
        self._add_outside("embeddings" if has_layers else "", "before", slices[0], 0.0)
        for slice_ in slices:
            self._add_slice(slice_)
        self._add_outside("final norm and head", "after", slices[-1], 0.0)

    def _modules(self) -> list[tuple[str | None, tuple[OutputSlice, ...]]]:
        """The recipe's slices, module by module in the model's order; None: all of a model at once."""
        known, named = self.donor.modules, self.recipe.modules
        for name, module in named.items():
            if name not in known:
                hint = nearest(name, known)
                module.place.fail(f"the model has no module {name!r}", expected=" | ".join(known), got=name, hint=hint)
        if not named:
            deepens = [p for p in self.recipe.slices if any(s.layer_range for s in p.sources)]
            if deepens and {"encoder", "decoder"} <= set(known):
                self._fail_for_sides(known)
            return [(None, self.recipe.slices)]
        if list(known) == [DEFAULT]:
            return [(None, named[DEFAULT].slices)]
        return [(name, named[name].slices) for name in known if name in named]

    def _fail_for_sides(self, known: Mapping[str, ModelView]) -> NoReturn:
        """Fail for slices that are neither the encoder's nor the decoder's, with an example of what to write."""
        inserts = any(methods()[slice_.merge_method].inserts for slice_ in self.recipe.slices)
        # copies need no description of the family
        method = "ot_fuse, parameters: {alignment: none, t: 1}" if inserts else "passthrough"
        sources = f"{{model: {self.donor.ref}, layer_range: [0, {known['decoder'].num_layers}]}}"
        self.recipe.source.fail(
            "the model has several stacks of layers",
            expected="modules: {encoder: {slices: ...}, decoder: {slices: ...}}",
            got="slices of neither",
            hint=f"modules: {{decoder: {{slices: [{{merge_method: {method}, sources: [{sources}]}}]}}}}",
        )

    def _add_slice(self, slice_: OutputSlice) -> None:
        method = methods()[slice_.merge_method]
        ranges = [self._range(s) for s in slice_.sources]
        lengths = {len(r) for r in ranges}
        if len(lengths) > 1:
            slice_.place.fail(
                "the sources of a slice must have the same number of layers",
                expected=f"{plural(len(ranges[0]), 'layer')} each",
                got=", ".join(f"{s.model}: {len(r)}" for s, r in zip(slice_.sources, ranges, strict=True)),
                hint="give each source a layer_range" + (" (in slices)" if slice_.place.path == "models" else ""),
            )
        length = len(ranges[0])
        if not length and self.builder.view(slice_.sources[0].model).layers:
            self._add_no_layers(slice_)
            return
        if method.inserts:
            self._add_new_layers(slice_, ranges)
            return
        for j in range(length):
            position = j / (length - 1) if length > 1 else 1.0
            self.builder.add_layers(slice_, [r[j] for r in ranges], position)

    def _add_no_layers(self, slice_: OutputSlice) -> None:
        """A slice whose layer_range is empty. As the first or last slice, it chooses what is next to the layers."""
        source = slice_.sources[0]
        if methods()[slice_.merge_method].inserts:
            source.place.fail(
                f"{slice_.merge_method} makes new layers, and the layer_range has no layers",
                expected="a layer_range of at least two layers",
                got=f"{list(source.layer_range or ())}",
            )
        self.builder.warnings.append(
            f"{slice_.place.where}: the slice adds no layers: layer_range {list(source.layer_range or ())} is empty"
        )

    def _add_new_layers(self, slice_: OutputSlice, ranges: list[range]) -> None:
        """A method of new layers: two sources give one per pair; one source keeps its layers and fills its gaps."""
        first, base = ranges[0], slice_.sources[0]
        fills_gaps, learns = len(slice_.sources) == 1, methods()[slice_.merge_method].learns
        if fills_gaps:
            if len(first) < 2:
                base.place.fail(
                    f"a single layer has no gap for {slice_.merge_method}",
                    expected="a layer_range of at least two layers",
                    got=f"[{first.start}, {first.stop}]",
                )
            pairs = list(zip(first, first[1:], strict=False))
            sources = slice_.sources * 2
        elif learns:
            slice_.place.fail(
                f"{slice_.merge_method} learns from the layers of one model",
                expected="one source, whose gaps are filled",
                got=f"{plural(len(slice_.sources), 'source')}",
                hint="ot_fuse fuses the layers of two sources in pairs",
            )
        else:
            pairs = list(zip(*ranges, strict=True))
            sources = slice_.sources
        copy, parents = _copied(slice_), Parents(self.builder, slice_, self._setting)
        made_from = [parents.of(pair) for pair in pairs] if fills_gaps and not learns else pairs
        describe_copied(self.builder, slice_, self._setting, made_from)
        for j, (pair, made) in enumerate(zip(pairs, made_from, strict=True)):
            if fills_gaps:
                self.builder.add_layers(copy, [pair[0]], 0.0, defaults=True)
            position = j / (len(pairs) - 1) if len(pairs) > 1 else 1.0
            if learns:
                layers, between = parents.learned_from(pair)
                every = replace(slice_, sources=slice_.sources * len(layers))
                self.builder.add_layers(every, layers, position, new=True, between=between)
            else:
                count = self._setting(slice_, "layers_per_gap") or 1
                self.builder.add_layers(replace(slice_, sources=sources), made, position, count=count, new=True)
        if fills_gaps:
            self.builder.add_layers(copy, [first[-1]], 0.0, defaults=True)
            parents.report()

    def _setting(self, slice_: OutputSlice, name: str) -> Any:
        """A block parameter of a slice's method; None where the method has none of this name."""
        known = {p.name: p for p in methods()[slice_.merge_method].parameters}
        if name not in known:
            return None
        return resolve_setting(known[name], [slice_.parameters, slice_.shared, self.recipe.parameters], None, 0.0)

    def _range(self, source: SliceSource) -> range:
        depth = self.builder.view(source.model).num_layers
        if not depth and source.layer_range:
            source.place.fail(f"{self.builder.module} has no layers", expected="models, not slices")
        start, end = source.layer_range or (0, depth)
        if end > depth:
            place = source.place.value.get("layer_range") if isinstance(source.place.value, dict) else source.place
            (place or source.place).fail(
                f"layer_range goes beyond the {plural(depth, 'layer')} of {source.model}",
                expected=f"[first, last + 1] within [0, {depth}]",
                got=f"[{start}, {end}]",
            )
        return range(start, end)

    def _add_outside(self, title: str, part: str, slice_: OutputSlice, position: float) -> None:
        """Embeddings follow the first slice, final norm and head the last, if these merge several models, or the same
        layers of the donor, or no layers at all; otherwise they are the donor's, copied. A model that is named twice
        counts twice, as it does in the layers."""
        refs = list(dict.fromkeys(s.model for s in slice_.sources))
        ranges = {s.layer_range for s in slice_.sources}
        own = len(ranges) == 1 and refs == [self.donor.ref]
        merges = (own or len(refs) > 1 or slice_.empty) and not methods()[slice_.merge_method].inserts
        sources = slice_.sources if merges else (SliceSource(self.donor.ref, place=slice_.place),)
        names = [getattr(self.builder.view(s.model), part) for s in sources]
        if not names[0]:
            return
        if not merges and self.donor.ref not in refs and self.recipe.base_model is None:
            self.builder.warnings.append(
                f"{self.builder.title(title)} come from {self.donor.ref}, the first model named, not from {refs[0]},"
                " whose layers are next to them; set base_model to choose"
            )
        slice_ = replace(slice_ if merges else _copied(slice_), sources=sources)
        self.builder.add_other(title, slice_, names, position, defaults=not merges)

    def _add_other_modules(self) -> None:
        """Tensors that belong to none of the recipe's modules are the donor's."""
        self.builder.begin(None)
        taken = {name for module in self.recipe.modules for name in self.donor.modules[module].names()}
        rest = tuple(name for name in self.donor.checkpoint.tensors if name not in taken)
        if rest:
            slice_ = self.recipe.all_slices()[0]
            sources = (SliceSource(self.donor.ref, place=slice_.place),)
            self.builder.add_other(
                "other modules", replace(_copied(slice_), sources=sources), [rest], 0.0, defaults=True
            )

    def _report_idle_filters(self, blocks: Sequence[BlockPlan]) -> None:
        """A filter that is part of no tensor's name is most likely misspelt."""
        outputs = [o for block in blocks for o in block.outputs]
        names = {name for o in outputs for name in (o.name, *(i.name for i in o.inputs))}
        levels = [self.recipe.parameters]
        for slice_ in self.recipe.all_slices():
            levels += [slice_.parameters, slice_.shared, *(s.parameters for s in slice_.sources)]
        for setting in (value for settings in levels for value in settings.values()):
            idle = [f for f in filters(setting.value) if not any(f in name for name in names)]
            self.builder.warnings += [
                f"{setting.place.where}: filter {f!r} is part of no tensor's name" for f in dict.fromkeys(idle)
            ]


def _with_heads(models: list[SourceModel], recipe: Recipe) -> list[SourceModel]:
    """The models, with heads of their own where tied ones are merged with untied ones, or where embeddings come from a
    tied one and the head from an untied one."""
    stacks = [module.slices for module in recipe.modules.values()] or [recipe.slices]
    for first, slice_ in ((slices[0], slices[-1]) for slices in stacks if slices):
        if not methods()[slice_.merge_method].inserts:
            merged = dict.fromkeys(s.model for s in slice_.sources)
            if first.empty or slice_.empty:
                merged |= dict.fromkeys([models[0].ref, *(s.model for s in first.sources)])
            found = {m.ref: m for m in with_heads([m for m in models if m.ref in merged])}
            models = [found.get(m.ref, m) for m in models]
    return models


def _copied(slice_: OutputSlice) -> OutputSlice:
    """A slice that copies its sources."""
    return replace(slice_, merge_method="passthrough", parameters={}, shared={})
