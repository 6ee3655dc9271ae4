"""Outputs that workers on several machines make, piece by piece."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ..plan.blocks import BlockPlan
from ..plan.types import Plan
from ..report.manifest_parts import CalibratedLayer
from ..run import pieces as run
from ..run.events import OnEvent, unheard
from ..run.executor import Outcome
from ..run.piece_job import OnBlock
from ..run.preflight import Calibrator, RunOptions
from .arguments import instance, path_of
from .merging import AnyRecipe, carry_out, plan
from .progress import OnProgress
from .results import MergeResult


def make_share(
    recipe: Plan | AnyRecipe,
    out: str | Path,
    number: int,
    total: int,
    options: RunOptions | None = None,
    *,
    mixed_machines: bool = False,
    on_block: OnBlock = lambda block, resumed: None,
    on_fraction: Callable[[BlockPlan, float], None] | None = None,
    on_event: OnEvent = unheard,
) -> run.Share:
    """Make one share of the pieces of an output, in a folder next to it; `finish` puts the output together.

    Any process that reaches the sources and this folder can make any share, at the same time as others, and as often as
    it likes: finished pieces are not made again. A piece is one file, or the files of one block, so a smaller
    ``max_shard_size`` in `plan` makes more pieces.

    Args:
        recipe: A plan from `plan`, or whatever `plan` takes.
        out: The output folder.
        number: Which share, from 1.
        total: How many shares there are.
        options: Device, threads, seed, memory; overwrite, if `finish` will replace a folder.
        mixed_machines: Go on where finished pieces come from machines that round differently.
        on_block: Called after each block with the block and whether it was finished already.
        on_fraction: Called within blocks, as for `merge`.
        on_event: Called with what happens to pieces, blocks and workers, as JSON data.

    Returns:
        What was made, and how much of the output is left.

    Raises:
        DeusMergeError: the run is impossible, or finished pieces are of another run. Finished pieces are kept.
    """
    return run.make_share(
        recipe if isinstance(recipe, Plan) else plan(recipe),
        path_of(out, "out"),
        instance(options, RunOptions, "options"),
        number,
        total,
        mixed_machines=mixed_machines,
        on_block=on_block,
        on_fraction=on_fraction,
        on_event=on_event,
    )


def finish(
    recipe: Plan | AnyRecipe,
    out: str | Path,
    options: RunOptions | None = None,
    *,
    mixed_machines: bool = False,
    on_block: OnBlock | None = None,
    on_layer: Callable[[CalibratedLayer, bool], None] | None = None,
    progress: OnProgress | None = None,
) -> MergeResult:
    """Put an output together whose pieces are finished: check them, add all other files, verify.

    Args:
        recipe: The plan or recipe that the workers had.
        out: The output folder.
        options: Overwrite, verification, model card.
        mixed_machines: Accept pieces from machines that round differently.
        on_block, on_layer, progress: As for `merge`.

    Returns:
        The finished run, as `merge` does.

    Raises:
        PlanError: pieces are missing, or do not belong together.
        DeusMergeError: as `merge`.
    """
    started, target = time.monotonic(), path_of(out, "out")
    options = instance(options, RunOptions, "options")
    recipe = recipe if isinstance(recipe, Plan) else plan(recipe)

    def put_together(block_finished: OnBlock, calibrator: Calibrator | None) -> Outcome:
        return run.finish(recipe, target, options, block_finished, calibrator, mixed_machines=mixed_machines)

    return carry_out(put_together, recipe, target, options, started, on_block, on_layer, progress)
