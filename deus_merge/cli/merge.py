"""``merge``, ``plan`` and ``upscale``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import yaml

from .. import api
from ..checkpoint.system import keep_freed_memory
from ..core.garbage import collector_paused
from ..core.text import plural
from ..core.urls import place_name
from ..core.yaml_text import parse
from ..plan.training_memory import TrainingSettings
from ..plan.types import Plan
from ..recipe.types import Recipe
from ..recipe.writer import absolute_path, dump_recipe
from ..report.block_times import in_words
from ..report.shareable import shared_path
from .completion import (
    complete_dtypes,
    complete_inserts,
    complete_models,
    complete_presets,
    complete_recipes,
)
from .failures import report_bus_errors
from .next_steps import show_next
from .options import (
    OutputPlace,
    ShareNumber,
    Size,
    mixed_machines,
    plan_options,
    private_paths_option,
    run_options,
    training_options,
)
from .output import emit_json, note, quiet_transformers, warn
from .plan_view import fit_text, show_plan, show_share
from .progress import block_progress
from .recipes import load_recipe, recipe_options


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path), shell_complete=complete_recipes)
@click.argument("out", type=OutputPlace(exists=False))
@recipe_options
@click.option("--shard-of", type=ShareNumber(), metavar="K/N",
              help="Make the Kth of N shares of the output, next to it; finish puts it together.")  # fmt: skip
@mixed_machines
@run_options
def merge(recipe: Path, out: Path, models: tuple[str, ...], settings: tuple[str, ...], **options):
    """Run RECIPE and write the checkpoint to OUT.

    RECIPE is a file, - for stdin, or a name that `deus-merge recipes` lists. OUT is a folder, or in a bucket:
    s3://bucket/model, gs://bucket/model, az://container/model.

    With --shard-of any number of machines that share a file system, or a bucket, make an output together.

    \b
    Example:
      deus-merge merge opt_deus ./deeper --model ./SmolLM2-135M --device cuda
    """
    _run(load_recipe(recipe, models, settings, options["quiet"] or options["as_json"]), out, **options)


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path), shell_complete=complete_recipes)
@click.argument("out", type=OutputPlace(exists=False))
@recipe_options
@mixed_machines
@run_options
def finish(recipe: Path, out: Path, models: tuple[str, ...], settings: tuple[str, ...], **options):
    """Put OUT together from the pieces that workers have made with `merge RECIPE OUT --shard-of K/N`.

    All pieces are checked, and the result is verified. Takes the options that the workers had.

    \b
    Example:
      deus-merge merge opt_deus ./deeper --model ./SmolLM2-135M --shard-of 1/2
      deus-merge merge opt_deus ./deeper --model ./SmolLM2-135M --shard-of 2/2
      deus-merge finish opt_deus ./deeper --model ./SmolLM2-135M
    """
    _run(load_recipe(recipe, models, settings, options["quiet"] or options["as_json"]), out, finishing=True, **options)


@click.command()
@click.argument("model", shell_complete=complete_models)
@click.argument("out", type=OutputPlace(exists=False))
@click.option("--preset", default="opt_deus", show_default=True, help="The kind of new layers: deus-merge methods.",
              shell_complete=complete_presets)  # fmt: skip
@click.option("--insert", help="Their places: even, top_half, all, '{every: 4}', '{count: 8, where: even}' ...",
              shell_complete=complete_inserts)  # fmt: skip
@click.option("--param", "-p", "params", multiple=True, metavar="NAME=VALUE", help="A parameter of the method.")
@click.option("--dtype", help="The output's dtype: bfloat16, float16, float32; by default the model's.",
              shell_complete=complete_dtypes)  # fmt: skip
@click.option("--quantize-new", is_flag=True, help="Write new layers in the format of a quantised MODEL.")
@click.option("--fit", type=Size(), metavar="SIZE",
              help="Put in as many layers as can be trained with this much memory, e.g. 24GB.")  # fmt: skip
@click.option(
    "--calibrate",
    metavar="FILE",
    help="Set the zeroed outputs of new layers from this text, as calibrate does; or '{text: FILE, tokens: 4096}'.",
)
@training_options
@run_options
def upscale(
    model: str,
    out: Path,
    preset: str,
    insert: str | None,
    params: tuple[str, ...],
    dtype: str | None,
    quantize_new: bool,
    fit: int | None,
    calibrate: str | None,
    **options,
):
    """Make MODEL (a folder or org/name[@revision]) deeper and write it to OUT, a folder or s3://bucket/model.

    Copies with zeroed outputs (llama_pro, copy_next) learn as fast as opt_deus in our measurements; deus-merge compare
    measures it on your model and text.

    With --fit the new layers are spread evenly, half as many as MODEL has at most; where not one fits so, they are put
    in from the top down. With --insert too, it is only checked that they fit. An error says what would have to change.

    \b
    Example:
      deus-merge upscale ./SmolLM2-135M ./SmolLM2-45-layers --preset opt_deus --insert even
    """
    parameters = {}
    for item in params:
        name, _, value = item.partition("=")
        if not name or not value.strip():
            raise click.BadParameter(f"{item!r} is not NAME=VALUE", param_hint="--param")
        if name in parameters:
            raise click.BadParameter(f"{name!r} is given twice", param_hint="--param")
        parameters[name] = parse(value, f"--param {name}").plain()
    where = parse(insert, "--insert").plain() if insert is not None else None
    settings: dict[str, Any] = {"preset": preset, "dtype": dtype, "parameters": parameters}
    settings["quantize_new"] = quantize_new
    fitted = None
    section: Any = calibrate
    if calibrate is not None and calibrate.lstrip().startswith("{"):
        section = parse(calibrate, "--calibrate").plain()
    if fit is not None:
        load = api.LoadOptions(**{name: options[name] for name in _LOAD_OPTIONS})
        fitted = api.fit(model, fit, options["training"], insert=where, load_options=load, **settings)
        where = fitted.insert
    recipe = api.upscale_recipe(model, insert=where, calibrate=section, **settings)
    _run(recipe, out, fitted=fitted, **options)


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path), shell_complete=complete_recipes)
@recipe_options
@plan_options
@click.option("--expand", is_flag=True, help="Print the recipe with presets expanded to slices.")
@private_paths_option
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON on stdout.")
@training_options
@collector_paused()
def plan(
    recipe: Path,
    models: tuple[str, ...],
    settings: tuple[str, ...],
    expand: bool,
    private_paths: bool,
    as_json: bool,
    training: TrainingSettings,
    **options,
):
    """Show the plan of RECIPE: layer map, bytes, memory, time, memory for training, warnings. Reads no tensor.

    RECIPE is a file, - for stdin, or a name that `deus-merge recipes` lists.

    \b
    Example:
      deus-merge plan opt_deus --model ./SmolLM2-135M --set upscale.insert=all
    """
    result = _plan(load_recipe(recipe, models, settings), **options)
    if expand:
        place = absolute_path if private_paths else lambda path: shared_path(path, Path.cwd())
        text = dump_recipe(result.recipe, place)
        documents = list(yaml.safe_load_all(text)) if as_json else []
        emit_json(documents if len(documents) > 1 else documents[0]) if as_json else click.echo(text, nl=False)
    elif as_json:
        emit_json(result.describe(training))
    else:
        show_plan(result, training)
    warn(result.warnings)


_LOAD_OPTIONS = ("allow_pickle", "cache_dir", "stream", "cache_size")


def _plan(recipe: Recipe, **options) -> Plan:
    load = api.LoadOptions(**{name: options.pop(name) for name in _LOAD_OPTIONS})
    return api.plan(recipe, load_options=load, **options)


def _run(
    recipe: Recipe, out: Path, *, device, cuda, gpu_rich, max_shard_size, out_shard_size, copy_tokenizer, allow_pickle,
    cache_dir, dry_run, quiet, as_json, verify_output, training: TrainingSettings | None = None,
    fitted: api.Fit | None = None, shard_of: tuple[int, int] | None = None, mixed_machines: bool = False,
    finishing: bool = False, stream: bool = False, cache_size: int, **options,
):  # fmt: skip
    if device is None:  # as in mergekit, --device takes precedence over --cuda
        device = "cuda" if cuda or gpu_rich else "auto" if cuda is None else "cpu"
    report_bus_errors()
    run = api.RunOptions(verify=verify_output, device=device, **options)
    planned = _plan(
        recipe,
        max_shard_size=out_shard_size or max_shard_size,
        copy_tokenizer=copy_tokenizer,
        allow_pickle=allow_pickle,
        cache_dir=cache_dir,
        stream=stream,
        cache_size=cache_size,
    )
    if planned.calibration:
        quiet_transformers()
    if dry_run:
        how = {"finishing": finishing, "sharing": shard_of is not None, "mixed_machines": mixed_machines}
        warnings = api.preflight(planned, out, run, **how)
        if as_json:
            emit_json(planned.describe(training) | ({"fit": fitted.describe()} if fitted else {}))
        else:
            show_plan(planned, training)
            if fitted:
                click.echo(fit_text(fitted))
        warn(planned.warnings + warnings)
        note("checked, nothing written", quiet)
        return
    if fitted:
        note(fit_text(fitted), quiet)
    keep_freed_memory()
    by = "workers" if finishing else "the earlier run"
    with block_progress(planned, quiet, shard_of, by, as_json=as_json) as shown:
        blocks: Any = {"on_block": shown.on_block, "on_fraction": shown.on_fraction, "on_event": shown.on_event}
        if shard_of:
            share = api.make_share(planned, out, *shard_of, run, mixed_machines=mixed_machines, **blocks)
        elif finishing:
            reports: Any = {"on_block": shown.on_block, "on_layer": shown.on_layer}
            result = api.finish(planned, out, run, mixed_machines=mixed_machines, **reports)
        else:
            result = api.merge(planned, out, run, on_layer=shown.on_layer, **blocks)
    if shard_of:
        show_share(share, out, quiet, as_json)
        return
    warn(result.warnings)
    if as_json:
        emit_json(result.describe())
    elif not quiet:
        depth = planned.donor.view.num_layers
        passed = result.verification and plural(len(result.verification.checks), "check")
        checked = f"{passed} passed" if passed else "not verified"
        if record := result.calibration:
            note(
                f"calibrated: loss {record.loss_before:.4f} -> {record.loss_after:.4f} on"
                f" {plural(record.held_out_tokens, 'token')} that chose the steps;"
                f" fitted on {plural(record.tokens, 'token')}"
            )
        note(
            f"{place_name(out)}: {depth} -> {plural(planned.num_layers, 'layer')} in {result.seconds:.1f} s, {checked}"
        )
        if times := in_words(result.times):
            note(times)
        show_next(out, new_layers=bool(planned.new_layers))
