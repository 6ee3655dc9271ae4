"""``merge``, ``plan`` and ``upscale``."""

from __future__ import annotations

import functools
from pathlib import Path

import click
import yaml

from .. import api
from ..checkpoint.system import keep_freed_memory
from ..errors import DeusMergeError
from ..located import parse
from ..recipe import Recipe, read_recipe
from ..recipe_yaml import dump_recipe
from ..units import parse_size
from .output import emit_json, progress, say, show_plan, warn


class Size(click.ParamType):
    """``8GiB``, ``5GB``, or bytes."""

    name = "size"

    def convert(self, value, param, ctx):
        try:
            return parse_size(value)
        except DeusMergeError as error:
            self.fail(f"{value!r} is not a size: expected {error.expected}", param, ctx)


def _no_op(name: str):
    """A spelling of mergekit's that asks for what is always done here."""
    return click.option(name, is_flag=True, hidden=True, expose_value=False)


def run_options(command):
    """The options of every command that writes a checkpoint."""
    options = [
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
        click.option("--cuda", is_flag=True, hidden=True, help="Same as --device cuda."),
        click.option("--max-memory", type=Size(), help="Refuse to start if more memory would be needed, e.g. 8GiB."),
        click.option(
            "--max-shard-size", "--out-shard-size", type=Size(), default="5GB", show_default=True,
            help="Largest output file.",
        ),
        click.option("--dry-run", is_flag=True, help="Do all checks and stop before writing."),
        click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped."),
        click.option("--overwrite", is_flag=True, help="Replace OUT once the new one is whole."),
        click.option("--verify/--no-verify", "verify_output", default=True, show_default=True,
                     help="Check the result before it gets its name."),
        click.option("--seed", "--random-seed", type=int, default=0, show_default=True,
                     help="For methods that draw random numbers."),
        click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads for arithmetic."),
        click.option("--quiet", "-q", is_flag=True, help="Say nothing but errors and warnings."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
        *map(_no_op, ("--lazy-unpickle", "--copy-tokenizer", "--trust-remote-code", "--low-cpu-memory",
                      "--safe-serialization", "--read-to-gpu", "--write-model-card", "--clone-tensors")),
    ]  # fmt: skip
    return functools.reduce(lambda inner, option: option(inner), reversed(options), command)


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@run_options
def merge(recipe: Path, out: Path, **options):
    """Run RECIPE and write the checkpoint to OUT.

    \b
    Example:
      deus-merge merge recipes/opt_deus.yml ./deeper --device cuda
    """
    _run(read_recipe(recipe), out, **options)


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--preset", default="opt_deus", show_default=True, help="How new layers are made: deus-merge methods.")
@click.option("--insert", help="Where: top_half, all, bottom_half, '{every: 4}', '{count: 8, where: even}' ...")
@click.option("--param", "-p", "params", multiple=True, metavar="NAME=VALUE", help="A parameter of the method.")
@click.option("--dtype", help="Of the output: bfloat16, float16, float32; the model's own by default.")
@run_options
def upscale(
    model: str, out: Path, preset: str, insert: str | None, params: tuple[str, ...], dtype: str | None, **options
):
    """Make MODEL (a folder or org/name[@revision]) deeper and write it to OUT.

    \b
    Example:
      deus-merge upscale ./SmolLM2-135M ./SmolLM2-45-layers --preset opt_deus --insert top_half
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
    recipe = api.upscale_recipe(model, preset=preset, insert=where, dtype=dtype, parameters=parameters)
    _run(recipe, out, **options)


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Largest output file.")
@click.option("--expand", is_flag=True, help="Print the recipe with presets spelled out as slices.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON on stdout.")
def plan(recipe: Path, max_shard_size: int, expand: bool, as_json: bool):
    """Show what RECIPE would do: layer map, bytes, memory, time, warnings. Reads no tensor.

    \b
    Example:
      deus-merge plan recipes/opt_deus.yml --expand
    """
    result = api.plan(recipe, max_shard_size=max_shard_size)
    if expand and as_json:
        emit_json(yaml.safe_load(dump_recipe(result.recipe)))
    elif expand:
        click.echo(dump_recipe(result.recipe), nl=False)
    elif as_json:
        emit_json(result.describe())
    else:
        show_plan(result)
    warn(result.warnings)


def _run(recipe: Recipe, out: Path, *, cuda, max_shard_size, dry_run, quiet, as_json, verify_output, **options):
    if cuda:
        options["device"] = "cuda"
    run = api.RunOptions(verify=verify_output, **options)
    whole = api.plan(recipe, max_shard_size=max_shard_size)
    if dry_run:
        from ..execute import preflight

        preflight(whole, out, run)
        emit_json(whole.describe()) if as_json else show_plan(whole)
        warn(whole.warnings)
        return
    keep_freed_memory()
    with progress(whole, quiet) as on_block:
        result = api.merge(whole, out, run, on_block=on_block)
    warn(result.warnings)
    if as_json:
        emit_json(result.describe())
    elif not quiet:
        depth = whole.models[whole.donor].view.num_layers
        checked = f"{len(result.verification.checks)} checks passed" if result.verification else "not verified"
        say(f"{out}: {depth} -> {whole.num_layers} layers in {result.seconds:.1f} s, {checked}")
