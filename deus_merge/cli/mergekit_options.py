"""mergekit's options, so that a command line of ``mergekit-yaml`` runs as ``deus-merge merge``.

Options with an equivalent are aliases in `merge`. This module has the others: options without an effect are accepted
with a note, and options that ask for another result are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click

from ..core.errors import DeusMergeError
from ..core.units import parse_size
from .output import note

Decorator = Callable[[Callable], Callable]
_UNLIMITED = 1 << 62  # bytes

# options without an effect, with the reason
_IDLE = {
    "--allow-crimes/--no-allow-crimes": "models whose tensors fit are merged whatever their type, others are not",
    "--async-write/--no-async-write": "blocks are always written while the next ones are computed",
    "--clone-tensors/--no-clone-tensors": "a repeated layer is always written again",
    "--lazy-unpickle/--no-lazy-unpickle": "pickled weights are always read lazily (where --allow-pickle allows it)",
    "--low-cpu-memory/--no-low-cpu-memory": "memory does not grow with the model; --max-memory bounds it",
    "--multi-gpu/--no-multi-gpu": "one device computes",
    "--read-to-gpu/--no-read-to-gpu": "tensors are always read to the device that computes",
    "--trust-remote-code/--no-trust-remote-code": "no code of a model is run",
}
_IDLE_VALUES = {
    "--lora-merge-cache": "adapters are merged as they are read, and not stored",
    "--lora-merge-dtype": "adapters are merged in float32 and rounded once",
    "--write-threads": "one thread writes",
}


class ShardSize(click.ParamType):
    """A size in mergekit's form, where B is a billion bytes (``5B``, ``500M``) and 0 is no limit, or like ``5GB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).strip()
        if re.fullmatch(r"0|-\d+", text):
            return _UNLIMITED
        try:
            return parse_size(f"{text[:-1]}GB" if text[-1:] in "bB" and text[:-1].isdigit() else text)
        except DeusMergeError:
            self.fail(f"{value!r} is not a size: expected bytes, or a number with K, M or B (a billion)", param, ctx)


def _note(ctx: click.Context, param: click.Parameter, value: object) -> None:
    if value and not ctx.resilient_parsing:
        reason = {**{k.partition("/")[0]: v for k, v in _IDLE.items()}, **_IDLE_VALUES}[param.opts[0]]
        note(f"note: {param.opts[0]} changes nothing: {reason}", ctx.params.get("quiet", False))


def _refuse_truncation(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        raise click.UsageError("--unsafe-truncate-embeddings is not supported: it drops tokens silently", ctx)


def _refuse_pickling(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value:
        raise click.UsageError("--no-safe-serialization is not supported: only safetensors files are written", ctx)


def _hidden(*names: str, **more: Any) -> Decorator:
    """An option that help does not list and that is not passed to the command."""
    return click.option(*names, hidden=True, expose_value=False, **more)


def options() -> list[Decorator]:
    """The options for `merge.run_options`. All are hidden; only ``gpu_rich`` and ``out_shard_size`` are passed on."""
    return [
        *(_hidden(flag, callback=_note) for flag in _IDLE),
        *(_hidden(name, callback=_note) for name in _IDLE_VALUES),
        _hidden("-v", "verbosity", count=True),
        _hidden("--unsafe-truncate-embeddings/--no-unsafe-truncate-embeddings", callback=_refuse_truncation),
        _hidden("--safe-serialization/--no-safe-serialization", default=True, callback=_refuse_pickling),
        click.option("--gpu-rich", is_flag=True, hidden=True),
        click.option("--out-shard-size", type=ShardSize(), hidden=True),
    ]
