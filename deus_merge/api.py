"""What the command line and notebooks call: recipes in, checkpoints out.

::

    from deus_merge import api

    recipe = api.upscale_recipe("demo/SmolLM2-135M-Instruct", preset="opt_deus", insert="top_half")
    print(api.plan(recipe).describe()["new_layers"])
    api.merge(recipe, "deeper")
    api.verify("deeper", check=True)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .checkpoint.header import read_small
from .checkpoint.storage import PLAIN, Access
from .core.errors import DeusMergeError, VerifyError
from .core.located import locate
from .plan.blocks import BlockPlan
from .plan.build import DEFAULT_SHARD_SIZE, build_plan
from .plan.types import Plan
from .recipe.reader import read_recipe, recipe_from
from .recipe.types import Recipe
from .report.manifest import RECIPE, read_manifest
from .run.executor import execute
from .run.preflight import RunOptions
from .run.strip import Stripped
from .verify import Verification

__all__ = [
    "Access",
    "MergeResult",
    "RunOptions",
    "Stripped",
    "export_training",
    "merge",
    "plan",
    "report",
    "strip",
    "upscale_recipe",
    "verify",
]


@dataclass(frozen=True)
class MergeResult:
    """A finished run.

    Attributes:
        folder: The output.
        plan: What was done.
        verification: None when it was switched off.
        warnings: The plan's, and the run's (plans that did not converge).
        seconds: Wall time.
    """

    folder: Path
    plan: Plan = field(repr=False)
    verification: Verification | None
    warnings: tuple[str, ...]
    seconds: float

    def describe(self) -> dict:
        """As JSON data."""
        return {
            "folder": str(self.folder),
            "plan_hash": self.plan.hash,
            "num_layers": self.plan.num_layers,
            "new_layers": list(self.plan.new_layers),
            "function_preserving": self.plan.function_preserving,
            "bytes_written": self.plan.bytes_written,
            "seconds": round(self.seconds, 3),
            "verification": self.verification and self.verification.describe(),
            "warnings": list(self.warnings),
        }


def plan(
    recipe: Recipe | str | Path,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    access: Access = PLAIN,
    copy_tokenizer: bool = True,
) -> Plan:
    """The plan of a recipe (or of the file it stands in). Reads configs and headers, no tensor.

    Args:
        recipe: A recipe or its file.
        max_shard_size: Upper bound of an output file.
        access: Whether pickled weights may be read, and where downloads are kept.
        copy_tokenizer: Put the tokenizer into the output.

    Raises:
        DeusMergeError: whatever is wrong with the recipe or its models.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe)
    return build_plan(recipe, max_shard_size=max_shard_size, access=access, copy_tokenizer=copy_tokenizer)


def merge(
    recipe: Recipe | Plan | str | Path,
    out: str | Path,
    options: RunOptions | None = None,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    access: Access = PLAIN,
    copy_tokenizer: bool = True,
    on_block: Callable[[BlockPlan, bool], None] | None = None,
) -> MergeResult:
    """Run a recipe and write the checkpoint.

    Args:
        recipe: A recipe, its file, or a plan made before.
        out: The output folder.
        options: Device, resume, overwrite, verification.
        max_shard_size, access, copy_tokenizer: As of `plan`; a plan made before has its own.
        on_block: Called after each block with the block and whether it was there from an earlier run.

    Raises:
        DeusMergeError: before anything is written, or VerifyError, with the output left unrenamed.
    """
    started = time.monotonic()
    how = {"max_shard_size": max_shard_size, "access": access, "copy_tokenizer": copy_tokenizer}
    whole = recipe if isinstance(recipe, Plan) else plan(recipe, **how)
    verification, warnings = execute(
        whole, Path(out), options or RunOptions(), on_block or (lambda block, resumed: None)
    )
    return MergeResult(Path(out), whole, verification, warnings, time.monotonic() - started)


def upscale_recipe(
    model: str | Path,
    *,
    preset: str = "opt_deus",
    insert: object = None,
    dtype: str | None = None,
    parameters: Mapping[str, object] | None = None,
) -> Recipe:
    """The recipe that `deus-merge upscale` runs.

    Args:
        model: A folder or ``org/name[@revision]``.
        preset: A name in `presets.PRESETS`.
        insert: As in a recipe: ``"top_half"``, ``{"every": 4}`` ...; None for the preset's own.
        dtype: Of the output; None keeps the model's.
        parameters: Of the preset's method, on top of the preset's own.

    Raises:
        RecipeError: as for a recipe file.
    """
    section: dict[str, object] = {"preset": preset}
    if insert is not None:
        section["insert"] = insert
    if parameters:
        section["parameters"] = dict(parameters)
    data: dict[str, object] = {"base_model": str(model)}
    if dtype:
        data["dtype"] = dtype
    return recipe_from(locate(data | {"upscale": section}))


def verify(
    out: str | Path, *, quick: bool = False, logits_text: str | None = None, strict: bool = False, check: bool = False
) -> Verification:
    """Check a finished output; see `deus_merge.verify.verify`.

    Raises:
        VerifyError: with ``check``, when something failed.
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
        verification: What the page shows as verified; by default a quick verification, made now.

    Returns:
        The page's file.

    Raises:
        DeusMergeError: there is no manifest, it is damaged, or the page cannot be written.
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


def export_training(out: str | Path, trainer: str) -> str:
    """Settings of another trainer that train an output's new layers and nothing else.

    Args:
        out: An output folder.
        trainer: A name in `training.export.TRAINERS`.

    Raises:
        CheckpointError, TrainingError: as `training.export.export`: above all, the trainer cannot be told so.
    """
    from .training.export import export

    return export(out, trainer)


def strip(
    out: str | Path,
    base: str | Path,
    *,
    manifest: str | Path | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> Stripped:
    """Take the new layers out again; see `deus_merge.run.strip.strip`.

    Raises:
        DeusMergeError: as there.
    """
    from .run.strip import strip as run

    return run(out, base, manifest=manifest, max_shard_size=max_shard_size, overwrite=overwrite)
