"""``env``: the facts that a bug report needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ..core.text import plural
from ..core.units import format_size
from ..run.environment import environment
from .output import emit_json, table


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON on stdout.")
def env(as_json: bool):
    """Print what a bug report needs: versions, system, processor, devices, limits. It has no user names, host names and
    paths.

    \b
    Example:
      deus-merge env
    """
    facts = environment()
    if as_json:
        emit_json(facts)
        return
    memory, files = facts["memory"], facts["open_files"]
    rows = [
        ["deus_merge", facts["deus_merge"]],
        ["python", facts["python"]],
        ["platform", facts["platform"]],
        ["processor", f"{facts['processor']}, {plural(facts['processors'], 'processor')} usable"],
        ["instruction set", f"{facts['instruction_set']}, {plural(facts['threads'], 'thread')}"],
        ["memory", _memory(memory) if memory else "not known"],
        ["open files", f"{files['limit']}, at most {files['highest']}"],
        ["devices", f"{len(facts['devices']) or 'none'} (torch is built {facts['torch_built_for']})"],
        *([f"cuda:{i}", _device(device)] for i, device in enumerate(facts["devices"])),
        *([name, version or "missing"] for name, version in facts["packages"].items()),
        *([name, version] for name, version in facts["optional_packages"].items()),
        *([name, value] for name, value in facts["variables"].items()),
    ]
    table("", ["", ""], rows)


def _memory(limits: Mapping[str, int]) -> str:
    available, total = limits["available_bytes"], limits["total_with_swap_bytes"]
    return f"{format_size(available)} available of {format_size(total)} with swap, within the limits of control groups"


def _device(device: Mapping[str, Any]) -> str:
    return f"{device['name']}, {format_size(device['memory_bytes'])}, compute capability {device['capability']}"
