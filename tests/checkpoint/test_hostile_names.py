"""Names that would drive a terminal, a page or a model card: they are shown as they are, and nothing obeys them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import yaml
from fuzz.mutate import NAMES
from fuzz.workshop import header_of, shapes, values, weights_file
from safetensors.torch import load_file, save_file

EVIL = "a\x1b]0;x\x07\x9b31m <script>alert(1) `x` [b](c) |d \u202e :skull: [red]"


@pytest.fixture
def evil(workshop, tmp_path) -> Path:
    """A model whose folder, and a tensor, have hostile names."""
    folder = tmp_path / f"{EVIL}\n---\nlicense: mit\n```"
    workshop.copy("base", folder)
    sizes = shapes() | {"<img src=x>\u202e`[red]:skull:": [2]}
    count = sum(map(math.prod, sizes.values()))
    (folder / "model.safetensors").write_bytes(weights_file(header_of(sizes), values(count, 0)))
    return folder


def test_names_reach_no_terminal(fit, evil, tmp_path):
    out = tmp_path / f"out{EVIL}"
    fit("upscale", evil, out, "--preset", "copy_next")
    fit("verify", out)  # transformers does not know the tensor, as in the base
    tensors = load_file(out / "model.safetensors")
    save_file({name: x + 1 for name, x in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    for command in (["inspect", evil], ["inspect", evil, "--json"], ["verify", out], ["verify", out, "--json"]):
        done = fit(*command, expect=3 if "verify" in command else 0)
        assert "[red]" in done.out + done.err  # unchanged: not markup
        assert "💀" not in done.out + done.err
    text = f"base_model: {json.dumps(str(evil))}\nupscale: {{}}\nchat_template: '\u202e {{{{ 1 }}}}'\n"
    (tmp_path / "recipe.yml").write_text(text)
    for options in ([], ["--json"], ["--expand"], ["--expand", "--json"]):
        fit("plan", tmp_path / "recipe.yml", *options)
    fit("plan", tmp_path / "\x1b[31m", expect=2)
    fit("verify", tmp_path / "\x1b[31m", expect=2)
    fit("methods", "\x1b[31m", expect=2)
    fit("\x1b[31m", expect=2)
    fit("upscale", evil, out, expect=2)
    fit("upscale", evil, tmp_path / "x", "-p", "\x1b[31m=1", expect=2)


def test_names_cannot_break_out_of_the_model_card(fit, evil, tmp_path):
    template = "```\\n</pre><script>\\n{{ x }}\\n  ````\\n"
    slices = f"[{{sources: [{{model: {json.dumps(str(evil))}}}], merge_method: passthrough}}]"
    text = f'slices: {slices}\nchat_template: "{template}"\nparameters: {{scale: [{{filter: <b>, value: 1}}]}}\n'
    (tmp_path / "recipe.yml").write_text(text)
    done = fit("merge", tmp_path / "recipe.yml", tmp_path / "out")
    assert "filter '<b>' is part of no tensor's name" in done.err
    card = (tmp_path / "out/README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert not {"base_model", "license"} & yaml.safe_load(front).keys()
    prose, fence, rest = body.partition("`````yaml\n")
    assert fence and rest.count("`````") == 1 and rest.endswith("`````\n")
    assert "<" not in prose and "filter '&lt;b&gt;'" in prose
    assert all(c.isprintable() or c == "\n" for c in card)
    assert [line for line in prose.splitlines() if line.startswith(("---", "```"))] == ["```python", "```"]
    rows = [line for line in prose.splitlines() if line.startswith("| 0–2 ")]
    assert len(rows) == 1 and rows[0].replace("\\|", "").count("|") == 4
    assert yaml.safe_load(rest.removesuffix("`````\n"))["chat_template"].startswith("```\n</pre>")


def test_names_cannot_break_out_of_the_page(fit, evil, tmp_path):
    fit("upscale", evil, tmp_path / "out", "--preset", "copy_next")
    fit("report", tmp_path / "out", "--html", tmp_path / "page.html", expect=0)
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "<img" not in page and "&lt;script&gt;" in page
    assert all(c.isprintable() or c == "\n" for c in page)


def test_a_folder_whose_name_is_no_text(fit, workshop, tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff\xfe model")
    workshop.copy("base", folder)
    fit("upscale", folder, tmp_path / "out", "--preset", "copy_next")
    fit("verify", tmp_path / "out", "--json")
    fit("merge", tmp_path / "out/deus_merge.yml", tmp_path / "again")  # the recipe runs again
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


#: not those that mean something else on a command line
FOLDERS = [n for n in NAMES if n.isprintable() and 0 < len(n.encode()) < 256 and not set("/+~") & set(n) and n != ".."]


@pytest.mark.parametrize("name", [n for n in FOLDERS if not n.startswith("-")])
def test_any_name_of_a_folder(fit, workshop, tmp_path, name):
    """A model may be called whatever a folder may."""
    folder = tmp_path / name
    workshop.copy("base", folder)
    fit("upscale", folder, tmp_path / "the result", "--preset", "copy_next")
