"""Start-up of the command line is fast, since it imports little and heavy packages only when they are needed.

Imported modules are counted, and not seconds: a busy machine must not fail these tests.
"""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = {"torch", "transformers", "numpy", "scipy", "huggingface_hub", "safetensors", "tokenizers", "rich", "jinja2"}


def imported(code: str) -> set[str]:
    """The modules that a new process has imported after this code."""
    code = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_help_imports_no_command():
    code = "from deus_merge.cli import main\ntry: main(['--help'])\nexcept SystemExit as end: assert not end.code"
    modules = imported(code)
    ours = {name for name in modules if name.startswith("deus_merge")}
    known = ("", ".cli", ".cli.main", ".cli.messages", ".core", ".core.errors", ".core.urls")
    assert ours == {f"deus_merge{name}" for name in known}
    assert not modules & (HEAVY | {"yaml"})
    assert len(modules) < len(imported("")) + 150


def test_commands_are_imported_without_heavy_packages():
    """The help of every command, and a plan of copies, need no arithmetic; ``rich`` is imported for tables only."""
    commands = ("merge", "inspect", "training", "demo")
    modules = imported("\n".join(f"import deus_merge.cli.{name}" for name in commands))
    assert not modules & HEAVY
