"""``report``: one page that stands alone, for outputs of several presets, and that no model or recipe writes into."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from page_parser import check_stands_alone
from support import make_model, write_recipe

from deus_merge.report.page.figures import number


@pytest.mark.parametrize("preset", ["opt_deus", "opt_deus_paper", "llama_pro", "solar", "average"])
def test_a_page_for_every_kind_of_output(run, tiny, tmp_path, preset):
    out = tmp_path / "out"
    run("upscale", tiny, out, "--preset", preset)
    assert run("report", out).out.strip() == str(out / "report.html")
    text = (out / "report.html").read_text()
    page = check_stands_alone(text)
    record = json.loads((out / "deus_merge.json").read_text())
    layers = f"6 → {record['num_layers']} layers"
    assert layers in text and page.tags.count("svg") >= 1 and record["sources"][0]["contents"] in text
    reported = " ".join("".join(page.texts).split())
    card = (out / "README.md").read_text()
    for layer in record["layers"]:
        how = " + ".join(layer["actions"])
        assert (
            f"layer {layer['layer']}: {how} of tiny {layer['sources'][0]['layer']}" in text
        )  # where the pointer rests
        assert how == "copy" or f"| {how} ({layer['method']}), new |" in card
        strongest = [a for a in ("copy", "derive", "cast", "zeros", "align", "compute") if a in layer["actions"]][-1]
        assert f'<i class="{strongest}"></i>' in text and f'<span class="box {strongest}"' in text and how in reported
    for line in (d for layer in record["layers"] for d in layer["diagnostics"] if "transport_cost" in d):
        assert f">{number(line['transport_cost'])}<" in text
        if line["cosine"] is not None:
            assert f"<i>{line['cosine_before']:.3f} →</i> {line['cosine']:.3f}<".replace("-0.000", "0.000") in text
    for queries in (d["queries"] for layer in record["layers"] for d in layer["diagnostics"] if "queries" in d):
        cell = 96 / len(queries)
        for at, head in enumerate(queries):
            assert f'<rect class="cell" x="{at * cell:.2f}" y="{head * cell:.2f}"' in text
    assert (
        "copied tensors" in reported
        and ("" if record["function_preserving"] else "does not compute") in reported
        and ("computes what the base computes" in reported) is record["function_preserving"]
    )
    run("verify", out, "--quick")
    run("upscale", tiny, out, "--preset", "stack", "--overwrite")  # the page does not stand in the way
    assert not (out / "report.html").exists()


def test_verify_in_full_and_a_page_elsewhere(run, tiny, tmp_path):
    run("upscale", tiny, tmp_path / "out")
    run("report", tmp_path / "out", "--verify", "--html", tmp_path / "page.html")
    assert "LlamaForCausalLM" in (tmp_path / "page.html").read_text()
    assert not (tmp_path / "out/report.html").exists()
    (tmp_path / "out/config.json").write_text("{}")
    run("report", tmp_path / "out", "--html", tmp_path / "page.html", expect=3)
    assert "2 checks failed" in (tmp_path / "page.html").read_text()
    assert "cannot be written" in run("report", tmp_path / "out", "--html", tmp_path / "no/page.html", expect=2).err


def test_names_and_recipes_stay_text(run, tmp_path):
    name = """<img src=x onerror=alert(1)>'"&{{ 7 * 7 }}"""
    base = make_model(tmp_path / name)
    recipe = write_recipe(
        tmp_path / "recipe.yml",
        f"merge_method: passthrough\nmodels: [{{model: {json.dumps(str(base))}}}]\n"
        "chat_template: '{{ 1 }}</pre></title></style><script>alert(1)</script>'\n",
    )
    run("merge", recipe, tmp_path / "out")
    run("report", tmp_path / "out")
    text = (tmp_path / "out/report.html").read_text()
    page = check_stands_alone(text)
    assert name in "".join(page.texts) and "</script>" not in text and "&lt;script&gt;" in text
    assert not re.search(r"<img|7 \* 7 = 49|49}", text)


def test_a_damaged_manifest_makes_no_page(run, tiny, tmp_path):
    out = Path(shutil.copytree(tiny, tmp_path / "out"))
    assert "merge and upscale write one" in run("report", out, expect=2).err
    (out / "deus_merge.json").write_text("{")
    assert "not strict JSON" in run("report", out, expect=3).err and not (out / "report.html").exists()
