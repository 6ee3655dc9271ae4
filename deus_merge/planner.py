"""Recipe + configs + headers -> `Plan`. Reads no tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .alignment import AlignTo, cannot_align
from .architecture import ModelView, TensorSpec, families, prefix_of
from .blocks import BlockPlan, BlockSource, PlannedTensor, action_of, in_output_order, join_learned, mark_repeats
from .checkpoint.layout import TensorEntry, plan_shards
from .checkpoint.reader import TensorInfo, TensorSource
from .checkpoint.source import PLAIN, Access
from .config import LayerOrigin, deeper_config, head_shape, layer_lists, typed_config, widened_config
from .errors import PlanError, RecipeError, nearest
from .intermediate import PlannedResult, document_plans
from .matching import Part, base_source, check_given, check_heads, check_like_donor, check_same
from .method import TensorTask
from .model_files import extra_files
from .modules import DEFAULT
from .plan import Plan
from .presets import MAX_LAYERS, expand
from .recipe import ModelRef, OutputSlice, Recipe, SliceSource, methods
from .settings import Settings, filters, resolve_setting
from .source_model import SourceModel
from .stacks import reads_senses
from .units import FLOAT_DTYPES, dtype_name, parse_size, promoted
from .vocabulary.blocks import plan_vocabulary
from .vocabulary.files import TOKENIZER_FILES

DEFAULT_SHARD_SIZE = "5GB"
_FLOATS = {"F8_E4M3", "F8_E5M2", *FLOAT_DTYPES.values()}


def build_plan(
    recipe: Recipe,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    access: Access = PLAIN,
    copy_tokenizer: bool = True,
) -> Plan:
    """Plan a recipe.

    Args:
        recipe: As read.
        max_shard_size: Upper bound of an output file in bytes, or like ``"5GB"``.
        access: What may be read of the models.
        copy_tokenizer: Take a tokenizer along; one that the recipe asks for comes anyway.

    Raises:
        RecipeError, ArchitectureError, CheckpointError, PlanError: whatever is wrong, before a tensor is read.
    """
    size = parse_size(max_shard_size)
    known: dict[str, TensorSource] = {}
    results: list[PlannedResult] = []
    for document in recipe.documents:
        results.append(PlannedResult(_Planner(document, known, access).plan(size)))
        known[document.name] = results[-1]
    plan = _Planner(recipe, known, access, copy_tokenizer).plan(size)
    told = [f"{r.where}: {warning}" for r in results for warning in r.plan.warnings]
    return replace(
        plan,
        recipe=replace(plan.recipe, documents=tuple(r.plan.recipe for r in results)),
        warnings=(*told, *plan.warnings),
        documents=document_plans(plan, results),
    )


@dataclass
class _Planner:
    recipe: Recipe
    known: dict[str, TensorSource]
    access: Access
    copy_tokenizer: bool = True

    def plan(self, max_shard_size: int) -> Plan:
        refs = self.recipe.models()
        self.models = [SourceModel.open(ref, self.known, self.access) for ref in refs]
        self.index = {ref: i for i, ref in enumerate(refs)}
        self.donor = self.index[self.recipe.donor]
        self.warnings: list[str] = check_heads(self.models, self.models[self.donor])
        sources = [(m.ref, m.checkpoint, m.view) for m in self.models]
        self.vocabulary = plan_vocabulary(self.recipe.tokenizer, sources, self.access.cache_dir)
        self.blocks: list[BlockPlan] = []
        self.module: str | None = None
        if self.recipe.upscale:
            base = self.recipe.base_model
            slices = expand(self.recipe.upscale, base, self._view(base).num_layers)
            self.recipe = replace(self.recipe, slices=slices, upscale=None)
        donor = self.models[self.donor]
        config = typed_config(donor.checkpoint.config, self.recipe.out_dtype or self.recipe.dtype)
        for name, slices in self._modules():
            self.module = name
            view = self._view(donor.ref)
            self.origins: list[LayerOrigin] = []
            layers = sum(len(self._range(piece.sources[0])) for piece in slices)
            if layers > MAX_LAYERS:  # those between layers are counted when they are made
                self.recipe.source.fail("the output has too many layers", expected=f"at most {MAX_LAYERS}", got=layers)
            self._outside("embeddings" if view.layers else "", "before", slices[0], 0.0)
            for piece in slices:
                self._slice(piece)
            self._outside("final norm and head", "after", slices[-1], 0.0)
            if view.layers:
                config = deeper_config(config, view.layers_path, self.origins, str(donor.ref))
                self._report_feature_layer(view)
        if self.module is not None:
            self._others()
        self.blocks = join_learned(mark_repeats(self.blocks))
        self._report_idle_filters()
        config = self.vocabulary.config(config, donor.view.layers_path)
        sources = {str(m.ref): m.checkpoint for m in self.models}
        files, told = extra_files(self.recipe, sources, donor.checkpoint, self.vocabulary.vocabulary)
        if not self.copy_tokenizer and self.recipe.tokenizer is None:
            files = {name: content for name, content in files.items() if name not in TOKENIZER_FILES}
        if not (self.recipe.out_dtype or self.recipe.dtype):
            config = widened_config(config, {t.dtype for _, t in in_output_order(self.blocks) if t.action == "merge"})
        entries = [TensorEntry(t.task.name, t.dtype, t.task.shape) for _, t in in_output_order(self.blocks)]
        shards = plan_shards(entries, max_shard_size)
        return Plan(
            self.recipe, tuple(self.models), self.donor, tuple(self.blocks), shards, config, files,
            (*self.warnings, *self.vocabulary.warnings, *told), vocabulary=self.vocabulary.describe(),
        )  # fmt: skip

    def _view(self, ref: ModelRef) -> ModelView:
        """The module at hand, or all of a model."""
        model = self.models[self.index[ref]]
        if self.module is None:
            return model.view
        if self.module not in model.modules:
            have = " | ".join(model.modules)
            raise PlanError(f"{ref} has no module {self.module}", where=ref.place.where, expected=have)
        return model.modules[self.module]

    def _modules(self) -> list[tuple[str | None, tuple[OutputSlice, ...]]]:
        """What the recipe makes, module by module in the model's order; None: all of a model at once."""
        known, named = self.models[self.donor].modules, self.recipe.modules
        for name, module in named.items():
            if name not in known:
                hint = nearest(name, known)
                module.place.fail(f"the model has no module {name!r}", expected=" | ".join(known), got=name, hint=hint)
        if not named:
            deepens = [p for p in self.recipe.slices if any(s.layer_range for s in p.sources)]
            if deepens and {"encoder", "decoder"} <= set(known):
                self.recipe.source.fail(
                    "the model has several stacks of layers",
                    expected="modules: {encoder: {slices: ...}, decoder: {slices: ...}}",
                    got="slices of neither",
                )
            return [(None, self.recipe.slices)]
        if list(known) == [DEFAULT]:
            return [(None, named[DEFAULT].slices)]
        return [(name, named[name].slices) for name in known if name in named]

    def _model(self, source: SliceSource) -> SourceModel:
        return self.models[self.index[source.model]]

    # one slice ---------------------------------------------------------------------------------------------------

    def _slice(self, piece: OutputSlice) -> None:
        method = methods()[piece.merge_method]
        ranges = [self._range(s) for s in piece.sources]
        lengths = {len(r) for r in ranges}
        if len(lengths) > 1:
            piece.place.fail(
                "sources of a slice must have equally many layers",
                expected=f"{len(ranges[0])} layers each",
                got=", ".join(f"{s.model}: {len(r)}" for s, r in zip(piece.sources, ranges, strict=True)),
                hint="give each source a layer_range" + (" (in slices)" if piece.place.path == "models" else ""),
            )
        if method.inserts:
            self._inserting(piece, ranges)
            return
        length = len(ranges[0])
        for j in range(length):
            position = j / (length - 1) if length > 1 else 1.0
            self._layer_block(piece, piece.sources, [r[j] for r in ranges], position)

    def _inserting(self, piece: OutputSlice, ranges: list[range]) -> None:
        """A method of new layers: two sources give one per pair; one source keeps its layers and fills its gaps."""
        first = ranges[0]
        if len(piece.sources) == 1:
            if len(first) < 2:
                piece.sources[0].place.fail(
                    f"a single layer has no gap for {piece.merge_method}",
                    expected="a layer_range of at least two layers",
                    got=f"[{first.start}, {first.stop}]",
                )
            pairs = list(zip(first, first[1:], strict=False))
            sources = piece.sources * 2
        elif methods()[piece.merge_method].learns:
            piece.place.fail(
                f"{piece.merge_method} learns from the layers of one model",
                expected="one source, whose gaps are filled",
                got=f"{len(piece.sources)} sources",
                hint="ot_fuse fuses the layers of two sources in pairs",
            )
        else:
            pairs = list(zip(*ranges, strict=True))
            sources = piece.sources
        keeps = len(piece.sources) == 1
        copy = _copied(piece)
        for j, pair in enumerate(pairs):
            if keeps:
                self._layer_block(copy, piece.sources, [pair[0]], 0.0, bare=True)
            position = j / (len(pairs) - 1) if len(pairs) > 1 else 1.0
            if methods()[piece.merge_method].learns:
                every = range(self._view(piece.sources[0].model).num_layers)
                self._layer_block(piece, piece.sources * len(every), list(every), position, new=True, between=pair)
                continue
            self._layer_block(piece, sources, list(pair), position, per_gap=self._per_gap(piece), new=True)
        if keeps:
            self._layer_block(copy, piece.sources, [first[-1]], 0.0, bare=True)

    def _per_gap(self, piece: OutputSlice) -> int:
        known = {p.name: p for p in methods()[piece.merge_method].parameters}
        if "layers_per_gap" not in known:
            return 1
        levels = [piece.parameters, piece.shared, self.recipe.parameters]
        return resolve_setting(known["layers_per_gap"], levels, None, 0.0)

    def _range(self, source: SliceSource) -> range:
        depth = self._view(source.model).num_layers
        if not depth and source.layer_range:
            source.place.fail(f"{self.module} has no layers", expected="models, not slices")
        start, end = source.layer_range or (0, depth)
        if end > depth:
            place = source.place.value.get("layer_range") if isinstance(source.place.value, dict) else source.place
            (place or source.place).fail(
                f"layer_range goes beyond the {depth} layers of {source.model}",
                expected=f"[first, last + 1] within [0, {depth}]",
                got=f"[{start}, {end}]",
            )
        return range(start, end)

    # one block ---------------------------------------------------------------------------------------------------

    def _layer_block(
        self, piece, sources: Sequence[SliceSource], layers: list[int], position, per_gap=1, new=False, bare=False,
        between: tuple[int, int] | None = None,
    ):  # fmt: skip
        views = [self._view(s.model) for s in sources]
        roles = [v.layers[layer] for v, layer in zip(views, layers, strict=True)]
        first_output = len(self.origins)
        last = first_output + per_gap - 1
        if last >= MAX_LAYERS:
            piece.place.fail("the output has too many layers", expected=f"at most {MAX_LAYERS}", got="more")
        title = self._title(f"layers {first_output}-{last}" if per_gap > 1 else f"layer {last}")
        parts = [
            Part.of(s, self._model(s), f"layer {layer}", names)
            for s, layer, names in zip(sources, layers, roles, strict=True)
        ]
        check_same(parts)
        donor = self._view(self.recipe.donor)
        check_like_donor(parts[0], self.models[self.donor], donor)
        base = base_source(piece, sources, piece.base_model or self.recipe.base_model)
        made = []
        for slot in range(per_gap):
            prefix = prefix_of(first_output + slot, donor.layer_prefix)
            for role in roles[0]:
                spec = views[0].spec(role)
                names = [r[role] for r in roles]
                name = prefix + (spec.name if spec else role)
                task, inputs = self._task(piece, sources, role, slot, name, spec, names, position, bare)
                made.append((replace(task, between=between), inputs))
        block_sources = tuple(BlockSource(self.index[s.model], layer) for s, layer in zip(sources, layers, strict=True))
        outputs = tuple(range(first_output, first_output + per_gap))
        self._add(replace(piece, sources=tuple(sources)), title, outputs, block_sources, base, made, new)
        neighbours = self.blocks[-1].sources_of(0)
        which = neighbours[-1 if new else base or 0]
        model = self.models[which.model]
        origin = LayerOrigin(model.checkpoint.config, which.layer, str(model.ref), model.view.layers_path)
        self.origins += [origin] * per_gap
        if new:
            self._report_types(title, neighbours)

    def _outside(self, title: str, part: str, piece: OutputSlice, position: float) -> None:
        """Embeddings follow the first slice, final norm and head the last, if these merge several models, or are the
        donor's layers; otherwise they are the donor's, copied."""
        refs = list(dict.fromkeys(s.model for s in piece.sources))
        own = len(piece.sources) == 1 and refs == [self.recipe.donor]
        merges = (own or len(refs) > 1) and not methods()[piece.merge_method].inserts
        if merges:
            sources = tuple(next(s for s in piece.sources if s.model == ref) for ref in refs)
        else:
            sources = (SliceSource(self.recipe.donor, place=piece.place),)
        names = [getattr(self._view(s.model), part) for s in sources]
        if not names[0]:
            return
        title = self._title(title)
        if not merges and self.recipe.donor not in refs and self.recipe.base_model is None:
            self.warnings.append(
                f"{title} come from {self.recipe.donor}, the first model named, not from {refs[0]}, whose layers"
                " are next to them; set base_model to choose"
            )
        self._around(title, piece if merges else _copied(piece), sources, names, position, bare=not merges)

    def _others(self) -> None:
        """What belongs to none of the recipe's modules is the donor's."""
        donor = self.models[self.donor]
        views = [donor.modules[name] for name in self.recipe.modules]
        taken = {name for view in views for name in view.names()}
        rest = tuple(name for name in donor.checkpoint.tensors if name not in taken)
        if rest:
            piece = self.recipe.pieces()[0]
            source = SliceSource(self.recipe.donor, place=piece.place)
            self._around("other modules", _copied(piece), (source,), [rest], 0.0, bare=True)

    def _around(self, title: str, piece, sources: Sequence[SliceSource], names, position: float, bare: bool) -> None:
        """A block of tensors that belong to no layer."""
        base = base_source(piece, sources, piece.base_model or self.recipe.base_model)
        indices = [self.index[s.model] for s in sources]
        for i, checkpoint in zip(indices, self.vocabulary.bring(indices, names[0], base, title), strict=True):
            self.models[i] = replace(self.models[i], checkpoint=checkpoint)
        parts = [Part.of(s, self._model(s), title, {n: n for n in own}) for s, own in zip(sources, names, strict=True)]
        check_same(parts, self.vocabulary.hint(indices))
        made = [
            self._task(piece, sources, name, 0, name, None, [name] * len(sources), position, bare) for name in names[0]
        ]
        block_sources = tuple(BlockSource(self.index[s.model], None) for s in sources)
        self._add(replace(piece, sources=tuple(sources)), title, (), block_sources, base, made)

    def _title(self, title: str) -> str:
        return ", ".join(part for part in (self.module, title) if part)

    def _task(self, piece, sources, role, slot, name, spec: TensorSpec | None, names, position, bare=False):
        """One output tensor as its method sees it, and what it is made from."""
        inputs = tuple(self._model(s).checkpoint.tensors[n] for s, n in zip(sources, names, strict=True))
        method = methods()[piece.merge_method]
        glob: Settings = {} if bare else self.recipe.parameters
        shared: Settings = {} if bare else piece.shared
        parameters, per_source = {}, [{} for _ in sources]
        for p in method.parameters:
            filter_name = None if p.scope == "block" else name
            if p.scope != "source":
                levels = [piece.parameters, shared, glob]
                parameters[p.name] = resolve_setting(p, levels, filter_name, position)
                continue
            for i, source in enumerate(sources):
                levels = [source.parameters, piece.parameters, shared, glob]
                per_source[i][p.name] = resolve_setting(p, levels, names[i], position)
        model = self._model(sources[0])
        heads = head_shape(model.checkpoint.config, self._view(model.ref)) if spec else None
        shape = inputs[0].shape
        return TensorTask(role, slot, name, spec, shape, parameters, tuple(per_source), heads=heads), inputs

    def _planned(self, task: TensorTask, inputs: tuple[TensorInfo, ...], method: str, align: AlignTo | None):
        dtype = self._dtype(inputs)
        action, source = action_of(task, method, inputs, dtype, align)
        if action in ("merge", "cast"):
            self._castable(task.name, inputs, dtype, action)
        return PlannedTensor(task, inputs, dtype, action, source)

    def _dtype(self, inputs: Sequence[TensorInfo]) -> str:
        """As the recipe says; else the dtype that holds those of all sources."""
        stored = promoted([i.dtype for i in inputs])
        wanted = self.recipe.out_dtype or self.recipe.dtype
        return wanted if wanted and stored in _FLOATS else stored

    def _castable(self, name: str, inputs: Sequence[TensorInfo], dtype: str, action: str) -> None:
        for info in inputs:
            if info.dtype not in _FLOATS and not (action == "cast" and info.dtype == dtype):
                raise PlanError(
                    f"{name} holds {dtype_name(info.dtype)}, which cannot be merged",
                    where=info.file,
                    expected="floating point weights",
                    hint="quantised checkpoints can only pass through; use the original weights",
                )
            if promoted([info.dtype, dtype]) == dtype:
                continue
            kinds = f"{dtype_name(info.dtype)} weights are written as {dtype_name(dtype)}"
            lost = f"{kinds}: this loses precision{' and range' if dtype == 'F16' else ''}"
            if lost not in self.warnings:
                self.warnings.append(lost)

    def _add(self, piece: OutputSlice, title: str, outputs, sources: tuple[BlockSource, ...], base, made, new=False):
        """The block, if its method can make it. Asked before anything else of the method."""
        method = methods()[piece.merge_method]
        made = [(replace(task, base=base), inputs) for task, inputs in made]
        tasks = [task for task, _ in made]
        align = None
        if piece.align and outputs:
            align = AlignTo(base if base is not None else len(sources) - 1, piece.align.values)
            if problem := cannot_align(align.values, tasks):
                raise RecipeError(problem, where=f"{piece.align.place.where}, {title} of the output")
        if problem := method.check(tasks, len(sources)):
            name = problem.partition(":")[0]  # a parameter, if one is to blame
            levels = (piece.parameters, piece.shared, self.recipe.parameters)
            place = next((level[name][1] for level in levels if name in level), piece.place)
            views = [self._view(self.models[s.model].ref) for s in sources]
            undescribed = [v.model_type for v in views if method.inserts and v.architecture is None]
            raise RecipeError(
                problem,
                where=f"{place.where}, {title} of the output",
                expected=f"a described family: {', '.join(families())}" if undescribed else None,
                got=f"model_type {undescribed[0]}" if undescribed else None,
            )
        check_given(piece, base, tasks)
        remark = method.remark(made[0][0])
        if remark and remark not in self.warnings:
            self.warnings.append(remark)
        tensors = tuple(self._planned(task, inputs, piece.merge_method, align) for task, inputs in made)
        index = len(self.blocks)
        self.blocks.append(
            BlockPlan(index, title, outputs, piece.merge_method, sources, base, tensors, new, align, self.module)
        )

    def _report_types(self, title: str, sources: Sequence[BlockSource]) -> None:
        models = [self.models[s.model] for s in sources]
        lists = [layer_lists(m.checkpoint.config, self._view(m.ref).layers_path) for m in models]
        for key in lists[0]:
            entries = [
                values.get(key, [None] * (s.layer + 1))[s.layer] for values, s in zip(lists, sources, strict=True)
            ]
            if any(e != entries[-1] for e in entries):
                self.warnings.append(f"{title} fuses layers whose {key} differ ({entries}); it takes {entries[-1]!r}")

    def _report_feature_layer(self, view: ModelView) -> None:
        """Vision-language models take their features from one layer of the tower, which they know by its number."""
        feature = self.models[self.donor].checkpoint.config.get("vision_feature_layer")
        if reads_senses(view.layers_path) and feature is not None and len(self.origins) != view.num_layers:
            self.warnings.append(
                f"config.json's vision_feature_layer is {feature}: it counts layers of {self.module}, which has now"
                f" {len(self.origins)}"
            )

    def _report_idle_filters(self) -> None:
        """A filter that is part of no tensor's name is most likely misspelt."""
        tensors = [t for block in self.blocks for t in block.tensors]
        names = {name for t in tensors for name in (t.task.name, *(i.name for i in t.inputs))}
        levels = [self.recipe.parameters]
        for piece in self.recipe.pieces():
            levels += [piece.parameters, piece.shared, *(s.parameters for s in piece.sources)]
        for setting, place in (value for settings in levels for value in settings.values()):
            idle = [f for f in filters(setting) if not any(f in name for name in names)]
            self.warnings += [f"{place.where}: filter {f!r} is part of no tensor's name" for f in dict.fromkeys(idle)]


def _copied(piece: OutputSlice) -> OutputSlice:
    """The slice's sources as they are."""
    return replace(piece, merge_method="passthrough", parameters={}, shared={})
