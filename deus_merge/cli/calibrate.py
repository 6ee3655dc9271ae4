"""``calibrate``: outputs of new layers in closed form."""

from __future__ import annotations

from pathlib import Path

import click

from .. import api
from ..core.text import plural
from ..recipe.calibrate import read_text
from .completion import complete_devices, words
from .failures import report_bus_errors
from .next_steps import show_next
from .options import OutputPlace, Size
from .output import emit_json, note, quiet_transformers, table
from .progress import layer_notes


@click.command()
@click.argument("out", type=OutputPlace())
@click.argument("new", type=click.Path(path_type=Path))
@click.option(
    "--text",
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A text file like the text that will be trained on.",
)
@click.option("--tokens", default=16_384, show_default=True, help="Tokens of the text that are used at most.")
@click.option("--length", default=256, show_default=True, help="Tokens of a window.")
@click.option(
    "--held-out",
    default=0.25,
    show_default=True,
    help="Share of the windows that is not fitted, but chooses the size of the steps.",
)
@click.option(
    "--method", default="kfac", show_default=True, help="kfac or ridge.", shell_complete=words("kfac", "ridge")
)
@click.option(
    "--damping",
    default=0.3,
    show_default=True,
    help="Multiple of the mean diagonal entry that is added to the diagonals.",
)
@click.option("--batch", default=4, show_default=True, help="Windows that are computed at once.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.",
              shell_complete=complete_devices)  # fmt: skip
@click.option("--max-memory", type=Size(), help="Refuse to start if more memory is needed, e.g. 8GiB.")
@click.option("--seed", default=0, show_default=True, help="Decides which windows are held out.")
@click.option("--threads", "-j", type=click.IntRange(1, 1024), help="CPU threads for arithmetic.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@click.option("--overwrite", is_flag=True, help="Replace NEW once the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")  # fmt: skip
def calibrate(out: Path, new: Path, text: Path, as_json: bool, **options):
    """Set the zeroed outputs of OUT's new layers in closed form, and write the model to the new folder NEW.

    Layer by layer from the bottom, the outputs become a regression of the negative gradient on what they read. The loss
    of windows that are not fitted chooses the size of each step, and a layer that does not lower it stays zero. Tokens
    used here count as training tokens.

    \b
    Example:
      deus-merge calibrate ./deeper ./calibrated --text corpus.txt
    """
    quiet_transformers()
    report_bus_errors()
    content = read_text(text, "--text")
    done = api.calibrate(out, new, content, api.CalibrationOptions(**options), on_layer=layer_notes())
    if as_json:
        emit_json(done.describe())
        return
    record = done.record
    rows = [
        [str(layer.layer), f"{layer.alpha:.3g}" if layer.tensors else "stays zero", f"{layer.loss_before:.4f}",
         f"{layer.loss_after:.4f}"] for layer in record.layers
    ]  # fmt: skip
    table("", ["layer", "step", "loss before", "after"], rows, right=(1, 2, 3))
    for text_of_note in done.notes:
        note(text_of_note)
    note(
        f"{new}: loss {record.loss_before:.4f} -> {record.loss_after:.4f} on"
        f" {plural(record.held_out_tokens, 'token')} that chose the steps; fitted on {plural(record.tokens, 'token')};"
        f" {done.seconds:.0f} s"
    )
    show_next(new)
