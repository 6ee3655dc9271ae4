"""From a recipe to a checkpoint, and back: plan, merge, up-scale, fit, strip."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.storage import LoadOptions
from ..core.errors import PlanError
from ..core.located import Plain, locate
from ..core.units import parse_size
from ..core.urls import address_of
from ..plan.blocks import BlockPlan
from ..plan.build import DEFAULT_SHARD_SIZE, build_plan
from ..plan.fit import Fit, check, choose, within
from ..plan.training_memory import ModelShape, TrainingSettings
from ..plan.types import Plan
from ..recipe.presets import PRESETS, check_upscale
from ..recipe.reader import recipe_from
from ..recipe.types import Recipe
from ..report.manifest_parts import CalibratedLayer
from ..run.bucket import check_bucket_run
from ..run.engines.ray_tasks import make_pieces
from ..run.events import OnEvent, unheard
from ..run.executor import Outcome, execute
from ..run.piece_job import OnBlock
from ..run.pieces import finish, finished_pieces, make_in_bucket
from ..run.preflight import Calibrator, RunOptions
from ..run.preflight import preflight as check_run
from ..run.strip import Stripped
from ..training.calibration.planned import calibrator_of
from .arguments import instance, local_path_of, model_of, path_of, recipe_of
from .progress import Counter, OnProgress
from .results import MergeResult

#: a recipe, its values, its YAML, or its file
AnyRecipe = Recipe | Mapping[str, Any] | str | Path


def plan(
    recipe: AnyRecipe,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    load_options: LoadOptions | None = None,
    copy_tokenizer: bool = True,
) -> Plan:
    """Plan a recipe. Reads configs and headers, no tensor.

    Args:
        recipe: A recipe, its values as a dict, its YAML (text of several lines), or its file.
        max_shard_size: Upper bound of an output file's size, in bytes or like ``"5GB"``.
        load_options: Whether pickled weights may be read, and the folder for downloads.
        copy_tokenizer: Whether the output gets the tokenizer.

    Returns:
        The plan, which `merge` runs.

    Raises:
        DeusMergeError: the recipe or one of its models is invalid, or they do not fit together.
    """
    load_options = instance(load_options, LoadOptions, "load_options")
    return build_plan(
        recipe_of(recipe), max_shard_size=max_shard_size, load_options=load_options, copy_tokenizer=copy_tokenizer
    )


def merge(
    recipe: Plan | AnyRecipe,
    out: str | Path,
    options: RunOptions | None = None,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    load_options: LoadOptions | None = None,
    copy_tokenizer: bool = True,
    on_block: Callable[[BlockPlan, bool], None] | None = None,
    on_layer: Callable[[CalibratedLayer, bool], None] | None = None,
    on_fraction: Callable[[BlockPlan, float], None] | None = None,
    on_event: OnEvent = unheard,
    progress: OnProgress | None = None,
) -> MergeResult:
    """Run a recipe and write the checkpoint. With ``calibrate`` in the recipe, the outputs of the new layers are set in
    the unfinished folder before it gets its name.

    Args:
        recipe: A plan from `plan`, or whatever `plan` takes.
        out: The output folder, or its address in a bucket.
        options: Device, resume, overwrite, verification.
        max_shard_size, load_options, copy_tokenizer: See `plan`; not used for a plan, which has its own.
        on_block: Called after each block with the block and whether an earlier run had finished it.
        on_layer: Called after each calibrated layer, with whether an earlier run had finished it.
        on_fraction: Called within blocks, with the fraction of the block that is written; from several threads.
        on_event: Called with what happens to blocks, pieces and workers, as JSON data.
        progress: Called after each of these steps, with how many there are.

    Returns:
        The finished run.

    Raises:
        DeusMergeError: the run is impossible; nothing has been written.
        MachineError: the machine failed during the run, which can be resumed.
        VerifyError: the result failed verification; it is not renamed to ``out``.
    """
    started, target = time.monotonic(), path_of(out, "out")
    options = instance(options, RunOptions, "options")
    if not isinstance(recipe, Plan):
        recipe = plan(recipe, max_shard_size=max_shard_size, load_options=load_options, copy_tokenizer=copy_tokenizer)

    def run(block_finished: OnBlock, calibrator: Calibrator | None) -> Outcome:
        if address_of(target):
            return make_in_bucket(recipe, target, options, block_finished, on_fraction, on_event)
        if isinstance(options.workers, int):
            told = {"on_fraction": on_fraction, "on_event": on_event}
            return execute(recipe, target, options, block_finished, calibrator, **told)
        make_pieces(recipe, target, options, options.workers, on_block=block_finished, on_event=on_event)
        return finish(recipe, target, options, lambda block, resumed: None, calibrator)

    return carry_out(run, recipe, target, options, started, on_block, on_layer, progress)


def carry_out(
    run: Callable[[OnBlock, Calibrator | None], Outcome],
    plan: Plan,
    out: Path,
    options: RunOptions,
    started: float,
    on_block: OnBlock | None,
    on_layer: Callable[[CalibratedLayer, bool], None] | None,
    progress: OnProgress | None,
) -> MergeResult:
    """Run a plan, and count its blocks and calibrated layers as steps.

    Args:
        run: Runs it, given what is called after each block, and what calibrates the output.
        plan, out, options: As for `merge`.
        started: When the call began, from `time.monotonic`.
        on_block, on_layer, progress: As for `merge`.
    """
    counter = Counter(progress)

    def block_finished(block: BlockPlan, resumed: bool) -> None:
        if on_block is not None:
            on_block(block, resumed)
        counter.step(f"{block.title}: {block.how}", resumed)

    def layer_finished(layer: CalibratedLayer, resumed: bool) -> None:
        if on_layer is not None:
            on_layer(layer, resumed)
        counter.step(f"calibrated layer {layer.layer}", resumed)

    calibrator = calibrator_of(plan, options, layer_finished)
    counter.total = len(plan.blocks) + (len(calibrator.job.writers.layers) if calibrator else 0)
    done = run(block_finished, calibrator)
    return MergeResult(
        out, plan, done.verification, done.warnings, time.monotonic() - started, done.calibration, done.times
    )


def upscale(
    model: str | Path,
    out: str | Path,
    options: RunOptions | None = None,
    *,
    preset: str = "opt_deus",
    insert: Plain = None,
    memory: int | str | None = None,
    dtype: str | None = None,
    parameters: Mapping[str, Plain] | None = None,
    quantize_new: bool = False,
    calibrate: str | Path | Mapping[str, Plain] | None = None,
    training: TrainingSettings | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    load_options: LoadOptions | None = None,
    copy_tokenizer: bool = True,
    progress: OnProgress | None = None,
) -> MergeResult:
    """Make a model deeper: the main job, without a recipe.

    Args:
        model: A folder or ``org/name[@revision]``.
        out: The output folder, or its address in a bucket.
        options: Device, resume, overwrite, verification.
        preset, insert, dtype, parameters, quantize_new, calibrate: As for `upscale_recipe`.
        memory: Put in as many layers as can be trained with this much memory, in bytes or like ``"24GB"``: see `fit`.
        training: With ``memory``: how the new layers are trained; None for the defaults.
        max_shard_size, load_options, copy_tokenizer: See `plan`.
        progress: Called after each step, with how many there are.

    Returns:
        The finished run.

    Raises:
        DeusMergeError: as `upscale_recipe`, `fit` and `merge`.
    """
    target, more = path_of(out, "out"), {"dtype": dtype, "parameters": parameters, "quantize_new": quantize_new}
    if memory is not None:
        insert = fit(model, memory, training, preset=preset, insert=insert, load_options=load_options, **more).insert
    recipe = upscale_recipe(model, preset=preset, insert=insert, calibrate=calibrate, **more)
    planned = plan(recipe, max_shard_size=max_shard_size, load_options=load_options, copy_tokenizer=copy_tokenizer)
    return merge(planned, target, options, progress=progress)


def preflight(
    plan: Plan,
    out: str | Path,
    options: RunOptions | None = None,
    *,
    finishing: bool = False,
    sharing: bool = False,
    mixed_machines: bool = False,
) -> tuple[str, ...]:
    """Check everything that can be known to go wrong with a run, a calibration included; writes nothing.

    Args:
        plan: A plan from `plan`.
        out: The output folder, or its address in a bucket.
        options: As for `merge`.
        finishing: Check what `finish` would do: whether all pieces are there, and fit together.
        sharing: Check what `make_share` would do: pieces of other workers, or the finished output, are no obstacle.
        mixed_machines: As for `finish`.

    Returns:
        Warnings about this machine and the text of a calibration.

    Raises:
        DeusMergeError: the run is impossible.
    """
    options = instance(options, RunOptions, "options")
    if not isinstance(plan, Plan):
        raise PlanError("not a plan", where="plan", expected="the result of deus_merge.plan", got=type(plan).__name__)
    target, made = path_of(out, "out"), None
    if finishing:
        made, _ = finished_pieces(plan, target, options, mixed_machines=mixed_machines)
    if finishing or (sharing and not options.overwrite):
        options = replace(options, resume=True)
    if address_of(target):
        return check_bucket_run(plan, target, options)
    return check_run(plan, target, options, calibrator_of(plan, options), made).warnings


def upscale_recipe(
    model: str | Path,
    *,
    preset: str = "opt_deus",
    insert: Plain = None,
    dtype: str | None = None,
    parameters: Mapping[str, Plain] | None = None,
    quantize_new: bool = False,
    calibrate: str | Path | Mapping[str, Plain] | None = None,
) -> Recipe:
    """The recipe that `deus-merge upscale` runs.

    Args:
        model: A folder or ``org/name[@revision]``.
        preset: A name in `presets.PRESETS`.
        insert: The places of new layers, as in a recipe: ``"even"``, ``{"every": 4}`` ...; None for the preset's.
        dtype: The output's dtype; None for the model's.
        parameters: Parameters of the preset's method, which take precedence over the preset's own.
        quantize_new: Write new layers in the format of a quantised base, not in floating point.
        calibrate: A text file that sets the zeroed outputs of new layers, or a recipe's whole ``calibrate`` section.

    Raises:
        RecipeError: an unknown preset, parameter or form of ``insert``, or another value that a recipe cannot have.
    """
    section: dict[str, Plain] = {"preset": preset}
    if insert is not None:
        section["insert"] = insert
    if parameters:
        section["parameters"] = dict(parameters)
    data: dict[str, Plain] = {"base_model": model_of(model), "upscale": section}
    if dtype:
        data["dtype"] = dtype
    if quantize_new:
        data["quantize_new"] = True
    if calibrate is not None:
        data["calibrate"] = dict(calibrate) if isinstance(calibrate, Mapping) else {"text": str(calibrate)}
    recipe = recipe_from(locate(data))
    assert recipe.upscale is not None
    check_upscale(recipe.upscale)
    return recipe


def fit(
    model: str | Path,
    memory: int | str,
    training: TrainingSettings | None = None,
    *,
    preset: str = "opt_deus",
    insert: Plain = None,
    load_options: LoadOptions | None = None,
    **more: Any,
) -> Fit:
    """Choose as many new layers as can be trained on a card: evenly spread, or from the top down where none fits so.

    Args:
        model: A folder or ``org/name[@revision]``.
        memory: The memory of the card, in bytes or like ``"24GB"``.
        training: How the new layers are trained; None for the defaults.
        preset: As for `upscale_recipe`.
        insert: Places of new layers, which are then only checked; None to choose them.
        load_options: As for `plan`.
        more: ``dtype``, ``parameters`` and ``quantize_new``, as for `upscale_recipe`.

    Returns:
        The choice; its ``insert`` is that of `upscale_recipe`.

    Raises:
        PlanError: no new layer fits, or those of ``insert`` do not. The message says what would have to change.
        DeusMergeError: as `plan`.
    """
    training, limit = instance(training, TrainingSettings, "training"), parse_size(memory)
    if preset in PRESETS and PRESETS[preset].parameters is None:
        raise PlanError(f"preset {preset} repeats layers", where="--fit", expected="a preset that puts in new layers")

    def planned(places: Plain) -> Plan:
        return plan(upscale_recipe(model, preset=preset, insert=places, **more), load_options=load_options)

    if insert is not None:
        return check(planned(insert).shape, limit, training, insert)

    def one_by_one(places: Mapping[str, Plain]) -> ModelShape | None:
        try:
            return planned(dict(places)).shape
        except PlanError:
            return None

    try:
        whole = planned("all")
    except PlanError:  # some gap can have no new layer
        copied = {"merge_method": "passthrough", "models": [{"model": model_of(model)}]}
        half = plan(copied, load_options=load_options).num_layers // 2
        spread = one_by_one({"count": half, "where": "even"}) is not None
        return choose(one_by_one, limit, training, half, ("even", "top") if spread else ("top", "even"))
    return choose(within(whole.shape), limit, training, whole.donor.view.num_layers // 2)


def strip(
    out: str | Path,
    base: str | Path,
    *,
    manifest: str | Path | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> Stripped:
    """Remove the layers that the last growth added.

    Args:
        out: An output folder, which may have been trained.
        base: The new folder for the base model.
        manifest, max_shard_size, overwrite: See `deus_merge.run.strip.strip`.

    Raises:
        DeusMergeError: there are no new layers, or the base cannot be separated or written.
    """
    from ..run.strip import strip as run

    source, target = local_path_of(out, "out"), path_of(base, "base")
    return run(source, target, manifest=manifest, max_shard_size=max_shard_size, overwrite=overwrite)
