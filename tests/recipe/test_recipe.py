"""What recipes mean: round trips, gradients, filters, precedence, places of new layers, mergekit's own recipes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support import load, make_model, save_tokenizer, train_tokenizer, weights, write_recipe

from deus_merge import api
from deus_merge.core.errors import RecipeError
from deus_merge.core.located import Located, locate
from deus_merge.models.reference import ModelRef
from deus_merge.recipe.parameters import Filtered, Gradient, evaluate
from deus_merge.recipe.presets import PRESETS, expand
from deus_merge.recipe.reader import parse_recipe
from deus_merge.recipe.types import Upscale
from deus_merge.recipe.writer import dump_recipe


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def other(base):
    return make_model(base.parent / "other", seed=1)


# round trips ----------------------------------------------------------------------------------------------------------


def without_places(value: object) -> object:
    """A recipe without the places of its values."""
    if isinstance(value, Located):
        return value.plain()
    if is_dataclass(value):
        return type(value).__name__, {
            f.name: without_places(getattr(value, f.name)) for f in fields(value) if f.compare
        }
    if isinstance(value, Mapping):
        return {name: without_places(v) for name, v in value.items()}
    return tuple(map(without_places, value)) if isinstance(value, tuple | list) else value


NUMBERS = st.floats(-10, 10) | st.integers(-10, 10) | st.sampled_from(["1e-3", "2.5E+2"])
GRADIENTS = st.lists(NUMBERS, min_size=1, max_size=5)
PATTERNS = st.sampled_from(["mlp", "self_attn", "layers.1.", "ü: #", "1"])
FILTERS = st.lists(
    st.fixed_dictionaries({"value": NUMBERS | GRADIENTS}, optional={"filter": PATTERNS}), min_size=1, max_size=3
)
SETTINGS = NUMBERS | GRADIENTS | FILTERS
NAMES = st.sampled_from(["org/one", "org/two@main", "./a folder", "1e3", "null", "yes", "ü"])
METHODS = {"passthrough": ("scale", 1), "linear": ("weight", 3), "slerp": ("t", 2)}


@st.composite
def slices(draw):
    method = draw(st.sampled_from(sorted(METHODS)))
    parameter, count = METHODS[method]
    start, length = draw(st.integers(0, 50)), draw(st.integers(1, 50))
    part = {"merge_method": method, "sources": []}
    for _ in range(count):
        source = {"model": draw(NAMES)}
        if draw(st.booleans()):
            source["layer_range"] = [start, start + length]
        if parameter != "t" and draw(st.booleans()):
            source["parameters"] = {parameter: draw(SETTINGS)}
        part["sources"].append(source)
    if draw(st.booleans()):
        part["parameters"] = {parameter: draw(SETTINGS)}
    if draw(st.booleans()):
        part["base_model"] = draw(NAMES)
    return part


UPSCALES = st.fixed_dictionaries(
    {"base_model": NAMES, "upscale": st.fixed_dictionaries(
        {"preset": st.sampled_from(sorted(PRESETS))},
        optional={
            "insert": st.sampled_from(["all", {"every": 2}, {"after": [1, 5]}, {"count": 3, "where": "even"}]),
            "parameters": st.dictionaries(st.sampled_from(["t", "reg"]), NUMBERS | GRADIENTS, max_size=2),
        },
    )}
)  # fmt: skip
_TOKEN = {"kind": st.just("model_token"), "model": NAMES}
TOKENS = st.fixed_dictionaries(
    {
        "source": NAMES
        | st.just({"kind": "zero"})
        | st.fixed_dictionaries(_TOKEN | {"token": NAMES})
        | st.fixed_dictionaries(_TOKEN | {"token_id": st.integers(0, 9)})
    },
    optional={"force": st.booleans()},
)
TOKENIZER = st.fixed_dictionaries(
    {},
    optional={
        "source": st.sampled_from(["base", "union"]) | NAMES,
        "tokens": st.dictionaries(NAMES, TOKENS | st.just({}), max_size=2),
        "pad_to_multiple_of": st.integers(1, 64),
    },
)
SLICES = st.fixed_dictionaries(
    {"slices": st.lists(slices(), min_size=1, max_size=3)},
    optional={
        "base_model": NAMES,
        "dtype": st.sampled_from(["bfloat16", "float32"]),
        "out_dtype": st.just("float16"),
        "tokenizer_source": st.sampled_from(["base", "union"]) | NAMES,
        "chat_template": st.sampled_from(["auto", "{% for m in messages %}\n{{ m }}  \n{% endfor %}\n"]),
    },
)


@settings(deadline=None)
@given(SLICES | UPSCALES, st.none() | TOKENIZER)
def test_recipes_round_trip(data, tokenizer):
    """What is dumped reads back as the same recipe, whatever its strings and numbers look like to YAML."""
    if tokenizer is not None:
        data = {key: value for key, value in data.items() if key != "tokenizer_source"} | {"tokenizer": tokenizer}
    recipe = parse_recipe(yaml.safe_dump(data, allow_unicode=True))
    text = dump_recipe(recipe)
    again = parse_recipe(text)
    assert without_places(again) == without_places(recipe)
    assert dump_recipe(again) == text


def test_dumped_recipes_run_from_anywhere(run, tmp_path, monkeypatch):
    """Relative names become absolute, those of tokenizers' models too; text that looks like a number is one."""
    base = save_tokenizer(make_model(tmp_path / "models/base"), train_tokenizer())
    recipe = write_recipe(
        tmp_path / "recipe.yml",
        "base_model: ./base\ntokenizer: {source: ./base, tokens: {<s>: {source: ./base, force: true}}}\nupscale:\n"
        "  parameters: {reg: 1e-1, max_iterations: 1e3, layers_per_gap: '2'}\n",
    )
    monkeypatch.chdir(base.parent)
    resolved = run("plan", recipe, "--expand", "--private-paths").out
    written = run("plan", recipe, "--json").json()
    monkeypatch.chdir(tmp_path)
    again = run("plan", write_recipe(tmp_path / "resolved.yml", resolved), "--json").json()
    numbers = api.upscale_recipe(base, parameters={"reg": 0.1, "max_iterations": 1000, "layers_per_gap": 2})
    numbers = replace(numbers, tokenizer=parse_recipe(resolved).tokenizer)
    assert written["plan_hash"] == again["plan_hash"] == api.plan(numbers).hash
    assert written["num_layers"] == 8


# what a setting is for one tensor -------------------------------------------------------------------------------------

FLOATS = st.lists(st.floats(-100, 100), min_size=1, max_size=8)
POSITIONS = st.floats(0, 1)


@given(FLOATS, POSITIONS)
def test_gradients_interpolate(values, position):
    gradient = Gradient(tuple(values))
    assert gradient.at(0) == values[0] and gradient.at(1) == values[-1]
    assert min(values) - 1e-9 <= gradient.at(position) <= max(values) + 1e-9
    for i, value in enumerate(values[:-1]):
        assert gradient.at(i / (len(values) - 1)) == pytest.approx(value, abs=1e-9)
    mirrored = Gradient(tuple(reversed(values)))
    assert mirrored.at(1 - position) == pytest.approx(gradient.at(position), abs=1e-9)


@given(FLOATS, POSITIONS, POSITIONS)
def test_rising_gradients_rise(values, one, two):
    gradient = Gradient(tuple(sorted(values)))
    low, high = sorted((one, two))
    assert gradient.at(low) <= gradient.at(high) + 1e-9


FILTER_LISTS = st.lists(st.tuples(st.sampled_from([None, "q", "k", "qk", "mlp"]), st.integers()), max_size=5)


@given(FILTER_LISTS, st.sampled_from(["q", "qk", "mlp.q", "norm"]), POSITIONS)
def test_the_first_filter_that_matches_wins(entries, name, position):
    matching = [value for pattern, value in entries if pattern is None or pattern in name]
    found = evaluate(Filtered(tuple(entries)), name, position)
    assert found == (matching[0] if matching else None)
    nested = Filtered(tuple((p, Gradient((float(v % 7), float(v % 5)))) for p, v in entries))
    expected = Gradient((float(matching[0] % 7), float(matching[0] % 5))).at(position) if matching else None
    assert evaluate(nested, name, position) == expected


@pytest.mark.parametrize("levels", list(itertools.product([False, True], repeat=3)))
def test_source_before_slice_before_global_before_default(base, levels):
    def given_at(level: int) -> dict:
        return {"parameters": {"scale": [{"filter": "mlp", "value": level + 2}]}} if levels[level] else {}

    source = {"model": str(base), "layer_range": [0, 1], **given_at(2)}
    data = {"merge_method": "passthrough", "slices": [{"sources": [source], **given_at(1)}], **given_at(0)}
    plan = api.plan(parse_recipe(yaml.safe_dump(data)))
    scales = {o.role: o.source_parameters[0]["scale"] for block in plan.blocks for o in block.outputs}
    expected = max((level + 2 for level in range(3) if levels[level]), default=1)
    assert {scales["gate"], scales["up"], scales["down"]} == {expected}
    assert {s for role, s in scales.items() if role not in ("gate", "up", "down")} == {1}  # no filter: the default


# where presets put new layers -----------------------------------------------------------------------------------------

FUSING = [name for name, preset in PRESETS.items() if preset.parameters is not None]
REF = ModelRef("base")


def unfold(parts) -> list:
    """The output layers of one model's slices: base layers as numbers, new layers as pairs."""
    layers = []
    for part in parts:
        ranges = [range(*s.layer_range) for s in part.sources]
        if part.merge_method == "passthrough":
            layers += ranges[0]
        elif len(ranges) == 2:
            layers += zip(*ranges, strict=True)
        else:
            layers += [x for pair in itertools.pairwise(ranges[0]) for x in (pair[0], pair)] + [ranges[0][-1]]
    return layers


def placed(preset: str, insert: object, n: int) -> list:
    form = None if insert is None else locate(insert, "upscale.insert")
    return unfold(expand(Upscale(preset, form), REF, n))


def forms(n: int, last: int):
    """Insert forms and the number of new layers that each must give; ``last`` is the last layer that one may follow."""
    yield from [("all", n - 1), ("top_half", n // 2), ("bottom_half", n // 2), ("even", n // 2)]
    yield from [({"every": k}, (last + 1) // k) for k in range(1, n + 1)]
    yield from [({"after": list(range(i, last + 1, 3))}, len(range(i, last + 1, 3))) for i in range(last + 1)]
    for where in ("top", "middle", "bottom", "even", "sandwich"):
        yield from [({"count": m, "where": where}, m) for m in range(1, n)]
    yield {"count": 1}, 1


@pytest.mark.parametrize("preset", ["opt_deus", "llama_pro"])
@pytest.mark.parametrize("n", range(2, 41))
def test_base_layers_stay_in_order_and_new_ones_stand_between(preset, n):
    last = n - 1 if PRESETS[preset].after_last else n - 2
    for form, count in forms(n, last):
        if count == 0:
            with pytest.raises(RecipeError, match="inserts no layer"):
                placed(preset, form, n)
            continue
        layers = placed(preset, form, n)
        assert [x for x in layers if isinstance(x, int)] == list(range(n)), form
        assert len(layers) == n + count, form
        for at, x in enumerate(layers):
            if isinstance(x, tuple):  # directly after its lower neighbour, before the upper one
                assert x == (layers[at - 1], min(layers[at - 1] + 1, n - 1)), form


@pytest.mark.parametrize("preset", FUSING)
@pytest.mark.parametrize(("n", "total"), [(32, 48), (16, 24)])
def test_the_papers_placement(preset, n, total):
    """Base layers of the lower half first, then a new one in every gap of the upper half (`ot_fuse` section 5)."""
    layers = placed(preset, "top_half", n)
    half = n // 2
    assert len(layers) == total
    assert layers[:half] == list(range(half))
    assert [at for at, x in enumerate(layers) if isinstance(x, tuple)] == list(range(half, total - 1, 2))
    assert layers[half::2] == [(i, i + 1) for i in range(half - 1, n - 1)]


@pytest.mark.parametrize("n", range(2, 41))
def test_even_places(n):
    """Half as many as layers, as far apart as they can be; the default."""
    layers = placed("opt_deus", "even", n)
    assert layers == placed("opt_deus", None, n) == placed("opt_deus", {"count": n // 2, "where": "even"}, n)
    places = [x[0] for x in layers if isinstance(x, tuple)]
    assert {b - a for a, b in itertools.pairwise(places)} <= {1, 2}
    assert places[0] in (0, 1) and places[-1] in (n - 3, n - 2)


@pytest.mark.parametrize("where", ["top", "middle", "bottom", "even", "sandwich"])
def test_counted_places(where):
    """8 layers, 3 new ones."""
    after = [x[0] for x in placed("opt_deus", {"count": 3, "where": where}, 8) if isinstance(x, tuple)]
    expected = {"top": [4, 5, 6], "middle": [2, 3, 4], "bottom": [0, 1, 2], "even": [1, 3, 5], "sandwich": [0, 5, 6]}
    assert after == expected[where]


@pytest.mark.parametrize("n", range(2, 41))
def test_repeating_presets(n):
    for added in range(2 - n % 2, n + 1, 2):
        layers = placed("solar", {"count": added}, n)
        m = (n - added) // 2
        assert layers == [*range(n - m), *range(m, n)] and len(layers) == n + added
    assert placed("stack", {"count": 2 * n}, n) == 3 * list(range(n))
    for added, where in itertools.product(range(1, n + 1), ("top", "middle", "bottom")):
        layers = placed("stack", {"count": added, "where": where}, n)
        seam = next(at for at in range(1, len(layers)) if layers[at] <= layers[at - 1])
        assert layers[:seam] + layers[seam + added :] == list(range(n))  # one block is repeated in its place
        assert layers[seam - added : seam] == layers[seam : seam + added]


def test_repeats_by_default():
    assert len(placed("solar", None, 32)) == 48 and placed("stack", None, 5) == 2 * list(range(5))


def test_golden_expansion_of_top_half():
    recipe = parse_recipe("base_model: base\ndtype: bfloat16\nupscale: {preset: average, insert: top_half}\n")
    spelled_out = replace(recipe, slices=expand(recipe.upscale, recipe.base_model, 32), upscale=None)
    assert (
        dump_recipe(spelled_out)
        == """\
base_model: base
dtype: bfloat16
slices:
- merge_method: passthrough
  sources:
  - model: base
    layer_range: [0, 15]
- merge_method: ot_fuse
  parameters: {alignment: none, restore_norm: none, t: 0.5, zero_init: false}
  sources:
  - model: base
    layer_range: [15, 32]
"""
    )  # noqa: E501


# mergekit's recipes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def merge(run, base, other, tmp_path, monkeypatch):
    """Run a recipe in the folder of the models; gives the output's folder."""
    monkeypatch.chdir(base.parent)

    def call(text: str):
        run("merge", write_recipe(tmp_path / "recipe.yml", text), tmp_path / "out")
        return tmp_path / "out"

    return call


def test_frankenmerge_with_a_filter(merge, base):
    out = merge("""
slices:
- sources:
  - model: base
    layer_range: [0, 3]
- sources:
  - model: base
    layer_range: [1, 4]
    parameters:
      scale:
      - filter: o_proj
        value: 0.0
      - filter: down_proj
        value: 0.5
      - value: 1.0
merge_method: passthrough
dtype: float32
""")
    ours, theirs = weights(out), weights(base)
    assert load(out).config.num_hidden_layers == 6
    for j, i in enumerate([0, 1, 2, 1, 2, 3]):
        for name in ("self_attn.o_proj", "mlp.down_proj", "mlp.up_proj", "input_layernorm"):
            factor = {"self_attn.o_proj": 0.0, "mlp.down_proj": 0.5}.get(name, 1.0) if j >= 3 else 1.0
            stored = theirs[f"model.layers.{i}.{name}.weight"]
            assert torch.equal(ours[f"model.layers.{j}.{name}.weight"], stored * factor), (j, name)


def test_slerp_with_gradients_in_filters(merge, base, other):
    out = merge("""
slices:
  - sources:
      - model: base
        layer_range: [0, 4]
      - model: other
        layer_range: [0, 4]
merge_method: slerp
base_model: base
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float32
""")
    ours, zero, one = weights(out), weights(base), weights(other)
    for name, tensor in ours.items():
        first, last = "layers.0." in name, "layers.3." in name
        at_zero = ("self_attn" in name and first) or ("mlp" in name and last)
        at_one = ("self_attn" in name and last) or ("mlp" in name and first)
        same = [torch.allclose(tensor, side[name], atol=1e-6) for side in (zero, one)]
        assert same == [at_zero, at_one], name


def test_linear_of_whole_models(merge, base, other):
    """`models:`, with long model references and weights that do not sum to one."""
    out = merge("""
models:
  - model: {model: {path: base}}
    parameters: {weight: 1.0}
  - model: {path: other}
    parameters: {weight: 0.25}
merge_method: linear
dtype: float32
""")
    ours, a, b = weights(out), weights(base), weights(other)
    for name in a:
        assert torch.allclose(ours[name], 0.8 * a[name] + 0.2 * b[name], atol=1e-6), name


def test_a_folder_whose_name_looks_like_a_revision(merge, base):
    folder = base.parent / "base@v2"
    if not folder.exists():
        make_model(folder, layers=2, seed=2)
    for reference in ("base@v2", "{path: base, revision: v2}"):
        out = merge(f"merge_method: passthrough\nslices:\n  - sources: [{{model: {reference}}}]\n")
        assert weights(out).keys() == weights(folder).keys()
        out.rename(out.with_name(f"done-{len(reference)}"))


def test_sources_with_and_without_a_range(base):
    """A source without a layer_range gives all its layers; only their number must agree."""
    deep = base.parent / "deep"
    if not deep.exists():
        make_model(deep, layers=6)
    text = f"merge_method: linear\nslices:\n  - sources: [{{model: {base}}}, {{model: {deep}, layer_range: [1, 5]}}]\n"
    text += "parameters: {weight: 1}\n"
    plan = api.plan(parse_recipe(text))
    assert [[s["layer"] for s in layer["sources"]] for layer in plan.layer_map()] == [[i, i + 1] for i in range(4)]
