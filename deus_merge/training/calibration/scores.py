"""How much a new layer in each gap of a model could learn from a text: expansion scores, without growing it.

A new layer that adds nothing, with the weights of the layer above the gap, reads the hidden states of the gap. Its
writers read phi; g is the negative gradient of the loss with respect to the hidden states. One forward and one backward
pass over the text give all gaps (`fit.Statistics.score`), one layer in memory at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ...checkpoint.storage import LoadOptions
from ...core.errors import TrainingError
from ...models.built import CannotBuild
from ...models.reference import ModelRef
from ...models.source import SourceModel
from ...models.streamed import CannotStream
from ...models.view import ModelView
from ...run.device import choose_device, set_threads, threads_kept
from .fit import Statistics
from .job import refusal
from .layer_runner import LayerRunner
from .memory import check_disk, check_memory, estimate
from .options import CalibrationOptions, Windows, read_windows
from .passes import Passes, States
from .steps import add_batch, read_by
from .writers import Writer, Writers, residual_writers


@dataclass(frozen=True)
class GapScore:
    """The score of a gap.

    Attributes:
        after: The layer below the gap: ``insert: {after: [N]}`` puts a new layer there.
        score: tr(S^-1 B A^-1 B^T) / d, damped: 0 to 1.
        gradient: The root mean square of g, per token, in nats: how much the loss depends on the hidden states there.
    """

    after: int
    score: float
    gradient: float

    def describe(self) -> dict[str, float]:
        """As JSON data."""
        return asdict(self)


@threads_kept()
def score_gaps(
    model: str | Path,
    text: str,
    options: CalibrationOptions | None = None,
    load_options: LoadOptions | None = None,
    on_gap: Callable[[GapScore, int], None] | None = None,
) -> tuple[GapScore, ...]:
    """Score every gap between two layers of a model on a text.

    Args:
        model: A folder or ``org/name[@revision]``.
        text: The text. All of its windows are used, so ``held_out`` and ``seed`` have no effect.
        options: Tokens, length, damping, batch, device, memory, threads.
        load_options: Whether pickled weights may be read, and where downloads are stored.
        on_gap: Called after each gap, from the highest to the lowest, with how many there are.

    Returns:
        The scores, from the lowest gap to the highest.

    Raises:
        DeusMergeError: the model or the text cannot be used, too little memory or disk.
    """
    options = options or CalibrationOptions()
    options.check()
    options = replace(options, method="kfac")
    source = SourceModel.open(ModelRef.of(str(model)), {}, load_options)
    view, tensors = source.view, source.checkpoint
    if not tensors.folders:
        hint = "download it and name the folder"
        raise TrainingError("gaps are scored only of models on this machine", where=tensors.where, hint=hint)
    device = choose_device(options.device)
    set_threads(options.threads)
    try:
        runner = LayerRunner(tensors, view, device)
    except (CannotBuild, CannotStream) as error:
        raise refusal(view, model, str(error)) from None
    if view.num_layers < 2:
        raise TrainingError("the model has no gap between layers", where=model, got=f"{view.num_layers} layers")
    writers = Writers()
    for layer in range(1, view.num_layers):
        writers.add(layer, residual_writers(view, layer), view, tensors, runner)
    if len(writers.layers) < view.num_layers - 1:
        reasons = "; ".join(writers.notes) or "no described writers"
        raise TrainingError(f"the gaps of {view.model_type!r} cannot be scored", where=model, got=reasons)
    found = read_windows(tensors.folders[0], text, options, runner.vocabulary, model=model)
    windows = Windows(found.ids, len(found.ids), found.text_sha256)
    columns = max(sum(writer.columns for writer in layer) for layer in writers.layers.values())
    needs = estimate(view, tensors.tensors, tensors.config, options, columns, (windows.fitted, 0))
    check_memory(needs, options.max_memory, str(device))
    scores: list[GapScore] = []
    with tempfile.TemporaryDirectory(prefix="deus_merge-") as folder:
        check_disk(needs, Path(folder) / "hidden", 0)
        try:
            passes = Passes(runner, windows, Path(folder) / "hidden", options.batch, device)
        except CannotStream as error:
            raise refusal(view, model, str(error)) from None
        passes.advance(1)  # below the first layer there is no gap
        with closing(passes.backward(range(1, runner.depth))) as steps:
            for layer, hidden, gradients, _ in steps:
                if layer is not None:
                    score = _scored(passes, view, layer, writers.layers[layer], hidden, gradients, options.damping)
                    scores.append(score)
                    if on_gap is not None:
                        on_gap(score, runner.depth - 1)
        passes.close()
    return tuple(reversed(scores))


def _scored(
    passes: Passes,
    view: ModelView,
    layer: int,
    writers: tuple[Writer, ...],
    hidden: States,
    gradients: States,
    damping: float,
) -> GapScore:
    """The score of the gap below a layer.

    Args:
        passes: The windows.
        view: The model by layer and role.
        layer: The layer above the gap.
        writers: Its writers.
        hidden: The hidden states in the gap, (w, t, d).
        gradients: Of the loss with respect to these, (w, t, d).
        damping: As in the closed form.
    """
    import torch

    runner, total = passes.runner, 0.0
    columns = sum(writer.columns for writer in writers)
    device = hidden.read(0, 1).device
    found = Statistics(columns, runner.width, with_gradients=True, device=device)
    with runner.layers[layer].held(), torch.no_grad(), read_by(runner, writers) as read:
        for name in residual_writers(view, layer):  # a new layer adds nothing: its MLP reads what its attention reads
            module, _, leaf = name.rpartition(".")
            owner = runner.module(module)
            setattr(owner, leaf, torch.nn.Parameter(torch.zeros_like(getattr(owner, leaf)), requires_grad=False))
        for start, stop in passes.fitted:
            g = gradients.read(start, stop)  # (b, t, d)
            total += float(g.double().square().sum())
            add_batch(found, runner, layer, hidden.read(start, stop), g, read)
    found.check(layer)
    tokens = found.tokens
    return GapScore(layer - 1, found.score(damping, layer), (total / tokens) ** 0.5)
