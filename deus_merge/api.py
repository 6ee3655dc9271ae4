"""The functions for notebooks and the command line: plan, fit, merge, up-scale, verify, report, calibrate,
compare, strip.

::

    from deus_merge import api

    recipe = api.upscale_recipe("demo/SmolLM2-135M-Instruct", preset="opt_deus", insert="top_half")
    print(api.plan(recipe).describe()["new_layers"])
    api.merge(recipe, "deeper")
    api.verify("deeper", check=True)

A plan pickles, and any process can make some of its blocks::

    plan = pickle.loads(data)
    writer = api.ShardWriter(Path("parts"), plan.shards)  # an existing folder; resume=True where the files are there
    api.run_blocks(plan, [0, 1, 2], writer, device="cpu")
    writer.sync(shard.filename for shard in plan.shards)
    writer.close()
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint.header import read_small
from .checkpoint.shards import ShardWriter
from .checkpoint.storage import LoadOptions
from .core.errors import DeusMergeError, PlanError, VerifyError
from .core.located import Plain, locate
from .core.typed_json import dump
from .core.units import parse_size
from .plan.blocks import BlockPlan
from .plan.build import DEFAULT_SHARD_SIZE, build_plan
from .plan.fit import Fit, check, choose
from .plan.training_memory import TrainingSettings
from .plan.types import Plan
from .recipe.presets import PRESETS
from .recipe.reader import read_recipe, recipe_from
from .recipe.types import Recipe
from .report.manifest import RECIPE, read_manifest
from .report.manifest_parts import CalibratedLayer, Calibration
from .run.block_runner import run_blocks
from .run.executor import execute
from .run.preflight import RunOptions
from .run.preflight import preflight as check_run
from .run.strip import Stripped
from .training.calibration import Calibrated, CalibrationOptions
from .training.calibration.planned import calibrator_of
from .training.calibration.scores import GapScore
from .training.comparison import Budget, CompareOptions, Comparison
from .verify import Verification

__all__ = [
    "Budget",
    "Calibrated",
    "CalibrationOptions",
    "CompareOptions",
    "Comparison",
    "DeusMergeError",
    "Fit",
    "GapScore",
    "LoadOptions",
    "MergeResult",
    "RunOptions",
    "ShardWriter",
    "Stripped",
    "TrainingSettings",
    "calibrate",
    "compare",
    "export_training",
    "fit",
    "merge",
    "plan",
    "preflight",
    "report",
    "run_blocks",
    "score_gaps",
    "strip",
    "upscale_recipe",
    "verify",
]


@dataclass(frozen=True)
class MergeResult:
    """A finished run.

    Attributes:
        folder: The output folder.
        plan: The plan that was run.
        verification: The verification's result; None when it was switched off.
        warnings: Warnings of the plan and of the run (transport plans that did not converge).
        seconds: Wall time.
        calibration: The record of the calibration; None where the recipe has no ``calibrate``.
    """

    folder: Path
    plan: Plan = field(repr=False)
    verification: Verification | None
    warnings: tuple[str, ...]
    seconds: float
    calibration: Calibration | None = None

    def describe(self) -> dict[str, Any]:
        """The result as JSON data."""
        return {
            "folder": str(self.folder),
            "plan_hash": self.plan.hash,
            "num_layers": self.plan.num_layers,
            "new_layers": list(self.plan.new_layers),
            "function_preserving": self.plan.function_preserving and not self._is_set,
            "bytes_written": self.plan.bytes_written,
            "seconds": round(self.seconds, 3),
            "verification": self.verification and self.verification.describe(),
            "warnings": list(self.warnings),
            **({"calibration": dump(self.calibration)} if self.calibration else {}),
        }

    @property
    def _is_set(self) -> bool:
        """Whether a calibration has set outputs of new layers."""
        return self.calibration is not None and any(layer.tensors for layer in self.calibration.layers)


def plan(
    recipe: Recipe | str | Path,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    load_options: LoadOptions | None = None,
    copy_tokenizer: bool = True,
) -> Plan:
    """Plan a recipe. Reads configs and headers, no tensor.

    Args:
        recipe: A recipe or its file.
        max_shard_size: Upper bound of an output file's size, in bytes or like ``"5GB"``.
        load_options: Whether pickled weights may be read, and the folder for downloads.
        copy_tokenizer: Whether the output gets the tokenizer.

    Returns:
        The plan, which `merge` runs.

    Raises:
        DeusMergeError: the recipe or one of its models is invalid, or they do not fit together.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe)
    return build_plan(recipe, max_shard_size=max_shard_size, load_options=load_options, copy_tokenizer=copy_tokenizer)


def merge(
    recipe: Recipe | Plan | str | Path,
    out: str | Path,
    options: RunOptions | None = None,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    load_options: LoadOptions | None = None,
    copy_tokenizer: bool = True,
    on_block: Callable[[BlockPlan, bool], None] | None = None,
    on_layer: Callable[[CalibratedLayer, bool], None] | None = None,
) -> MergeResult:
    """Run a recipe and write the checkpoint. With ``calibrate`` in the recipe, the outputs of the new layers are set in
    the unfinished folder before it gets its name.

    Args:
        recipe: A recipe, its file, or a plan from `plan`.
        out: The output folder.
        options: Device, resume, overwrite, verification.
        max_shard_size, load_options, copy_tokenizer: See `plan`; not used for a plan, which has its own.
        on_block: Called after each block with the block and whether an earlier run had finished it.
        on_layer: Called after each calibrated layer, with whether an earlier run had finished it.

    Returns:
        The finished run.

    Raises:
        DeusMergeError: the run is impossible; nothing has been written.
        MachineError: the machine failed during the run, which can be resumed.
        VerifyError: the result failed verification; it is not renamed to ``out``.
    """
    started = time.monotonic()
    if not isinstance(recipe, Plan):
        recipe = plan(recipe, max_shard_size=max_shard_size, load_options=load_options, copy_tokenizer=copy_tokenizer)
    options = options or RunOptions()
    calibrator = calibrator_of(recipe, options, on_layer)
    done = execute(recipe, Path(out), options, on_block or (lambda block, resumed: None), calibrator)
    seconds = time.monotonic() - started
    return MergeResult(Path(out), recipe, done.verification, done.warnings, seconds, done.calibration)


def preflight(plan: Plan, out: str | Path, options: RunOptions | None = None) -> tuple[str, ...]:
    """Check everything that can be known to go wrong with a run, a calibration included; writes nothing.

    Args:
        plan: A plan from `plan`.
        out: The output folder.
        options: As for `merge`.

    Returns:
        Warnings about this machine and the text of a calibration.

    Raises:
        DeusMergeError: the run is impossible.
    """
    options = options or RunOptions()
    return check_run(plan, Path(out), options, calibrator_of(plan, options)).warnings


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
        insert: The places of new layers, as in a recipe: ``"top_half"``, ``{"every": 4}`` ...; None for the preset's.
        dtype: The output's dtype; None for the model's.
        parameters: Parameters of the preset's method, which take precedence over the preset's own.
        quantize_new: Write new layers in the format of a quantised base, not in floating point.
        calibrate: A text file that sets the zeroed outputs of new layers, or a recipe's whole ``calibrate`` section.

    Raises:
        RecipeError: a value that a recipe file could not have either.
    """
    section: dict[str, Plain] = {"preset": preset}
    if insert is not None:
        section["insert"] = insert
    if parameters:
        section["parameters"] = dict(parameters)
    data: dict[str, Plain] = {"base_model": str(model), "upscale": section}
    if dtype:
        data["dtype"] = dtype
    if quantize_new:
        data["quantize_new"] = True
    if calibrate is not None:
        data["calibrate"] = dict(calibrate) if isinstance(calibrate, Mapping) else {"text": str(calibrate)}
    return recipe_from(locate(data))


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
    """Choose as many new layers as can be trained on a card, from the top of the model down to its middle.

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
    training, limit = training or TrainingSettings(), parse_size(memory)
    if preset in PRESETS and PRESETS[preset].parameters is None:
        raise PlanError(f"preset {preset} repeats layers", where="--fit", expected="a preset that puts in new layers")
    recipe = upscale_recipe(model, preset=preset, insert="top_half" if insert is None else insert, **more)
    planned = plan(recipe, load_options=load_options)
    if insert is not None:
        return check(planned.shape, limit, training, insert)
    return choose(planned.shape, limit, training, planned.donor.view.num_layers // 2)


def verify(
    out: str | Path, *, quick: bool = False, logits_text: str | None = None, strict: bool = False, check: bool = False
) -> Verification:
    """Check a finished output.

    Args:
        out: The output folder.
        quick, logits_text, strict: See `deus_merge.verify.verify`.
        check: Whether a failed check raises an error.

    Returns:
        The result of every check.

    Raises:
        VerifyError: a check failed, with ``check``.
    """
    from .verify import verify as run

    result = run(out, quick=quick, logits_text=logits_text, strict=strict)
    if check and not result.passed:
        failed = result.failed[0]
        raise VerifyError(f"{failed.name}: {failed.detail}", where=out)
    return result


def report(out: str | Path, html: str | Path | None = None, *, verification: Verification | None = None) -> Path:
    """Write one self-contained HTML page about a finished output.

    Args:
        out: The output folder.
        html: The page's file; by default ``report.html`` in the output folder.
        verification: The verification that the page shows; None to run a quick one now.

    Returns:
        The page's file.

    Raises:
        DeusMergeError: the manifest is missing or damaged, or the page cannot be written.
    """
    from .report.page import REPORT, render_page

    out = Path(out)
    page = Path(html) if html is not None else out / REPORT
    manifest = read_manifest(out)
    recipe = read_small(out / RECIPE).decode(errors="replace") if (out / RECIPE).is_file() else ""
    text = render_page(manifest, recipe, (verification or verify(out, quick=True)).describe())
    try:
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DeusMergeError("the page cannot be written", where=page, got=error.strerror) from None
    return page


def export_training(
    out: str | Path,
    trainer: str,
    *,
    optimizer: str | None = None,
    lr: float | None = None,
    output_ratio: float = 1.0,
) -> str:
    """The settings with which another trainer trains an output's new layers and nothing else.

    Args:
        out: An output folder.
        trainer: A name in `training.export.TRAINERS`.
        optimizer: ``adamw`` or ``muon``, as for `training.optimizer`. None leaves it to the trainer, unless ``lr`` is
            given: then it is ``adamw``.
        lr: The learning rate.
        output_ratio: The learning rate of what began as zeros, in units of ``lr``.

    Raises:
        CheckpointError: the output's manifest is missing or damaged.
        TrainingError: the trainer cannot express this, or a value is missing or out of range.
    """
    from .training.export import export
    from .training.export_optimizers import settings_of

    return export(out, trainer, settings_of(optimizer, lr, output_ratio))


def calibrate(
    out: str | Path,
    new: str | Path,
    text: str,
    options: CalibrationOptions | None = None,
    *,
    on_layer: Callable[[CalibratedLayer, bool], None] | None = None,
) -> Calibrated:
    """Set the zeroed outputs of an output's new layers in closed form from a text.

    Args:
        out: An output folder whose new layers have zeroed outputs and were not trained.
        new: The new folder for the calibrated model.
        text: The text itself. Its tokens count as training tokens.
        options: Tokens, method, damping, device ...
        on_layer: Called after each new layer, with whether an earlier run had finished it.

    Returns:
        The losses before and after, and the step of each layer.

    Raises:
        DeusMergeError: the model or the text cannot be used, or the result cannot be written.
    """
    from .training.calibration import calibrate as run

    return run(out, new, text, options, on_layer)


def score_gaps(
    model: str | Path,
    text: str,
    options: CalibrationOptions | None = None,
    *,
    load_options: LoadOptions | None = None,
    on_gap: Callable[[GapScore], None] | None = None,
) -> tuple[GapScore, ...]:
    """Score every gap between two layers of a model: how much of the loss's gradient a new layer there could follow.

    Args:
        model: A folder or ``org/name[@revision]``.
        text: The text itself, like that of the training.
        options: Tokens, damping, device ...
        load_options: As for `plan`.
        on_gap: Called after each gap, from the highest to the lowest.

    Returns:
        The scores, from the lowest gap to the highest.

    Raises:
        DeusMergeError: the model or the text cannot be used.
    """
    from .training.calibration.scores import score_gaps as run

    return run(model, text, options, load_options, on_gap)


def compare(
    model: str | Path,
    out: str | Path,
    text: str | Path | Sequence[str | Path],
    options: CompareOptions | None = None,
    *,
    base_text: str | Path | Sequence[str | Path] = (),
    on_run: Callable[[Mapping[str, Any], int, float], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> Comparison:
    """Compare ways to grow a model, and ways to train it, by training on a text. Called again, it goes on.

    Args:
        model: A folder or ``org/name[@revision]``.
        out: The folder for results.
        text: Files or folders of text to learn.
        options: Inits, places, optimizers, tokens, seeds, budget ...
        base_text: Text that should not be forgotten: its loss is measured before and after.
        on_run: Called after each run with its result, about how many runs are left, and the seconds that these take.
        on_stage: Called with a few words before something that takes a while.

    Returns:
        The results so far: all of them, unless the budget ended.

    Raises:
        DeusMergeError: a model, a text or an option cannot be used, or the folder has results of other settings.
    """
    from .training.comparison import compare as run

    def listed(paths: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
        return [paths] if isinstance(paths, str | Path) else paths

    return run(str(model), out, listed(text), options, base_text=listed(base_text), on_run=on_run, on_stage=on_stage)


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
    from .run.strip import strip as run

    return run(out, base, manifest=manifest, max_shard_size=max_shard_size, overwrite=overwrite)
