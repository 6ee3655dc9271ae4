"""Options that several commands share, and their types."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ..api.arguments import path_of
from ..checkpoint.storage import DEFAULT_CACHE_SIZE
from ..core.errors import DeusMergeError
from ..core.units import parse_size
from ..core.urls import address_of
from ..plan.training_memory import BASES, OPTIMIZERS, TrainingSettings
from . import mergekit_options as mergekit
from .completion import complete_devices


class Size(click.ParamType):
    """A size: ``8GiB``, ``5GB``, or a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value)
        except DeusMergeError as error:
            self.fail(f"{value!r} is not a size: expected {error.expected}", param, ctx)


class OutputPlace(click.Path):
    """A folder of this machine, or the address of an output in a bucket.

    Args:
        exists: Whether the folder must exist.
    """

    def __init__(self, *, exists: bool = True) -> None:
        super().__init__(path_type=Path, exists=exists, file_okay=not exists)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = path_of(value, "OUT")
        return path if address_of(path) else super().convert(value, param, ctx)


class ShareNumber(click.ParamType):
    """``3/8``: the third of eight shares."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", str(value))
        number, total = map(int, match.groups()) if match else (0, 0)
        if not 1 <= number <= total:
            self.fail(f"{value!r} is not a share: expected K/N with K from 1 to N, like 3/8", param, ctx)
        return number, total


class Workers(click.ParamType):
    """A number of processes, or the address of a Ray cluster."""

    name = "workers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        text = str(value)
        if text.startswith("ray://") or (text.isdecimal() and 1 <= int(text) <= 1024):
            return text if text.startswith("ray://") else int(text)
        return self.fail(f"{value!r} is neither a number from 1 to 1024 nor ray://HOST:PORT", param, ctx)


mixed_machines = click.option(
    "--mixed-machines", is_flag=True, help="Put pieces together that were computed on machines which round differently."
)


def _all(options: Sequence[mergekit.Decorator]) -> mergekit.Decorator:
    """Several options as one decorator."""
    return lambda command: functools.reduce(lambda inner, option: option(inner), reversed(options), command)


plan_options = _all([
    click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Largest output file."),
    click.option("--copy-tokenizer/--no-copy-tokenizer", default=True, show_default=True,
                 help="Copy the tokenizer into the output."),
    click.option("--allow-pickle", is_flag=True, help="Also read .bin and .pt weights: their tensors, nothing is run."),
    click.option("--cache-dir", "--transformers-cache", type=click.Path(path_type=Path, file_okay=False),
                 help="The folder for models of the hub, and for what is read of models by range."),
    click.option("--stream", is_flag=True, help="Read models of the hub by range, without a local copy."),
    click.option("--cache-size", type=Size(), default=DEFAULT_CACHE_SIZE, show_default=True,
                 help="The most that is on the disk at once of models read by range."),
])  # fmt: skip


private_paths_option = click.option(
    "--private-paths", is_flag=True, help="Write absolute paths of this machine: not for sharing."
)

_training_options = [
    click.option("--batch", type=click.IntRange(1), default=1, show_default=True,
                 help="Training: sequences in a forward pass."),
    click.option("--length", type=click.IntRange(1), default=2048, show_default=True,
                 help="Training: tokens of a sequence."),
    click.option("--optimizer", type=click.Choice(list(OPTIMIZERS)), default="adamw", show_default=True,
                 help="Training: the optimizer."),
    click.option("--checkpointing/--no-checkpointing", default=False, show_default=True,
                 help="Training: compute layers anew in the backward pass."),
    click.option("--accumulate/--no-accumulate", default=False, show_default=True,
                 help="Training: add up the gradients of several batches."),
    click.option("--base-dtype", "base", type=click.Choice(list(BASES)), default="bfloat16", show_default=True,
                 help="Training: the dtype of the frozen base; what is stored quantised stays so."),
]  # fmt: skip


def training_options(command: Callable) -> Callable:
    """Add the options about how new layers will be trained, which the command gets as one value, ``training``."""

    @functools.wraps(command)
    def with_settings(*args, **options):
        fields = {field.name: options.pop(field.name) for field in dataclasses.fields(TrainingSettings)}
        return command(*args, training=TrainingSettings(**fields), **options)

    return _all(_training_options)(with_settings)


def run_options(command: Callable) -> Callable:
    """Add the options of every command that writes a checkpoint."""
    options = [
        click.option("--device", show_default="auto", help="auto, cpu, cuda or cuda:N.",
                     shell_complete=complete_devices),
        click.option("--cuda/--no-cuda", default=None, hidden=True),
        click.option("--max-memory", type=Size(), help="Refuse to start if more memory is needed, e.g. 8GiB."),
        plan_options,
        click.option("--dry-run", is_flag=True, help="Do all checks and stop before writing."),
        click.option("--resume", is_flag=True, help="Continue an interrupted run."),
        click.option("--overwrite", is_flag=True,
                     help="Replace OUT once the new one is complete; in a bucket it is removed first."),
        click.option("--verify/--no-verify", "verify_output", default=True, show_default=True,
                     help="Check the result before it is renamed to OUT."),
        click.option("--seed", "--random-seed", type=int, default=0, show_default=True,
                     help="Seed of methods that draw random numbers."),
        click.option("--threads", "--num-threads", "-j", type=click.IntRange(1, 1024),
                     help="CPU threads for arithmetic, of each worker."),
        click.option("--workers", type=Workers(), default=1, show_default=True, metavar="N",
                     help="Processes that make blocks at the same time, with several GPUs each on one; or a cluster:"
                          " ray://HOST:PORT, ray://auto, ray://local."),
        click.option("--write-model-card/--no-write-model-card", "model_card", default=True, show_default=True,
                     help="Write a README.md into the output."),
        private_paths_option,
        click.option("--quiet/--no-quiet", "-q", is_eager=True, help="Print errors and warnings only."),
        click.option("--json", "as_json", is_flag=True,
                     help="Print the result as JSON on stdout, and events as lines of JSON on stderr."),
        *mergekit.options(),
    ]  # fmt: skip
    return _all(options)(command)
