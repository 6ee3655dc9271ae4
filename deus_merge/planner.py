"""Recipe + configs + headers -> `Plan`. Reads no tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .alignment import AlignTo, cannot_align
from .architecture import ModelView, TensorSpec, families
from .checkpoint.layout import TensorEntry, plan_shards
from .checkpoint.reader import TensorInfo
from .config import LayerOrigin, deeper_config, head_shape, layer_lists
from .errors import PlanError, RecipeError
from .matching import Part, base_source, check_given, check_heads, check_like_donor, check_same
from .method import TensorTask
from .model_files import extra_files
from .plan import BlockPlan, BlockSource, Plan, PlannedTensor, SourceModel, action_of, in_output_order
from .presets import expand
from .recipe import ModelRef, OutputSlice, Recipe, SliceSource, methods
from .settings import Settings, filters, resolve_setting
from .units import FLOAT_DTYPES, dtype_name, parse_size, promoted

DEFAULT_SHARD_SIZE = "5GB"
_FLOATS = {"F8_E4M3", "F8_E5M2", *FLOAT_DTYPES.values()}


def build_plan(recipe: Recipe, *, max_shard_size: int | str = DEFAULT_SHARD_SIZE) -> Plan:
    """Plan a recipe.

    Args:
        recipe: As read.
        max_shard_size: Upper bound of an output file in bytes, or like ``"5GB"``.

    Raises:
        RecipeError, ArchitectureError, CheckpointError, PlanError: whatever is wrong, before a tensor is read.
    """
    return _Planner(recipe).plan(parse_size(max_shard_size))


@dataclass
class _Planner:
    recipe: Recipe

    def plan(self, max_shard_size: int) -> Plan:
        refs = self.recipe.models()
        self.models = tuple(SourceModel.open(ref) for ref in refs)
        self.index = {ref: i for i, ref in enumerate(refs)}
        self.donor = self.index[self.recipe.donor]
        self.warnings: list[str] = check_heads(self.models, self.models[self.donor])
        self.blocks: list[BlockPlan] = []
        self.origins: list[LayerOrigin] = []
        if self.recipe.upscale:
            base = self.recipe.base_model
            slices = expand(self.recipe.upscale, base, self._view(base).num_layers)
            self.recipe = replace(self.recipe, slices=slices, upscale=None)
        self._outside("embeddings", "before", self.recipe.slices[0], 0.0)
        for piece in self.recipe.slices:
            self._slice(piece)
        self._outside("final norm and head", "after", self.recipe.slices[-1], 0.0)
        self._mark_repeats()
        self._join_learned()
        self._report_idle_filters()
        donor = self.models[self.donor]
        dtype = self.recipe.out_dtype or self.recipe.dtype
        config = deeper_config(donor.checkpoint.config, donor.view.layers_path, self.origins, dtype)
        files = extra_files(
            self.recipe, {str(m.ref): m.checkpoint.folder for m in self.models}, donor.checkpoint.folder
        )
        entries = [TensorEntry(t.task.name, t.dtype, t.task.shape) for _, t in in_output_order(self.blocks)]
        shards = plan_shards(entries, max_shard_size)
        return Plan(
            self.recipe, self.models, self.donor, tuple(self.blocks), shards, config, files, tuple(self.warnings)
        )

    def _view(self, ref: ModelRef) -> ModelView:
        return self.models[self.index[ref]].view

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
        copy = replace(piece, merge_method="passthrough", parameters={})
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
        return resolve_setting(known["layers_per_gap"], [piece.parameters, self.recipe.parameters], None, 0.0)

    def _range(self, source: SliceSource) -> range:
        depth = self._view(source.model).num_layers
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
        title = f"layers {first_output}-{last}" if per_gap > 1 else f"layer {last}"
        parts = [
            Part.of(s, self._model(s), f"layer {layer}", names)
            for s, layer, names in zip(sources, layers, roles, strict=True)
        ]
        check_same(parts)
        check_like_donor(parts[0], self.models[self.donor])
        base = base_source(piece, sources, piece.base_model or self.recipe.base_model)
        donor = self.models[self.donor].view
        made = []
        for slot in range(per_gap):
            prefix = donor.layer_prefix.format(layer=first_output + slot)
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
        self.origins += [LayerOrigin(model.checkpoint.config, which.layer, str(model.ref))] * per_gap
        if new:
            self._report_types(title, neighbours)

    def _outside(self, title: str, part: str, piece: OutputSlice, position: float) -> None:
        """Embeddings follow the first slice, final norm and head the last, if these merge several models, or are the
        donor's layers; otherwise they are the donor's, copied."""
        refs = list(dict.fromkeys(s.model for s in piece.sources))
        own = len(piece.sources) == 1 and refs == [self.recipe.donor]
        merges = (own or len(refs) > 1) and not methods()[piece.merge_method].inserts
        donor = SliceSource(self.recipe.donor, place=piece.place)
        if merges:
            sources = tuple(next(s for s in piece.sources if s.model == ref) for ref in refs)
        else:
            if self.recipe.donor not in refs and self.recipe.base_model is None:
                self.warnings.append(
                    f"{title} come from {self.recipe.donor}, the first model named, not from {refs[0]}, whose layers"
                    " are next to them; set base_model to choose"
                )
            piece = replace(piece, merge_method="passthrough", parameters={}, sources=(donor,))
            sources = (donor,)
        names = [{n: n for n in getattr(self._view(s.model), part)} for s in sources]
        if not names[0]:
            return
        check_same([Part.of(s, self._model(s), title, own) for s, own in zip(sources, names, strict=True)])
        base = base_source(piece, sources, piece.base_model or self.recipe.base_model)
        made = [
            self._task(piece, sources, name, 0, name, None, [name] * len(sources), position, bare=not merges)
            for name in names[0]
        ]
        block_sources = tuple(BlockSource(self.index[s.model], None) for s in sources)
        self._add(replace(piece, sources=sources), title, (), block_sources, base, made)

    def _task(self, piece, sources, role, slot, name, spec: TensorSpec | None, names, position, bare=False):
        """One output tensor as its method sees it, and what it is made from."""
        inputs = tuple(self._model(s).checkpoint.tensors[n] for s, n in zip(sources, names, strict=True))
        method = methods()[piece.merge_method]
        glob: Settings = {} if bare else self.recipe.parameters
        parameters, per_source = {}, [{} for _ in sources]
        for p in method.parameters:
            filter_name = None if p.scope == "block" else name
            if p.scope != "source":
                levels = [piece.parameters, glob]
                parameters[p.name] = resolve_setting(p, levels, filter_name, position)
                continue
            for i, source in enumerate(sources):
                levels = [source.parameters, piece.parameters, glob]
                per_source[i][p.name] = resolve_setting(p, levels, names[i], position)
        model = self._model(sources[0])
        heads = head_shape(model.checkpoint.config, model.view) if spec else None
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
            if info.dtype not in _FLOATS:
                raise PlanError(
                    f"{name} holds {dtype_name(info.dtype)}, which cannot be merged",
                    where=info.file,
                    expected="floating point weights",
                    hint="quantised checkpoints can only pass through; use the original weights",
                )
        lossy = {"F32", "F64"} & {i.dtype for i in inputs} and dtype in ("F16", "BF16")
        if action == "cast" and lossy and not any("loses precision" in w for w in self.warnings):
            self.warnings.append(f"{inputs[0].dtype} weights are written as {dtype}: this loses precision")

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
            _, place = piece.parameters.get(name) or self.recipe.parameters.get(name) or (None, piece.place)
            views = [self.models[s.model].view for s in sources]
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
        self.blocks.append(BlockPlan(index, title, outputs, piece.merge_method, sources, base, tensors, new, align))

    def _report_types(self, title: str, sources: Sequence[BlockSource]) -> None:
        models = [self.models[s.model] for s in sources]
        lists = [layer_lists(m.checkpoint.config, m.view.layers_path) for m in models]
        for key in lists[0]:
            entries = [
                values.get(key, [None] * (s.layer + 1))[s.layer] for values, s in zip(lists, sources, strict=True)
            ]
            if any(e != entries[-1] for e in entries):
                self.warnings.append(f"{title} fuses layers whose {key} differ ({entries}); it takes {entries[-1]!r}")

    def _report_idle_filters(self) -> None:
        """A filter that is part of no tensor's name is most likely misspelt."""
        tensors = [t for block in self.blocks for t in block.tensors]
        names = {name for t in tensors for name in (t.task.name, *(i.name for i in t.inputs))}
        levels = [self.recipe.parameters]
        for piece in self.recipe.slices:
            levels += [piece.parameters, *(s.parameters for s in piece.sources)]
        for setting, place in (value for settings in levels for value in settings.values()):
            idle = [f for f in filters(setting) if not any(f in name for name in names)]
            self.warnings += [f"{place.where}: filter {f!r} is part of no tensor's name" for f in dict.fromkeys(idle)]

    def _mark_repeats(self) -> None:
        """A layer that stands a second time (solar, stack) is a new one."""
        seen = set()
        for i, block in enumerate(self.blocks):
            key = block.method, block.sources
            if block.layers and not block.new and len(block.sources) == 1:
                if key in seen:
                    self.blocks[i] = replace(block, new=True)
                seen.add(key)

    def _join_learned(self) -> None:
        """New layers that are learned from the same layers with the same parameters are made in one block."""
        joined: dict[object, BlockPlan] = {}
        for block in self.blocks:
            learned = block.method, block.sources, tuple(block.tensors[0].task.parameters.items())
            key = learned if methods()[block.method].learns else block.index
            joined[key] = joined[key].joined(block) if key in joined else block
        self.blocks = [replace(block, index=i) for i, block in enumerate(joined.values())]
