"""What can be done with an output that was just written: commands to paste."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..core.urls import address_of
from ..report.page.next_steps import repository_name
from .output import note


def show_next(out: Path, *, manifest: bool = True, new_layers: bool = True, quiet: bool = False) -> None:
    """Print the next steps on stderr.

    Args:
        out: The output, as the user named it.
        manifest: Whether it has a manifest: without one there is nothing to verify or report.
        new_layers: Whether it has layers to train.
        quiet: Whether nothing is printed.
    """
    if address := address_of(out):
        note("next:", quiet)
        note(f"  {'verify':<8}deus-merge verify {shlex.quote(address)}", quiet)
        note(f"  {'inspect':<8}deus-merge inspect {shlex.quote(address)}", quiet)
        return
    place = str(out) if not str(out).startswith("-") else f"./{out}"
    folder = shlex.quote(place)
    steps = [("verify", f"deus-merge verify {folder}"), ("report", f"deus-merge report {folder}")] if manifest else []
    steps += [("train", f"deus-merge export-training {folder}")] if new_layers else []
    steps.append(("upload", f"hf upload {repository_name(out.absolute().name)} {folder}"))
    note("next:", quiet)
    for name, command in steps:
        note(f"  {name:<8}{command}", quiet)
