"""The README's commands run, its tables are complete, and the command-line page is up to date."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from support import make_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


TRAINING = (ROOT / "docs/training.md").read_text(encoding="utf-8")


def commands(page: str = README) -> list[list[str]]:
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("deus-merge")]


@pytest.fixture
def workplace(tmp_path, tiny):
    """A folder as a user has it after ``make demo``, with small models under the names the README uses."""
    folder = tmp_path
    (folder / "recipes").symlink_to(ROOT / "recipes")
    for name in ("demo/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        make_model(folder / name, layers=30, tied=True, vocab_size=2048)
        for file in tiny.glob("token*"):
            shutil.copy(file, folder / name)
    (folder / "corpus.txt").write_text("\n".join(f"Line {i} of some text, number {i % 13}." for i in range(30_000)))
    return folder


def test_readme_commands_run_in_order(run, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    assert len(commands()) >= 5
    for command in commands():
        run(*command[1:])


def test_commands_of_the_page_on_training_run(run, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    assert commands(TRAINING)
    for command in commands(TRAINING):
        run(*command[1:])


def test_commands_of_the_page_on_recipes_run(workplace):
    """In a shell, since they write to files and read from pipes."""
    make_model(workplace / "HuggingFaceTB/SmolLM2-135M", layers=30, tied=True, seed=1)
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/recipes.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    script = "set -euo pipefail\n" + "".join(blocks).replace("deus-merge ", f"{sys.executable} -m deus_merge ")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], cwd=workplace, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (workplace / "mine.yml").read_text() == (ROOT / "recipes/opt_deus.yml").read_text()
    assert done.stdout.count("30 -> 45 layers, 15 new") == 2 and "30 -> 34 layers, 4 new" in done.stdout


def test_readme_training_snippet(run, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    run("upscale", "demo/SmolLM2-135M-Instruct", "deeper", "--insert", "all", "--preset", "copy_next")
    snippet = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    scope: dict = {}
    exec(snippet, scope)
    trained = {n for n, p in scope["model"].named_parameters() if p.requires_grad}
    assert trained == scope["new"] and len(trained) == 29 * 9


def test_readme_recipe_is_one(workplace, monkeypatch):
    from deus_merge.recipe.reader import parse_recipe

    recipe = parse_recipe(re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1])
    assert [s.merge_method for s in recipe.slices] == ["slerp", "ot_fuse"]


def test_readme_names_every_preset_and_command():
    from deus_merge.cli.main import cli
    from deus_merge.recipe.presets import PRESETS

    assert [name for name in PRESETS if f"`{name}`" not in README] == []
    assert [name for name in cli.list_commands(click.Context(cli)) if f"| `deus-merge {name}" not in README] == []


def test_paths_in_the_readme_exist():
    """Folders and files that it links or passes to pytest and python."""
    links = re.findall(r"\]\(((?!http|#)[^)]+)\)", README)
    arguments = re.findall(r"\b((?:tests|benchmarks|recipes|docs)/[\w/.-]*\w)", README)
    missing = {path for path in links + arguments if not (ROOT / path).exists()}
    assert not missing


def test_page_on_quantised_models_names_every_format():
    from deus_merge.checkpoint.formats.registry import formats

    page = (ROOT / "docs/quantised.md").read_text(encoding="utf-8")
    rows = {name: row.split("|") for name, row in re.findall(r"^\| `(\w+)` \|(.*)$", page, re.MULTILINE)}
    assert rows.keys() == formats().keys()
    for name, format_ in formats().items():
        _, exceptions, quantizes, _ = rows[name]
        assert f"`{format_.exceptions}`" in exceptions and (quantizes.strip() == "no") != format_.quantizes


def test_page_for_mergekit_users_names_every_method_with_its_parameters():
    from deus_merge.methods.registry import methods

    page = (ROOT / "docs/coming-from-mergekit.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)$", page, re.MULTILINE))
    assert rows.keys() == methods().keys()
    task_vectors = page.split("Task vectors are")[1]
    for name, method in methods().items():
        row = rows[name] + (rows[alike[1]] if (alike := re.search(r"as `(\w+)`", rows[name])) else "")
        known = row + task_vectors if "task vectors" in row else row
        assert name == "ot_fuse" or [p.name for p in method.parameters if f"`{p.name}`" not in known] == []


def test_command_line_page_is_up_to_date():
    for name in ("make_cli", "make_families"):
        page = runpy.run_path(str(ROOT / f"docs/{name}.py"))
        assert page["PAGE"].read_text(encoding="utf-8") == page["render"](), f"run: python docs/{name}.py"
