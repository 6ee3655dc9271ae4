"""``export-training`` and ``strip``: into training, and back."""

from __future__ import annotations

from pathlib import Path

import click

from .. import api
from ..training.export import TRAINERS
from .merge import Size
from .output import echo, emit_json, say


@click.command("export-training")
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--for", "trainer", type=click.Choice(list(TRAINERS)), default="trainer", show_default=True,
              help="The trainer; trainer is transformers' own.")  # fmt: skip
def export_training(out: Path, trainer: str):
    """Print settings with which a trainer trains the new layers of OUT and nothing else.

    What the trainer makes of them is worked out on the model's tensor names first; a trainer that cannot be told so is
    refused.

    \b
    Example:
      deus-merge export-training ./deeper --for axolotl >> axolotl.yml
    """
    echo(api.export_training(out, trainer).removesuffix("\n"))


@click.command()
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("base", type=click.Path(path_type=Path))
@click.option(
    "--manifest",
    type=click.Path(path_type=Path, exists=True),
    help="deus_merge.json (or the folder it is in) of the model that was trained, when OUT has none.",
)
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Largest output file.")
@click.option("--overwrite", is_flag=True, help="Replace BASE once the new one is whole.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")  # fmt: skip
def strip(out: Path, base: Path, manifest: Path | None, max_shard_size: int, overwrite: bool, as_json: bool):
    """Take the layers that its last growth put in out of OUT, and write the base that is left to the new folder BASE.

    It is the base again, byte for byte. OUT may have been trained since: the base's layers are then written as they
    are now.

    \b
    Example:
      deus-merge strip ./trained ./base --manifest ./deeper
    """
    done = api.strip(out, base, manifest=manifest, max_shard_size=max_shard_size, overwrite=overwrite)
    if as_json:
        emit_json(done.describe())
        return
    removed = ", ".join(map(str, done.removed))
    say(f"{base}: {done.num_layers} layers; removed: {removed}")
    if done.equal is None:
        say("the base is not available, or has changed: nothing to compare with")
    else:
        say(
            f"{done.equal} tensors equal to the base, byte for byte"
            + (", files and config too" if done.same_files else "")
        )
    if done.widened:
        say(f"{done.widened} equal to the base in a wider dtype")
    if done.different:
        say(f"{len(done.different)} not, first {done.different[0]}")
    if done.has_manifest:
        say("the manifest of the growth before was copied: this can be stripped again")
    elif done.has_manifest is False:
        say("no manifest of the growth before that fits: to strip this again, name one with --manifest")
