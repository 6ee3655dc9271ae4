"""Before and beside training: calibrate, score gaps, compare, settings for other trainers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.storage import LoadOptions
from ..report.manifest_parts import CalibratedLayer
from ..training.calibration import Calibrated, CalibrationOptions
from ..training.calibration.scores import GapScore
from ..training.comparison import CompareOptions, Comparison
from .arguments import instance, local_path_of, model_of, path_of, text_of
from .progress import Counter, OnProgress


def calibrate(
    out: str | Path,
    new: str | Path,
    text: str | Path,
    options: CalibrationOptions | None = None,
    *,
    on_layer: Callable[[CalibratedLayer, bool], None] | None = None,
    progress: OnProgress | None = None,
) -> Calibrated:
    """Set the zeroed outputs of an output's new layers in closed form from a text.

    Args:
        out: An output folder whose new layers have zeroed outputs and were not trained.
        new: The new folder for the calibrated model.
        text: The text itself, or the Path of its file. Its tokens count as training tokens.
        options: Tokens, method, damping, device ...
        on_layer: Called after each new layer, with whether an earlier run had finished it.
        progress: The same, with how many layers there are.

    Returns:
        The losses before and after, and the step of each layer.

    Raises:
        DeusMergeError: the model or the text cannot be used, or the result cannot be written.
    """
    from ..training.calibration import calibrate as run

    counter, found = Counter(progress), text_of(text)

    def start(total: int) -> None:
        counter.total = total

    def finished(layer: CalibratedLayer, resumed: bool) -> None:
        if on_layer is not None:
            on_layer(layer, resumed)
        counter.step(f"layer {layer.layer}", resumed)

    source, target = local_path_of(out, "out"), path_of(new, "new")
    return run(source, target, found, instance(options, CalibrationOptions, "options"), finished, start)


def score_gaps(
    model: str | Path,
    text: str | Path,
    options: CalibrationOptions | None = None,
    *,
    load_options: LoadOptions | None = None,
    on_gap: Callable[[GapScore], None] | None = None,
    progress: OnProgress | None = None,
) -> tuple[GapScore, ...]:
    """Score every gap between two layers of a model: how much of the loss's gradient a new layer there could follow.

    Args:
        model: A folder or ``org/name[@revision]``.
        text: The text itself, or the Path of its file: like that of the training.
        options: Tokens, damping, device ...
        load_options: As for `plan`.
        on_gap: Called after each gap, from the highest to the lowest.
        progress: The same, with how many gaps there are.

    Returns:
        The scores, from the lowest gap to the highest.

    Raises:
        DeusMergeError: the model or the text cannot be used.
    """
    from ..training.calibration.scores import score_gaps as run

    counter, found, name = Counter(progress), text_of(text), model_of(model)

    def finished(gap: GapScore, total: int) -> None:
        if on_gap is not None:
            on_gap(gap)
        counter.step(f"gap behind layer {gap.after}", total=total)

    options = instance(options, CalibrationOptions, "options")
    return run(name, found, options, instance(load_options, LoadOptions, "load_options"), finished)


def compare(
    model: str | Path,
    out: str | Path,
    text: str | Path | Sequence[str | Path],
    options: CompareOptions | None = None,
    *,
    base_text: str | Path | Sequence[str | Path] = (),
    on_run: Callable[[Mapping[str, Any], int, float], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
    progress: OnProgress | None = None,
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
        progress: Called after each run, with about how many there are.

    Returns:
        The results so far: all of them, unless the budget ended.

    Raises:
        DeusMergeError: a model, a text or an option cannot be used, or the folder has results of other settings.
    """
    from ..training.comparison import compare as run

    def listed(paths: Any, name: str) -> list[Path]:
        several = isinstance(paths, Sequence) and not isinstance(paths, str)
        return [path_of(path, name) for path in (paths if several else [paths])]

    def finished(result: Mapping[str, Any], left: int, seconds: float) -> None:
        if on_run is not None:
            on_run(result, left, seconds)
        counter.step(str(result["init"]), total=counter.done + 1 + left)

    counter, name, folder = Counter(progress), model_of(model), local_path_of(out, "out")
    files, base_files = listed(text, "text"), listed(base_text, "base_text")
    options = instance(options, CompareOptions, "options")
    return run(name, folder, files, options, base_text=base_files, on_run=finished, on_stage=on_stage)


def export_training(
    out: str | Path,
    trainer: str,
    *,
    optimizer: str | None = None,
    lr: float | None = None,
    output_ratio: float = 1.0,
    private_paths: bool = False,
) -> str:
    """The settings with which another trainer trains an output's new layers and nothing else.

    Args:
        out: An output folder.
        trainer: A name in `training.export.TRAINERS`.
        optimizer: ``adamw`` or ``muon``, as for `training.optimizer`. None leaves it to the trainer, unless ``lr`` is
            given: then it is ``adamw``.
        lr: The learning rate.
        output_ratio: The learning rate of what began as zeros, in units of ``lr``.
        private_paths: Whether the folder's path is written as a whole; else as it is seen from the working directory.

    Raises:
        CheckpointError: the output's manifest is missing or damaged.
        TrainingError: the trainer cannot express this, or a value is missing or out of range.
    """
    from ..training.export import export
    from ..training.export_optimizers import settings_of

    settings = settings_of(optimizer, lr, output_ratio)
    return export(local_path_of(out, "out"), trainer, settings, private_paths=private_paths)
