"""docs/python.md and the notebook run as they stand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import deus_merge as dm

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/python.md").read_text(encoding="utf-8")
NOTEBOOK = ROOT / "recipes/tutorial.ipynb"


def test_examples_of_the_page_run_in_order(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "base")
    Path("text.txt").write_text("\n".join(f"Line {i} of some text, number {i % 13}." for i in range(2000)))
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 8
    scope: dict = {}
    for block in blocks:
        exec(block, scope)
    out = capsys.readouterr().out
    assert "MergeResult(deeper: 6 -> 9 layers, 3 new; 7 checks passed" in out and "(1, 4, 7)" in out
    assert "Plan(6 -> 7 layers, 1 new; " in out and "[3/9] layer 1: copy" in out
    assert "0 pieces are left" in out and Path("shared/deus_merge.json").is_file()
    assert "Recipe(upscale opt_deus of base)" in out and "did you mean 'opt_deus'?" in out
    assert out.rstrip().count("Calibrated(calibrated: loss ") == 1 and Path("deeper/report.html").is_file()


def test_page_names_every_function():
    functions = {name for name in dm.__all__ if name[0].islower() and name not in ("api", "run_blocks", "fit")}
    assert [name for name in functions if not re.search(rf"\bdm\.{name}\b", PAGE)] == []


def cells(kind: str) -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_is_clean_and_valid():
    """nbformat 4.5, without outputs, so that changes can be read; every cell of code is Python."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    for cell in notebook["cells"]:
        keys = {"id", "cell_type", "metadata", "source"}
        assert cell.keys() == keys | ({"outputs", "execution_count"} if cell["cell_type"] == "code" else set())
        assert not cell.get("outputs") and cell.get("execution_count") is None
    for source in cells("code"):
        compile(source, "cell", "exec")
    assert NOTEBOOK.read_text(encoding="utf-8") == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


@pytest.mark.slow
def test_the_notebook_runs_from_nothing_to_a_trained_model(tmp_path):
    """In an empty folder and a new process, cell by cell, as a kernel runs them."""
    script = (
        "import json, sys\nscope = {'__name__': '__main__'}\n"
        "for number, source in enumerate(json.load(sys.stdin)):\n"
        "    exec(compile(source, f'cell {number}', 'exec'), scope)\n"
        "print(json.dumps({'before': scope['before'], 'after': scope['after'], 'base': scope['base_loss']}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(cells("code")), cwd=tmp_path, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = json.loads(done.stdout.splitlines()[-1])
    assert losses["before"] == losses["base"], "the deeper model computes the same function"
    assert losses["after"] < losses["before"] - 0.3, losses
    trained = dm.verify(tmp_path / "trained")
    assert trained.passed, trained.failed
