"""mergekit's spellings: a command line of ``mergekit-yaml`` runs as ``deus-merge merge``.

What means the same stands in `run`. Here is the rest: what has no meaning here is accepted and says so, what asks for
another result is refused.
"""

from __future__ import annotations

import re

import click

from ..core.errors import DeusMergeError
from ..core.units import parse_size
from .output import say

_UNLIMITED = 1 << 62  # bytes

# Options whose wish is always fulfilled, or cannot matter: why.
_IDLE = {
    "--allow-crimes/--no-allow-crimes": "models whose tensors fit are merged whatever their type, others are not",
    "--async-write/--no-async-write": "writing always goes on beside the merge",
    "--clone-tensors/--no-clone-tensors": "a layer that stands twice is always written twice",
    "--lazy-unpickle/--no-lazy-unpickle": "pickled weights are always read lazily (where --allow-pickle allows it)",
    "--low-cpu-memory/--no-low-cpu-memory": "memory does not grow with the model; --max-memory bounds it",
    "--multi-gpu/--no-multi-gpu": "one device computes",
    "--read-to-gpu/--no-read-to-gpu": "tensors are always read to the device that computes",
    "--trust-remote-code/--no-trust-remote-code": "no code of a model is ever run",
}
_IDLE_VALUES = {
    "--lora-merge-cache": "adapters are merged as they are read, and nothing is kept",
    "--lora-merge-dtype": "adapters are merged in float32 and rounded once",
    "--write-threads": "one thread writes",
}


class ShardSize(click.ParamType):
    """Bytes as mergekit writes them: B is a billion (``5B``, ``500M``), 0 is no limit. Also as we do (``5GB``)."""

    name = "size"

    def convert(self, value, param, ctx):
        text = str(value).strip()
        if re.fullmatch(r"0|-\d+", text):
            return _UNLIMITED
        try:
            return parse_size(f"{text[:-1]}GB" if text[-1:] in "bB" and text[:-1].isdigit() else text)
        except DeusMergeError:
            self.fail(f"{value!r} is not a size: expected bytes, or a number with K, M or B (a billion)", param, ctx)


def _note(ctx: click.Context, param: click.Parameter, value: object) -> None:
    if value:
        reason = {**{k.partition("/")[0]: v for k, v in _IDLE.items()}, **_IDLE_VALUES}[param.opts[0]]
        say(f"note: {param.opts[0]} changes nothing: {reason}", ctx.params.get("quiet", False))


def _refuse_truncation(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        raise click.UsageError("--unsafe-truncate-embeddings is not supported: it drops tokens without a word", ctx)


def _refuse_pickling(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value:
        raise click.UsageError("--no-safe-serialization is not supported: only safetensors files are written", ctx)


def options() -> list:
    """The options, for `run.run_options`; all hidden, and none reaches the command but ``gpu_rich`` and
    ``out_shard_size``."""
    hidden = {"hidden": True, "expose_value": False}
    return [
        *(click.option(flag, callback=_note, **hidden) for flag in _IDLE),
        *(click.option(name, callback=_note, **hidden) for name in _IDLE_VALUES),
        click.option("-v", "verbosity", count=True, **hidden),
        click.option(
            "--unsafe-truncate-embeddings/--no-unsafe-truncate-embeddings", callback=_refuse_truncation, **hidden
        ),
        click.option("--safe-serialization/--no-safe-serialization", default=True, callback=_refuse_pickling, **hidden),
        click.option("--gpu-rich", is_flag=True, hidden=True),
        click.option("--out-shard-size", type=ShardSize(), hidden=True),
    ]
