"""``import deus_merge as dm``: imported when first used, silent, with progress that reaches its total."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import write_recipe

import deus_merge as dm
from deus_merge import api

TEXT = "\n".join(f"Line {i} of some text, number {i % 13}." for i in range(2000))
FEW = dm.CalibrationOptions(tokens=1024, length=64)


def fresh(code: str) -> str:
    """The output of a new process."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_nothing_but_the_package():
    code = (
        "import json, sys; old = set(sys.modules)\nimport deus_merge\nprint(json.dumps(list(set(sys.modules) - old)))"
    )
    modules = set(json.loads(fresh(code)))
    assert {name for name in modules if name.startswith("deus_merge")} == {"deus_merge"}
    assert not modules & {"torch", "numpy", "yaml", "click", "safetensors"}


@pytest.mark.parametrize(
    "before",
    [
        "import deus_merge as dm",
        "import deus_merge.plan.types, deus_merge.verify.checks, deus_merge.report.page, deus_merge.methods.registry\n"
        "import deus_merge as dm",
        "from deus_merge import api\nimport deus_merge as dm",
        "from deus_merge.cli import main\nimport deus_merge as dm",
    ],
)
def test_folders_with_the_names_of_functions_are_both(before):
    code = f"""{before}
from deus_merge import plan
import deus_merge.plan.types as types, deus_merge.methods.registry as registry
assert plan is dm.plan and dm.plan.types is types and dm.methods.registry is registry
print(len(dm.methods("ties")["methods"]), callable(dm.verify), callable(dm.report))
try: dm.plan("absent.yml")
except dm.DeusMergeError as error: print(type(error).__name__)
"""
    assert fresh(code).split() == ["1", "True", "True", "RecipeError"]


def test_every_name_is_there_and_the_same_everywhere():
    assert set(dm.__all__) == {*api.__all__, "__version__", "api", "training"} <= set(dir(dm))
    for name in api.__all__:
        function = getattr(api, name)
        if inspect.isfunction(function):
            assert inspect.signature(getattr(dm, name)) == inspect.signature(function)
        else:
            assert getattr(dm, name) is function
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dm.nothing


class Steps(list):
    """A callback that keeps what it gets."""

    def __call__(self, progress: dm.Progress) -> None:
        self.append(progress)

    def check(self, total: int) -> None:
        assert [step.done for step in self] == list(range(1, total + 1))
        assert {step.total for step in self} == {total}
        assert all(step.title in str(step) and f"/{total}]" in str(step) for step in self)


def test_the_whole_way_prints_nothing_and_reports_progress(tiny, tmp_path, capfd):
    merged, checked, calibrated, scored, inspected = (Steps() for _ in range(5))
    result = dm.upscale(tiny, tmp_path / "deeper", insert="all", preset="copy_next", progress=merged)
    merged.check(len(result.plan.blocks))
    checked_result = dm.verify(tmp_path / "deeper", logits_text=TEXT[:400], progress=checked)
    checked.check(len(checked_result.checks))
    assert checked_result.passed and result.plan.num_layers == 11
    dm.calibrate(tmp_path / "deeper", tmp_path / "calibrated", TEXT, FEW, progress=calibrated)
    calibrated.check(5)
    dm.score_gaps(tiny, TEXT, FEW, progress=scored)
    scored.check(5)
    facts = dm.inspect(tiny, similarity=True, progress=inspected)
    inspected.check(5)
    assert facts["layers"] == 6 and len(facts["similarity"]) == 5
    assert dm.report(tmp_path / "deeper").is_file()
    assert "transformers" in dm.export_training(tmp_path / "deeper", "trainer")
    assert dm.strip(tmp_path / "deeper", tmp_path / "base").equal == 56
    assert capfd.readouterr() == ("", "")


def test_progress_of_a_merge_counts_what_a_calibration_and_an_earlier_run_did(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    section = {"text": str(text), "tokens": 1024, "length": 64}
    recipe = dm.upscale_recipe(tiny, insert={"count": 2}, preset="copy_next", calibrate=section)
    steps, again = Steps(), Steps()
    plan = dm.plan(recipe)
    dm.merge(plan, tmp_path / "out", progress=steps)
    steps.check(len(plan.blocks) + 2)
    assert not any(step.resumed for step in steps) and "calibrated layer" in steps[-1].title
    dm.merge(plan, tmp_path / "out", dm.RunOptions(resume=True), progress=again)
    assert all(step.resumed for step in again) and len(again) >= len(plan.blocks)


def test_comparison_reports_progress(tiny, tmp_path, capfd):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Line {i} of some text, number {i % 13}." for i in range(30_000)))
    options = dm.CompareOptions(
        ("copy_next",), ({"count": 1, "where": "top"},), tokens=2048, batch=4, length=64, held_out=4, seeds=1,
        rates=(1e-3, 3e-3), device="cpu",
    )  # fmt: skip
    steps = Steps()
    result = dm.compare(tiny, tmp_path / "compared", text, options, progress=steps)
    assert [step.done for step in steps] == list(range(1, len(result.runs) + 1))
    assert all(step.total >= step.done for step in steps) and len(repr(result)) < 200 + len(str(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_a_recipe_is_whatever_describes_it(tiny, tmp_path):
    data = {"base_model": str(tiny), "upscale": {"preset": "copy_next", "insert": "all"}}
    file = write_recipe(tmp_path / "recipe.yml", yaml.safe_dump(data))
    forms = [data, file, str(file), Path(file).read_text(), dm.upscale_recipe(tiny, preset="copy_next", insert="all")]
    assert len({dm.plan(form).hash for form in forms}) == 1
    assert dm.merge(data, tmp_path / "out").plan.num_layers == 11


def test_upscale_fits_a_memory(tiny, tmp_path):
    result = dm.upscale(tiny, tmp_path / "deeper", memory="24GB", preset="copy_next")
    assert result.plan.new_layers == dm.plan(dm.upscale_recipe(tiny, preset="copy_next", insert="even")).new_layers
    with pytest.raises(dm.DeusMergeError, match="fit"):
        dm.upscale(tiny, tmp_path / "other", memory="1MB")
    assert not (tmp_path / "other").exists()


def test_results_are_short_in_a_terminal_and_tables_in_a_notebook(tiny, tmp_path):
    recipe = dm.upscale_recipe(tiny, preset="copy_next", insert="top_half")
    plan = dm.plan(recipe)
    assert repr(recipe) == f"Recipe(upscale copy_next of {tiny})"
    assert repr(plan) == ("Plan(6 -> 9 layers, 3 new; 1.08 M parameters, 295.49 k new; writes 2.18 MB in 1 file)")
    page = plan._repr_html_()
    assert "<td>0–2</td>" in page and page.count("<td>new</td>") == 3 and page.count("<tr>") == 1 + 7
    result = dm.merge(plan, tmp_path / "<b>")
    assert f"MergeResult({tmp_path}/<b>: 6 -> 9 layers, 3 new; " in repr(result) and "checks passed" in repr(result)
    assert "&lt;b&gt;: 6 -&gt; 9 layers" in result._repr_html_() and "<b>" not in result._repr_html_()
    (tmp_path / "<b>/config.json").write_text("{}")
    found = dm.verify(tmp_path / "<b>", quick=True)
    assert "FAILED other files" in repr(found) and "<td>FAILED</td>" in found._repr_html_()
    facts = dm.inspect(tiny)
    assert repr(facts) == f"Inspection({tiny}: llama, 6 layers; 787.68 k parameters, 1.58 MB)"
    assert "<td>hidden size</td><td>96</td>" in facts._repr_html_() and dict(facts) == facts.describe()
    assert repr(dm.methods("solar")) == "Catalog(1 presets)"
    assert "<td>ot_fuse</td>" in dm.methods()._repr_html_()


WRONG = {
    "plan a number": lambda t: dm.plan(5),
    "plan nothing": lambda t: dm.plan(None),
    "plan a list": lambda t: dm.plan([{"slices": []}]),
    "plan an empty recipe": lambda t: dm.plan({}),
    "plan an object in a recipe": lambda t: dm.plan({"base_model": object(), "upscale": {}}),
    "plan a folder": lambda t: dm.plan(t),
    "plan with a wrong size": lambda t: dm.plan({"base_model": str(t), "upscale": {}}, max_shard_size="lots"),
    "plan with wrong load options": lambda t: dm.plan({"base_model": str(t), "upscale": {}}, load_options=True),
    "unknown preset": lambda t: dm.upscale_recipe(t, preset="nope"),
    "unknown form": lambda t: dm.upscale_recipe(t, insert="nope"),
    "form of a wrong type": lambda t: dm.upscale_recipe(t, insert=[1, 2]),
    "unknown parameter": lambda t: dm.upscale_recipe(t, parameters={"nope": 1}),
    "preset of a wrong type": lambda t: dm.upscale_recipe(t, preset=3),
    "model of a wrong type": lambda t: dm.upscale_recipe(None),
    "model without a name": lambda t: dm.upscale("", "out"),
    "out of a wrong type": lambda t: dm.upscale(t, None),
    "options of a wrong type": lambda t: dm.upscale(t, "out", {"device": "cpu"}),
    "training of a wrong type": lambda t: dm.upscale(t, "out", memory="24GB", training={}),
    "memory that is no size": lambda t: dm.fit(t, "lots"),
    "merge something else": lambda t: dm.merge(5, "out"),
    "preflight of a recipe": lambda t: dm.preflight({}, "out"),
    "verify nothing": lambda t: dm.verify(None),
    "verify an absent folder": lambda t: dm.verify("absent"),
    "logits of a number": lambda t: dm.verify(t, logits_text=5),
    "report of a number": lambda t: dm.report(5),
    "inspect an absent folder": lambda t: dm.inspect("./absent"),
    "inspect a number": lambda t: dm.inspect(5),
    "unknown method": lambda t: dm.methods("tiess"),
    "method of a wrong type": lambda t: dm.methods(5),
    "calibrate with a wrong text": lambda t: dm.calibrate(t, "out", 5),
    "calibrate with an absent text": lambda t: dm.calibrate(t, "out", Path("absent.txt")),
    "calibrate with wrong options": lambda t: dm.calibrate(t, "out", TEXT, {"tokens": 5}),
    "score with wrong options": lambda t: dm.score_gaps(t, TEXT, 5),
    "compare on an absent text": lambda t: dm.compare(t, "out", "absent.txt"),
    "compare on a number": lambda t: dm.compare(t, "out", 5),
    "compare with wrong options": lambda t: dm.compare(t, "out", "absent.txt", {"tokens": 5}),
    "export without a folder": lambda t: dm.export_training(None, "trainer"),
    "strip a number": lambda t: dm.strip(5, "base"),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_wrong_arguments_raise_our_errors(call, tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dm.DeusMergeError) as found:
        call(tiny)
    assert len(str(found.value)) < 2500 and "object at 0x" not in str(found.value)
    assert list(tmp_path.iterdir()) == [] and capfd.readouterr() == ("", "")


def test_messages_say_what_is_expected(tiny):
    with pytest.raises(dm.DeusMergeError, match="unknown preset") as found:
        dm.upscale_recipe(tiny, preset="opt_deuss")
    assert "upscale.preset" in str(found.value) and "'opt_deus'" in str(found.value)
    with pytest.raises(dm.DeusMergeError) as found:
        dm.merge({"base_model": str(tiny), "upscale": {}}, "out", {"device": "cpu"})
    assert "options: not RunOptions" in str(found.value) and "deus_merge.RunOptions(...)" in str(found.value)


@pytest.mark.slow
def test_types_of_the_front_door(tmp_path):
    """A type checker knows the functions: the right calls pass, the wrong ones do not."""
    script = tmp_path / "script.py"
    script.write_text(
        "import deus_merge as dm\n"
        'found: dm.Verification = dm.verify("deeper", quick=True)\n'
        'layers: int = dm.plan("recipe.yml").num_layers\n'
        'dm.upscale("model", "deeper", insert={"every": 4}, progress=lambda step: print(step.total))\n'
        'wrong: str = dm.plan("recipe.yml").num_layers\n'
        "dm.verify(5)\n"
        "dm.nothing()\n"
    )
    root = Path(dm.__file__).parents[1]
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(root)], "include": ["script.py"]}))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "-p", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert [d["range"]["start"]["line"] + 1 for d in found if d["severity"] == "error"] == [5, 6, 7]
