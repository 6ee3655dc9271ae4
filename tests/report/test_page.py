"""What pages show, of outputs of every kind: by their text, and in headless Chromium where there is one."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import subprocess

import page_outputs
import pytest
from chromium import Chromium, executable
from page_parser import check_stands_alone

import deus_merge as dm
from deus_merge.report.manifest import read_manifest
from deus_merge.report.page import frame, render_page
from deus_merge.report.page.alignment import pictures, tables
from deus_merge.report.page.figures import cosine, count, loss, number, seconds

pytestmark = pytest.mark.xdist_group("pages")
KINDS = (
    "aligned", "calibrated", "experts", "flow", "linear", "many-plots", "stack", "tiny", "trained", "two-sources",
)  # fmt: skip


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return page_outputs.outputs(tmp_path_factory.mktemp("outputs"))


@pytest.fixture(scope="module")
def pages(outputs, tmp_path_factory):
    """The page of each output, and that of a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    made = {name: dm.report(out, folder / f"{name}.html") for name, out in outputs.items()}
    assert sorted(made) == list(KINDS)
    return made | {"comparison": page_outputs.comparison(folder / "comparison")}


@pytest.fixture(scope="module")
def browser():
    program = executable()
    if program is None or subprocess.run([program, "--version"], capture_output=True, timeout=60).returncode:
        pytest.skip("no Chromium that starts: apt-get install chromium, or name one in CHROMIUM")
    found = Chromium(program)
    yield found
    found.close()


@pytest.mark.parametrize("kind", [*KINDS, "comparison"])
def test_pages_stand_alone(pages, kind):
    check_stands_alone(pages[kind].read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", [*KINDS, "comparison"])
def test_pages_fit_the_screen(browser, pages, kind):
    """On a telephone and on a desk, in both themes, closed and opened: nothing reaches beyond the screen, no text is
    too small to read, nothing is asked for, and the console stays empty."""
    for theme, background in (("light", "rgb(246, 248, 250)"), ("dark", "rgb(20, 24, 29)")):
        for width, opened in ((400, False), (400, True), (1280, theme == "dark")):
            view = browser.view(pages[kind], width, theme, opened=opened)
            assert view.scroll_width <= width and view.outside == [] and view.small == []
            assert view.console == [] and view.requests == [] and view.background == background
            assert view.picture.startswith(b"\x89PNG")


def test_the_browser_sees_what_is_wrong(browser, tmp_path):
    """The checks of the test above on a page that fails each of them."""
    page = tmp_path / "page.html"
    page.write_text(
        "<p style='width: 900px'>wide</p><p style='font-size: 4px'>small</p><img src='missing.png'>"
        "<svg viewBox='0 0 1000 10' width='100'><text y='9' font-size='12'>tiny</text></svg>"
        "<script>console.log(1); missing()</script>"
    )
    view = browser.view(page, 400, "light")
    assert view.scroll_width > 400 and any("wide" in text for text in view.outside)
    assert len(view.small) == 2 and len(view.console) >= 2 and view.requests[0].endswith("missing.png")


def test_the_same_output_gives_the_same_page(outputs, tmp_path, monkeypatch):
    """Whenever and from wherever it is written: the date is the manifest's."""
    first, again = tmp_path / "first.html", tmp_path / "again.html"
    dm.report(outputs["tiny"], first)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    monkeypatch.chdir(outputs["tiny"])
    dm.report(".", again)
    assert first.read_bytes() == again.read_bytes()
    day = json.loads((outputs["tiny"] / "deus_merge.json").read_text())["options"]["date"]
    assert f"Written on {day} by" in first.read_text() and re.fullmatch(r"20\d\d-\d\d-\d\d", day)
    dm.upscale(str(outputs["tiny"]), tmp_path / "reproducible")
    dm.report(tmp_path / "reproducible")
    assert "Written on 1970-01-01 by" in (tmp_path / "reproducible/report.html").read_text()


def test_counts_of_parameters_are_those_of_the_plan(outputs, pages, tiny):
    plan = dm.plan(dm.upscale_recipe(str(tiny)))
    for kind in ("tiny", "calibrated", "trained"):
        text = pages[kind].read_text()
        assert f"<b>{plan.shape.parameters / 1e6:.2f} M</b>" in text
        assert f"<b>{plan.shape.new_parameters / 1e3:.2f} k</b>" in text
    assert "to train" not in re.sub("export-training", "", pages["linear"].read_text())


def test_every_cosine_has_what_it_was_before(outputs, pages):
    """Of rows, neurons, heads and experts; and it is not the same number twice."""
    for kind in ("tiny", "flow", "experts", "aligned", "many-plots"):
        lines = [line for layer in read_manifest(outputs[kind]).layers for line in layer.diagnostics]
        keys = [(key, line) for line in lines for key in line if key.endswith("cosine") and line[key] is not None]
        assert keys and all(isinstance(line[f"{key}_before"], float) for key, line in keys)
        assert sum(line[f"{key}_before"] < line[key] for key, line in keys) > 0.7 * len(keys)
        page = pages[kind].read_text()
        cells = page[page.index("before → after the alignment</summary>") :].partition("</table>")[0]
        assert cells.count(" →</i> ") == cells.count("<td") - cells.count(">–<")
    by = {tuple(key for key in line if "cosine" in key) for line in lines}
    assert ("value_cosine", "query_key_cosine", "value_cosine_before", "query_key_cosine_before") in by


def test_experts_share_a_column():
    """Means of what is alike, the largest error, all the time; layers of two aligned sources do not share a row."""
    manifest_line = {"tensor": "model.layers.1.mlp.experts.0.gate_proj.weight", "solver": "assignment"}
    lines = [
        manifest_line | {"role": f"experts.{i}.gate", "cosine": 0.2 * i, "cosine_before": 0.1, "transport_cost": i,
                         "marginal_error": 1e-6 * i, "seconds": 1.5, "source": source}
        for i in (0, 1, 2) for source in (1, 2)
    ]  # fmt: skip
    manifest = read_manifest_with(lines)
    found = {table["term"]: table for table in tables(manifest)}
    assert list(found["cosine"]["columns"].items()) == [
        ("experts.*.gate", "model.layers.*.mlp.experts.*.gate_proj.weight")
    ]
    cells = {
        term: [(row, one["before"], one["after"]) for row, (one,) in table["rows"]] for term, table in found.items()
    }
    assert cells["cosine"] == [("0 · other", "0.100", "0.200"), ("0 · third", "0.100", "0.200")]
    assert cells["transport cost"][0][1:] == (None, "1.00") and cells["marginal error"][0][2] == "2.00 × 10⁻⁶"
    assert cells["time of the solver"][0][2] == "4.50 s" and found["cosine"]["experts"]


def read_manifest_with(lines):
    from deus_merge.core.typed_json import parse
    from deus_merge.report.manifest_parts import ManifestLayer

    sources = [{"model": f"/models/{name}", "layer": 0} for name in ("one", "other", "third")]
    entry = {"layer": 0, "new": False, "actions": ["compute"], "method": "linear", "sources": sources}
    return (parse(ManifestLayer, entry | {"diagnostics": lines}),)


def test_values_that_somebody_else_wrote():
    """A manifest may be written by anybody: what is no number is left out, and sums may overflow."""
    odd = (
        {"cosine": 1e308, "experts": [0, "x"]},
        {"cosine": -1e308, "experts": "01"},
        {"cosine": 10**400, "source": -9},
        {"cosine": [1], "cosine_before": "x"},
        {"cosine": True, "experts": {"a": 1}},
    )
    lines = [{"role": f"experts.{i}.gate", "tensor": "t", **line, "seconds": 1.7e308} for i, line in enumerate(odd)]
    layers = read_manifest_with(lines + [{"role": "up", "tensor": "t", "cosine": 1e308}])
    found = {table["term"]: table["rows"] for table in tables(layers)}
    assert [cell["after"] for cell in found["cosine"][0][1]] == ["0.000", f"{1e308:.3f}"]
    assert found["time of the solver"][0][1][0]["after"] == "–" and pictures(layers) == []


def test_layer_numbers_are_shown_however_many_there_are(outputs, pages):
    for kind, sources, layers in (("two-sources", (24, 24), 24), ("stack", (40,), 60), ("many-plots", (40,), 79)):
        page = pages[kind].read_text()
        picture = page[page.index('<div class="map"') :].partition("<details>")[0]
        shown = re.findall(r'<span (?:class="box \w+" )?title="[^"]*" style="[^"]*">(?:<em>)?(\d+)', picture)
        assert shown == [str(i) for depth in (*sources, layers) for i in range(depth)]
        heights = [float(height) for height in re.findall(r"height: ([\d.]+)px\"", picture)]
        assert min(heights) >= 14  # px: a line of the numbers
        record = read_manifest(outputs[kind])
        assert picture.count("<path") == sum(len(layer.sources) for layer in record.layers)


def test_titles_and_states(pages):
    found = {kind: pages[kind].read_text() for kind in KINDS}
    titles = {kind: re.search("<h1>(.*)</h1>", text)[1] for kind, text in found.items()}
    assert titles["two-sources"] == "one + other: 24 layers" and titles["stack"] == "deep: 40 → 60 layers"
    assert titles["linear"] == "one + other: 24 layers" and titles["tiny"] == titles["trained"] == "tiny: 6 → 9 layers"
    said = {
        kind: set(re.findall(r'class="badge \w+">(?:<abbr[^>]*>)?([a-z][^<]*)', text)) for kind, text in found.items()
    }
    same, other = "computes what the base computes", "does not compute what the base computes"
    assert same in said["tiny"] and "calibrated" in said["calibrated"] and "trained" in said["trained"]
    assert other in said["stack"] and not {same, other} & (said["linear"] | said["trained"] | said["calibrated"])
    assert "The base, byte" not in found["linear"] and "in 1 file" not in found["trained"]


@pytest.mark.parametrize("kind", ["tiny", "trained", "two-sources"])
def test_next_steps_run(run, outputs, pages, tmp_path, monkeypatch, kind):
    """Every command of the page, next to the model's folder, which has a name to quote."""
    folder = tmp_path / "a model"
    shutil.copytree(outputs[kind], folder)
    text = dm.report(folder).read_text()
    commands = re.findall(r'<pre class="command">(.*)</pre>', text)
    words = [shlex.split(command.replace("&#39;", "'")) for command in commands]
    assert words[-1][:3] == ["hf", "upload", "YOUR_NAME/a-model"] and words[-1][3] == "./a model"
    ours = {command[1]: command[1:] for command in words[:-1] if command[0] == "deus-merge"}
    expected = {"tiny": {"verify", "export-training", "strip"}, "trained": {"verify", "upscale", "strip"}}
    assert set(ours) == expected.get(kind, {"verify"})
    monkeypatch.chdir(tmp_path)
    for command in ours.values():
        run(*command)
    full = dm.report(folder, verification=dm.verify(folder)).read_text()
    assert "deus-merge verify" not in full.partition("Next steps")[2].partition("<h3>Documentation")[0]


def test_the_documentation_is_the_one_of_the_package(outputs, monkeypatch, tmp_path):
    class Metadata(dict):
        def get_all(self, name):
            return self[name]

    def page(urls):
        monkeypatch.setattr(frame.importlib.metadata, "metadata", lambda name: Metadata({"Project-URL": urls}))
        return dm.report(outputs["linear"], tmp_path / "page.html").read_text()

    assert "docs/training.md" in page(None)
    assert "docs/training.md" in page(["Documentation, javascript:alert(1)"])
    linked = page(["Source, https://one.example/", "Documentation, https://docs.example/deus?a=1&b"])
    check_stands_alone(linked)
    assert 'href="https://docs.example/deus?a=1&amp;b"' in linked and "docs/training.md" not in linked


def test_no_folder_of_the_machine_in_the_checks(outputs):
    manifest = read_manifest(outputs["tiny"])
    detail = "cannot read /home/somebody/models/base/model.safetensors: 1/2 of (/srv/x/y.json), see ./a/b and ~/c/d"
    check = {"name": "copied tensors", "passed": False, "detail": detail, "seconds": 0.1}
    text = render_page(manifest, "", {"checks": [check]}, folder="out")
    assert "cannot read model.safetensors: 1/2 of (y.json), see ./a/b and ~/c/d" in text
    assert "1 check failed" in text and "somebody" not in text and "<span>parameters" not in text


def test_terms_are_explained_once_each(pages):
    """Whatever the page calls a term has the same explanation in the list at the end, for readers without a pointer."""
    for page in pages.values():
        text = page.read_text()
        listed = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", text.partition('id="terms"')[2]))
        titles = set(re.findall('<abbr title="([^"]*)">', text))
        assert len(listed) > 4 and set(listed.values()) <= titles
        assert all(title in listed.values() or re.fullmatch(r"[\w.*]+", title) for title in titles)  # names of tensors


@pytest.mark.parametrize(
    ("form", "value", "shown"),
    [
        (number, 0.0123456, "0.0123"), (number, 9.996, "10.0"), (number, 1.0, "1.00"), (number, 0, "0"),
        (number, 123456.7, "123,000"), (number, 1.5e-5, "1.50 × 10⁻⁵"), (number, -0.5, "-0.500"),
        (number, 2e12, "2.00 × 10¹²"), (number, float("nan"), "–"), (number, None, "–"), (number, True, "–"),
        (number, 10**400, "–"), (number, 1e300, "1.00 × 10³⁰⁰"), (cosine, float("inf"), "–"), (count, [1], "–"),
        (count, 16384, "16,384"), (cosine, -0.0001, "0.000"), (cosine, 0.98765, "0.988"), (loss, 3.14159, "3.1416"),
        (seconds, 0.001, "< 0.01 s"), (seconds, 3.191, "3.19 s"), (seconds, 8000, "2 h 13 min"), (seconds, "x", "–"),
    ],
)  # fmt: skip
def test_numbers(form, value, shown):
    assert form(value) == shown


def test_a_manifest_of_an_earlier_version_has_a_page(outputs):
    """Without date, depths of sources, shapes and what cosines were before."""
    manifest = read_manifest(outputs["tiny"])
    options = {key: value for key, value in manifest.options.items() if key not in ("date", "seconds")}
    layers = tuple(
        dataclasses.replace(
            layer,
            diagnostics=tuple({k: v for k, v in line.items() if "before" not in k} for line in layer.diagnostics),
        )
        for layer in manifest.layers
    )
    sources = tuple(dataclasses.replace(source, layers=None) for source in manifest.sources)
    old = dataclasses.replace(manifest, options=options, layers=layers, sources=sources)
    text = render_page(old, "", {"checks": []}, folder="out")
    check_stands_alone(text)
    assert "Written by deus_merge" in text and "→</i>" not in text and "tiny: 6 → 9 layers" in text
