"""``export-training`` and ``strip``: settings for training, and the removal of new layers."""

from __future__ import annotations

from pathlib import Path

import click

from .. import api
from ..core.text import plural, some_of
from ..training.export import TRAINERS
from ..training.optimizers import KINDS
from .next_steps import show_next
from .options import OutputPlace, Size, private_paths_option
from .output import echo, emit_json, note


@click.command("export-training")
@click.argument("out", type=OutputPlace())
@click.option("--for", "trainer", type=click.Choice(list(TRAINERS)), default="trainer", show_default=True,
              help="The trainer; 'trainer' is that of transformers.")  # fmt: skip
@click.option(
    "--optimizer", type=click.Choice(KINDS), help="The optimizer; needs --lr. Muon updates matrices, AdamW the rest."
)
@click.option("--lr", type=float, help="The learning rate; deus_merge.training.find_lr suggests one.")
@click.option("--output-ratio", type=float, default=1.0, show_default=True,
              help="The learning rate of what began as zeros, in units of --lr.")  # fmt: skip
@private_paths_option
def export_training(
    out: Path, trainer: str, optimizer: str | None, lr: float | None, output_ratio: float, private_paths: bool
):
    """Print settings with which a trainer trains the new layers of OUT and nothing else.

    The effect of the settings is checked on the model's tensor names; a trainer that cannot express this is refused.
    Comments say where its optimizer differs from that of deus_merge.training.

    \b
    Example:
      deus-merge export-training ./deeper --for axolotl --lr 3e-4 --output-ratio 2 >> axolotl.yml
    """
    text = api.export_training(
        out, trainer, optimizer=optimizer, lr=lr, output_ratio=output_ratio, private_paths=private_paths
    )
    echo(text.removesuffix("\n"))


@click.command()
@click.argument("out", type=OutputPlace())
@click.argument("base", type=click.Path(path_type=Path))
@click.option(
    "--manifest",
    type=click.Path(path_type=Path, exists=True),
    help="deus_merge.json (or its folder) of the model that was trained, if OUT has none.",
)
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Largest output file.")
@click.option("--overwrite", is_flag=True, help="Replace BASE once the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")  # fmt: skip
def strip(out: Path, base: Path, manifest: Path | None, max_shard_size: int, overwrite: bool, as_json: bool):
    """Remove the layers that the last growth added to OUT, and write the base to the new folder BASE.

    The result equals the base byte for byte. If OUT has been trained, the base's layers are written in their present
    state.

    \b
    Example:
      deus-merge strip ./trained ./base --manifest ./deeper
    """
    done = api.strip(out, base, manifest=manifest, max_shard_size=max_shard_size, overwrite=overwrite)
    if as_json:
        emit_json(done.describe())
        return
    taken = ", ".join(map(str, done.removed))
    note(f"{base}: {plural(done.num_layers, 'layer')}; removed: {taken}")
    if done.equal is None:
        note("not compared with the base: it is not a folder, has moved, or has changed")
    else:
        note(
            f"{plural(done.equal, 'tensor')} equal to the base, byte for byte"
            + (", files and config too" if done.same_files else "")
        )
    if done.widened:
        note(f"{done.widened} equal to the base in a wider dtype")
    if done.dequantized:
        weights = plural(done.dequantized, "quantised weight")
        note(f"in floating point, as the trained model was saved: {weights} of the base")
    if done.different:
        note(f"{len(done.different)} different: {some_of(done.different)}")
    if done.has_manifest:
        note("the manifest of the previous growth was copied: the result can be stripped again")
    elif done.has_manifest is False:
        note("no manifest of the previous growth fits: to strip the result again, name one with --manifest")
    show_next(base, manifest=bool(done.has_manifest), new_layers=bool(done.has_manifest))
