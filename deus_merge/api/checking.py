"""What a model or an output is: verify, report, inspect, and the catalogue of methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ..checkpoint.header import read_small
from ..checkpoint.storage import LoadOptions
from ..core.errors import DeusMergeError, VerifyError
from ..plan.training_memory import TrainingSettings
from ..recipe.catalog import catalog, entries_of
from ..report.inspection import adjacent_similarity, parameter_counts, summary
from ..report.manifest import RECIPE, read_manifest
from ..report.shareable import shared_record
from ..verify import Check, Verification
from ..verify import verify as run_checks
from .arguments import instance, model_of, name_of, path_of, text_of
from .progress import Counter, OnProgress
from .results import Catalog, Inspection


def verify(
    out: str | Path,
    *,
    quick: bool = False,
    logits_text: str | Path | None = None,
    strict: bool = False,
    sources: Mapping[str, str | Path] | None = None,
    check: bool = False,
    on_begin: Callable[[str], None] | None = None,
    progress: OnProgress | None = None,
) -> Verification:
    """Check a finished output.

    Args:
        out: The output folder.
        quick: Leave out finite values and the checks that need transformers.
        logits_text: Also compare the logits of base and output on this text, or on that of the file of a `Path`.
        strict: Count a skipped check as failed.
        sources: Folders, or addresses like ``s3://bucket/model``, of sources that the manifest does not name, or that
            have moved, by their names there.
        check: Whether a failed check raises an error.
        on_begin: Called with the name of each check before it runs.
        progress: Called after each check, with how many there are.

    Returns:
        The result of every check.

    Raises:
        VerifyError: a check failed, with ``check``.
        PlanError: ``sources`` names a model that is no source.
    """
    text = None if logits_text is None else text_of(logits_text, "logits_text")
    folder, counter = path_of(out, "out"), Counter(progress)

    def finished(result: Check, total: int) -> None:
        counter.step(result.name, total=total)

    result = run_checks(
        folder, quick=quick, logits_text=text, strict=strict, places=sources, on_check=finished, on_begin=on_begin
    )
    if check and not result.passed:
        failed = result.failed[0]
        raise VerifyError(f"{failed.name}: {failed.detail}", where=folder)
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
    from ..report.page import REPORT, render_page

    out = path_of(out, "out")
    page = path_of(html, "html") if html is not None else out / REPORT
    manifest = read_manifest(out)
    recipe = read_small(out / RECIPE).decode(errors="replace") if (out / RECIPE).is_file() else ""
    found = (verification or verify(out, quick=True)).describe()
    record = shared_record({"recipe": recipe, **found}, manifest, out)
    facts = {"folder": out.absolute().name, "parameters": parameter_counts(out, manifest.new_layers)}
    text = render_page(manifest, record.pop("recipe"), record, **facts)
    try:
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DeusMergeError("the page cannot be written", where=page, got=error.strerror) from None
    return page


def inspect(
    model: str | Path,
    *,
    similarity: bool = False,
    training: TrainingSettings | None = None,
    load_options: LoadOptions | None = None,
    progress: OnProgress | None = None,
) -> Inspection:
    """Facts about a model: family, layers, heads, sizes, the memory that training its new layers takes.

    Args:
        model: A folder or ``org/name[@revision]``.
        similarity: Also compare each pair of neighbouring layers, before and after an alignment. Reads all weights.
        training: How new layers are trained, for the estimate of memory; None for the defaults.
        load_options: As for `plan`.
        progress: Called after each pair of layers, with how many there are.

    Returns:
        The facts by name.

    Raises:
        DeusMergeError: the model cannot be read, or its family is not described and ``similarity`` is wanted.
    """
    name, options = model_of(model), instance(load_options, LoadOptions, "load_options")
    facts = summary(name, options, instance(training, TrainingSettings, "training"))
    if similarity:
        counter, rows = Counter(progress, facts["layers"] - 1), []
        for row in adjacent_similarity(name, options):
            rows.append(row)
            counter.step("layers {} and {}".format(*row["layers"]))
        facts["similarity"] = rows
    return Inspection(facts)


def methods(name: str | None = None) -> Catalog:
    """Merge methods, alignments, solvers, families, formats of quantised weights and presets.

    Args:
        name: Only what has this name, which may be a model_type; None for everything.

    Returns:
        Kind -> name -> ``summary``, ``reference``, ``parameters`` ...

    Raises:
        DeusMergeError: nothing has this name.
    """
    return Catalog(catalog() if name is None else entries_of(name_of(name)))
