"""What can be done with an output: commands for the folder that it is in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from ..manifest import Manifest


class Step(NamedTuple):
    """A command, and what it is for."""

    purpose: str
    command: str


def next_steps(manifest: Manifest, folder: str, *, checked: bool) -> Iterator[Step]:
    """The steps that make sense for an output, as commands to run next to its folder.

    Args:
        manifest: The output's manifest.
        folder: The name of its folder.
        checked: Whether the page shows a full verification.
    """
    at = shlex.quote(f"./{folder}")
    if not checked:
        yield Step("Check every value, and the model in transformers", f"deus-merge verify {at}")
    if manifest.trained:
        yield Step("Grow the trained model again", f"deus-merge upscale {at} {shlex.quote(f'./{folder}-deeper')}")
    elif manifest.new_parameters:
        yield Step(
            "Print settings with which a trainer trains the new layers and nothing else",
            f"deus-merge export-training {at}",
        )
    if manifest.new_layers:
        state = "the base as it is now" if manifest.base_trained else "the base, byte for byte"
        yield Step(
            f"Take the new layers out again: {state}", f"deus-merge strip {at} {shlex.quote(f'./{folder}-base')}"
        )
    yield Step("Share it on the Hugging Face hub", f"hf upload YOUR_NAME/{repository_name(folder)} {at}")


def repository_name(folder: str) -> str:
    """A name that the hub allows, from a folder's name."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder)
    name = re.sub(r"-{2,}|\.{2,}", "-", name).strip("-.")[:96].rstrip("-.")
    return name.removesuffix(".git") or "model"
