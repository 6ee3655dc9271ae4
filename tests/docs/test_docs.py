"""Commands of README and docs run, links lead somewhere, tables are complete, and generated pages are up to date."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import make_model
from tiny_models import make as make_tiny

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


#: pages whose commands run in a test, in order and in one folder
PAGES = (
    "README.md", "docs/recipes.md", "docs/training.md", "docs/many-machines.md", "docs/one-card.md",
    "docs/experts-and-vision.md",
)  # fmt: skip


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [line for line in lines if re.search(r"(^|\| )deus-merge ", line)]


@pytest.fixture
def workplace(tmp_path, tiny):
    """A folder as a user has it after ``make demo``, with small models under the names the README uses."""
    folder = tmp_path
    (folder / "recipes").symlink_to(ROOT / "recipes")
    for name in ("demo/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        make_model(folder / name, layers=30, tied=True, vocab_size=2048)
        for file in tiny.glob("token*"):
            shutil.copy(file, folder / name)
    make_tiny(folder / "Qwen/Qwen3-30B-A3B", "qwen3_moe")
    make_tiny(folder / "Qwen/Qwen3-VL-4B-Instruct", "qwen3_vl_text")
    (folder / "corpus.txt").write_text("\n".join(f"Line {i} of some text, number {i % 13}." for i in range(30_000)))
    return folder


@pytest.mark.parametrize("name", PAGES)
def test_commands_run_in_order(run, workplace, monkeypatch, name):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert commands(page(name))
    for line in commands(page(name)):
        if {">", "|"} & set(shlex.split(line, comments=True)):
            subprocess.run(["bash", "-eo", "pipefail", "-c", line], check=True)
        else:
            run(*shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("kind", ["slurm", "kubernetes"])
def test_scripts_of_clusters(run, workplace, monkeypatch, kind):
    """As the scheduler runs them, for two shares instead of eight: each by its number, then `finish`."""
    script = re.search(rf"```{kind}\n(.*?)```", page("docs/many-machines.md"), re.DOTALL)[1]
    if kind == "kubernetes":
        container = yaml.safe_load(script)["spec"]["template"]["spec"]["containers"][0]
        assert f"/{yaml.safe_load(script)['spec']['completions']} " in container["command"][-1]
        script = container["command"][-1].replace("/8 ", "/2 ")
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    Path("recipe.yml").write_text(
        "base_model: demo/SmolLM2-135M-Instruct\nmerge_method: passthrough\ndtype: float16\n"
        "slices: [{sources: [{model: demo/SmolLM2-135M-Instruct, layer_range: [0, 3]}]}]\n"
    )
    numbers = {"SLURM_ARRAY_TASK_COUNT": "2"}
    for number in (1, 2):
        numbers |= {"SLURM_ARRAY_TASK_ID": str(number), "JOB_COMPLETION_INDEX": str(number - 1)}
        threads = re.sub(r"--threads \S+", "--threads 1", script)
        subprocess.run(["bash", "-e", "-c", threads], env=os.environ | numbers, check=True)
    run("finish", "recipe.yml", "deeper")
    assert load_config("deeper")["num_hidden_layers"] == 3


def load_config(folder: str) -> dict:
    return json.loads(Path(folder, "config.json").read_text())


def test_readme_training_snippet(run, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    run("upscale", "demo/SmolLM2-135M-Instruct", "deeper", "--insert", "all", "--preset", "copy_next")
    snippet = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    scope: dict = {}
    exec(snippet, scope)
    trained = {n for n, p in scope["model"].named_parameters() if p.requires_grad}
    assert trained == scope["new"] and len(trained) == 29 * 9


def test_the_recipe_with_modules_runs(run, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    Path("vlm.yml").write_text(re.search(r"```yaml\n(.*?)```", page("docs/experts-and-vision.md"), re.DOTALL)[1])
    run("merge", "vlm.yml", "out")
    assert load_config("out")["text_config"]["num_hidden_layers"] == 8
    assert run("verify", "out", "--quick", "--json").json()["passed"]


def test_readme_recipe_is_one(workplace, monkeypatch):
    from deus_merge.recipe.reader import parse_recipe

    recipe = parse_recipe(re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1])
    assert [s.merge_method for s in recipe.slices] == ["slerp", "ot_fuse"]


def test_every_preset_has_a_row():
    from deus_merge.recipe.presets import PRESETS

    assert [name for name in PRESETS if f"`{name}`" not in page("docs/recipes.md")] == []


def test_the_readme_is_short():
    assert len(README.encode()) <= 7000


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("file", pages(), ids=lambda file: file.name)
def test_links_lead_somewhere(file):
    """Files that a page links are there, and headings in pages that it links."""
    for target in re.findall(r"\]\(((?!http)[^)\s]+)\)", file.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        linked = file.parent / path if path else file
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", t.lower()).strip().replace(" ", "-") for t in titles}, target


def test_paths_in_pages_exist():
    """Folders and files that pages pass to pytest and python."""
    named = re.compile(r"(?:pytest|python) ((?:tests|benchmarks|docs)/[\w/.-]*\w)")
    arguments = {argument for file in pages() for argument in named.findall(file.read_text(encoding="utf-8"))}
    assert {path for path in arguments if not (ROOT / path).exists()} == set()


def test_every_page_is_linked_from_the_readme_and_the_site():
    assert [file.name for file in (ROOT / "docs").glob("*.md") if f"](docs/{file.name}" not in README] == []
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [file.name for file in (ROOT / "docs").glob("*.md") if f": {file.name}\n" not in navigation] == []


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


def test_the_benchmark_of_the_inits_needs_no_file():
    """Its command as it stands: models and suites exist, and no option names a file."""
    from benchmarks.inits.__main__ import main
    from benchmarks.inits.suites import SUITES

    text = page("docs/does-it-help.md")
    (line,) = [line for line in text.splitlines() if line.startswith("python -m benchmarks.inits")]
    command, _, comment = line.partition("#")
    found = main.make_context("inits", shlex.split(command)[3:]).params
    assert found["models"] and not {"prose", "code", "docs"} & {word.lstrip("-") for word in shlex.split(command)[3:]}
    assert found["prose"] == ("stdlib-docs",) and found["code"] == ("stdlib",)
    assert set(re.findall(r"--suite (\w+)", comment)) <= SUITES.keys()
