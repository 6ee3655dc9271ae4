"""Blocks with their output tensors: what each is made from, in which dtype, with which parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..align.parameters import AlignTo, cannot_align
from ..checkpoint.reader import TensorInfo
from ..core.errors import PlanError, RecipeError
from ..core.units import FLOAT_DTYPES, dtype_name, promoted
from ..methods.base import TensorTask
from ..methods.registry import methods
from ..models.config_rules import LayerOrigin, head_shape, layer_lists
from ..models.family import TensorSpec, families
from ..models.reference import ModelRef
from ..models.source import SourceModel
from ..models.tokenizer.blocks import VocabularyPlan
from ..models.view import ModelView, prefix_of
from ..recipe.parameters import Settings, resolve_setting
from ..recipe.presets import MAX_LAYERS
from ..recipe.types import OutputSlice, Recipe, SliceSource
from .blocks import BlockPlan, BlockSource, PlannedTensor, action_of
from .compatibility import Part, base_source, check_given, check_like_donor, check_same

_FLOATS = {"F8_E4M3", "F8_E5M2", *FLOAT_DTYPES.values()}


@dataclass
class Assembly:
    """The blocks of a plan, one behind another.

    Attributes:
        recipe: Of slices or modules.
        models: Every model it names, the donor first; with their tokens in the output's order where that was needed.
        vocabulary: What brings embeddings and heads into the output's order.
        warnings: What the user should know so far.
        module: Whose layers are being made; None: all of a model at once.
        origins: Where each of the module's output layers comes from.
        blocks: All that were made so far.
    """

    recipe: Recipe
    models: list[SourceModel]
    vocabulary: VocabularyPlan
    warnings: list[str]
    module: str | None = None
    origins: list[LayerOrigin] = field(default_factory=list)
    blocks: list[BlockPlan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.index = {model.ref: i for i, model in enumerate(self.models)}

    def begin(self, module: str | None) -> None:
        """Go on with the layers of a module."""
        self.module, self.origins = module, []

    def view(self, ref: ModelRef) -> ModelView:
        """A model's part of the module at hand; all of it when recipes do not speak of modules."""
        model = self.models[self.index[ref]]
        if self.module is None:
            return model.view
        if self.module not in model.modules:
            have = " | ".join(model.modules)
            raise PlanError(f"{ref} has no module {self.module}", where=ref.place.where, expected=have)
        return model.modules[self.module]

    def model(self, source: SliceSource) -> SourceModel:
        return self.models[self.index[source.model]]

    def layers(
        self,
        piece: OutputSlice,
        layers: Sequence[int],
        position: float,
        *,
        count: int = 1,
        new: bool = False,
        bare: bool = False,
        between: tuple[int, int] | None = None,
    ) -> None:
        """A block that makes the next layers of the output.

        Args:
            piece: The slice, its sources those of the block.
            layers: Which layer of each source.
            position: Where in the slice, from 0 to 1, for gradients.
            count: How many layers.
            new: Whether they are to be trained.
            bare: Whether the recipe's parameters are left aside.
            between: The sources that are the new layer's neighbours, where it is made from more than these.
        """
        sources = piece.sources
        views = [self.view(s.model) for s in sources]
        roles = [v.layers[layer] for v, layer in zip(views, layers, strict=True)]
        first_output = len(self.origins)
        last = first_output + count - 1
        if last >= MAX_LAYERS:
            piece.place.fail("the output has too many layers", expected=f"at most {MAX_LAYERS}", got="more")
        title = self.title(f"layers {first_output}-{last}" if count > 1 else f"layer {last}")
        parts = [
            Part.of(s, self.model(s), f"layer {layer}", names)
            for s, layer, names in zip(sources, layers, roles, strict=True)
        ]
        check_same(parts)
        donor = self.view(self.recipe.donor)
        check_like_donor(parts[0], self.models[0], donor)
        base = base_source(piece, piece.base_model or self.recipe.base_model)
        made = []
        for slot in range(count):
            prefix = prefix_of(first_output + slot, donor.layer_prefix)
            for role in roles[0]:
                spec = views[0].spec(role)
                names = [r[role] for r in roles]
                name = prefix + (spec.name if spec else role)
                task, inputs = self._task(piece, role, slot, name, spec, names, position, bare)
                made.append((replace(task, between=between), inputs))
        block_sources = tuple(BlockSource(self.index[s.model], layer) for s, layer in zip(sources, layers, strict=True))
        outputs = tuple(range(first_output, first_output + count))
        self._add(piece, title, outputs, block_sources, base, made, new)
        neighbours = self.blocks[-1].sources_of(0)
        which = neighbours[-1 if new else base or 0]
        model = self.models[which.model]
        origin = LayerOrigin(model.checkpoint.config, which.layer, str(model.ref), model.view.layers_path)
        self.origins += [origin] * count
        if new:
            self._report_types(title, neighbours)

    def around(
        self, title: str, piece: OutputSlice, names: Sequence[Sequence[str]], position: float, *, bare: bool
    ) -> None:
        """A block of tensors that belong to no layer, by their names in each source; `layers` tells of the rest."""
        sources, title = piece.sources, self.title(title)
        base = base_source(piece, piece.base_model or self.recipe.base_model)
        indices = [self.index[s.model] for s in sources]
        for i, checkpoint in zip(indices, self.vocabulary.bring(indices, names[0], base, title), strict=True):
            self.models[i] = replace(self.models[i], checkpoint=checkpoint)
        parts = [Part.of(s, self.model(s), title, {n: n for n in own}) for s, own in zip(sources, names, strict=True)]
        check_same(parts, self.vocabulary.hint(indices))
        made = [self._task(piece, name, 0, name, None, [name] * len(sources), position, bare) for name in names[0]]
        block_sources = tuple(BlockSource(self.index[s.model], None) for s in sources)
        self._add(piece, title, (), block_sources, base, made)

    def title(self, title: str) -> str:
        """A block's title with its module."""
        return ", ".join(part for part in (self.module, title) if part)

    def _task(
        self, piece: OutputSlice, role: str, slot: int, name: str, spec: TensorSpec | None, names: Sequence[str],
        position: float, bare: bool,
    ) -> tuple[TensorTask, tuple[TensorInfo, ...]]:  # fmt: skip
        """One output tensor as its method sees it, and what it is made from."""
        sources = piece.sources
        inputs = tuple(self.model(s).checkpoint.tensors[n] for s, n in zip(sources, names, strict=True))
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
        model = self.model(sources[0])
        heads = head_shape(model.checkpoint.config, self.view(model.ref)) if spec else None
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
            views = [self.view(self.models[s.model].ref) for s in sources]
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
        lists = [layer_lists(m.checkpoint.config, self.view(m.ref).layers_path) for m in models]
        for key in lists[0]:
            entries = [
                values.get(key, [None] * (s.layer + 1))[s.layer] for values, s in zip(lists, sources, strict=True)
            ]
            if any(e != entries[-1] for e in entries):
                self.warnings.append(f"{title} fuses layers whose {key} differ ({entries}); it takes {entries[-1]!r}")
