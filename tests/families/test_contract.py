"""The contract of every described family, which a family joins by its file being there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MODEL_TYPES, load, logits, shared, type_of

from deus_merge import training
from deus_merge.align import align_layer
from deus_merge.align.options import STEPS, AlignOptions
from deus_merge.models.facts.base import Pinned, Use
from deus_merge.models.head_layout import layer_heads
from deus_merge.models.layer_facts import LayerFacts, expand
from deus_merge.models.reference import ModelRef
from deus_merge.models.source import SourceModel
from deus_merge.recipe.presets import PRESETS

PRESERVING = [name for name, preset in PRESETS.items() if preset.function_preserving]
INSERTS = ["top_half", "all", {"every": 2}, {"after": [0, 3]}, {"count": 2, "where": "sandwich"}]


def upscaled(run, base: Path, folder: Path, preset: str = "opt_deus", insert: object = "all", **parameters) -> Path:
    recipe = {"base_model": str(base), "upscale": {"preset": preset, "insert": insert, "parameters": parameters}}
    (folder.parent / f"{folder.name}.yml").write_text(json.dumps(recipe))
    run("merge", folder.parent / f"{folder.name}.yml", folder)
    return folder


def opened(folder: Path) -> SourceModel:
    return SourceModel.open(ModelRef(str(folder)), {})


def facts_of(kind: str) -> Sequence[LayerFacts]:
    source = opened(shared(kind))
    return expand(source.checkpoint.config, source.view.layers_path, source.view.model_type)


def is_tied(kind: str) -> bool:
    """Whether the config ties layers to their numbers, so that no layer can be added."""
    return any(isinstance(value, Pinned) for layer in facts_of(kind) for value in layer.values())


def shares_results(kind: str) -> bool:
    """Whether some layers use a result of the layer below, so that no copy of that one may come between."""
    values = [value for layer in facts_of(kind) for value in layer.values()]
    return any(isinstance(value, Use) and value.layer is not None for value in values)


def skip_unless_it_grows(kind: str, identity: bool = False) -> None:
    if is_tied(kind):
        pytest.skip("the layers of this family are tied to their numbers")
    if identity and opened(shared(kind)).view.family.no_identity:
        pytest.skip("this family has no identity")


@pytest.fixture(params=MODEL_TYPES)
def kind(request):
    return request.param


def test_roles_cover_the_tensors_of_every_layer(kind):
    view = opened(shared(kind)).view
    assert view.family is not None and type_of(kind) in view.family.model_types
    for layer, specs, name in zip(view.layers, view.specs, view.kinds, strict=True):
        assert layer.keys() == specs.keys() and name
        assert any(spec.writes_residual for spec in specs.values())


@pytest.mark.parametrize("turn", range(2))
def test_new_layers_keep_the_function(run, tmp_path, kind, turn):
    """Every preset and every form of places, in turn: all of them with many families, some with each."""
    skip_unless_it_grows(kind, identity=True)
    index = 2 * MODEL_TYPES.index(kind) + turn
    preset, insert = PRESERVING[index % len(PRESERVING)], INSERTS[index % len(INSERTS)]
    if shares_results(kind):
        insert = {"after": [0, 2, 4]}
    grown = load(upscaled(run, shared(kind), tmp_path / "out", preset, insert))
    assert torch.equal(logits(grown), logits(load(shared(kind))))


def test_every_writer_is_needed_and_learns(run, tmp_path, kind):
    """One writer that keeps its weights changes the logits; and every zeroed weight gets a gradient at once."""
    skip_unless_it_grows(kind, identity=True)
    grown = load(upscaled(run, shared(kind), tmp_path / "out"))
    parameters = dict(grown.named_parameters())
    zeroed = [name for name, parameter in parameters.items() if not parameter.any()]
    manifest = json.loads((tmp_path / "out/deus_merge.json").read_text())
    assert zeroed and sum(tensor["action"] == "zeros" for tensor in manifest["tensors"].values()) >= len(zeroed)
    want = logits(grown)
    ids = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(2))
    grown.train()
    grown(ids, labels=ids, use_cache=False).loss.backward()
    for name in zeroed:
        gradient = parameters[name].grad
        assert gradient is not None and gradient.abs().max() > 0, name
    assert training.freeze_base(grown, tmp_path / "out").layers == tuple(manifest["new_layers"])
    assert all(parameters[name].requires_grad for name in zeroed)
    grown.eval()
    for name in zeroed[:: max(1, len(zeroed) // 12)]:
        with torch.no_grad():
            parameters[name].normal_()
            assert not torch.equal(logits(grown), want), name
            parameters[name].zero_()


RANGES = (([0, 3], [1, 6]), ([0, 2], [0, 6]), ([1, 6],), ([0, 4], [2, 4], [4, 6]))


def test_layers_in_another_order_are_the_base_s_own(run, tmp_path, kind):
    """The output computes what the base's own layer modules compute in that order; or the config's key is named."""
    depth = opened(shared(kind)).view.num_layers
    ranges = [[start, min(end, depth)] for start, end in RANGES[MODEL_TYPES.index(kind) % len(RANGES)] if start < depth]
    slices = [{"sources": [{"model": str(shared(kind)), "layer_range": r}]} for r in ranges]
    (tmp_path / "r.yml").write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
    done = run("merge", tmp_path / "r.yml", tmp_path / "out", expect=None)
    if done.code == 2:
        facts = facts_of(kind)
        assert "config.json's" in done.err and (is_tied(kind) or any(layer != facts[0] for layer in facts)), done.err
        return
    output, base = load(tmp_path / "out"), load(shared(kind))
    theirs, ours = stack_of(base), stack_of(output)
    order = [layer for start, end in ranges for layer in range(start, end)]
    for place, layer in enumerate(order):
        ours[place] = theirs[layer]
    got = logits(output)
    assert torch.equal(got, logits(load(tmp_path / "out"))) and got.isfinite().all()


def stack_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The list of the text layers."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)]
    return next(m for name, m in lists if name.rpartition(".")[2] in ("layers", "h", "blocks") and "visual" not in name)


def test_what_cannot_be_is_refused(run, tmp_path, kind):
    """A layer that cannot be the identity, or a place where no layer may stand, is named before a tensor is read."""
    family = opened(shared(kind)).view.family
    if not is_tied(kind) and not family.no_identity and not shares_results(kind):
        pytest.skip("all layers of this family can be added to")
    recipe = {"base_model": str(shared(kind)), "upscale": {"preset": "llama_pro", "insert": "all"}}
    (tmp_path / "r.yml").write_text(json.dumps(recipe))
    told = run("merge", tmp_path / "r.yml", tmp_path / "out", expect=2).err
    assert (family.no_identity or "config.json's") in " ".join(told.split())
    assert not (tmp_path / "out").exists()


def stored_layers(source: SourceModel, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    return [{r: source.checkpoint.read(n).to(dtype) for r, n in layer.items()} for layer in source.view.layers]


def align(source: SourceModel, layer: int, a: dict, b: dict, steps=STEPS) -> dict[str, torch.Tensor]:
    """Layer A in the order of B, both of the kind of one layer of a model; float64."""
    specs = [s for s in source.view.specs[layer].values() if not s.opaque]
    shapes = {role: tuple(x.shape) for role, x in b.items()}
    heads = layer_heads(source.checkpoint.config, source.view, layer, shapes)
    options = AlignOptions("symmetry", frozenset(steps), heads, compute_dtype="float64", zero=frozenset())
    aligned = {c.role: c.values for c in align_layer(a, b, specs, options, shapes) if c.values is not None}
    return {**a, **{role: x.to(b[role].dtype) for role, x in aligned.items()}}


def test_symmetry_keeps_the_function_and_is_undone(tmp_path, kind):
    """Every layer aligned to a random one computes what it computed; aligned back to itself it is itself."""
    source = opened(shared(kind))
    stranger = stored_layers(opened(shared(kind, 7)), torch.float64)
    tensors = {
        n: x.double() for f in source.checkpoint.files if f.suffix == ".safetensors" for n, x in load_file(f).items()
    }
    moved = 0.0
    for i, own in enumerate(stored_layers(source, torch.float64)):
        turned = align(source, i, own, stranger[i])
        moved += sum((turned[r] - own[r]).abs().sum().item() for r in own)
        back = align(source, i, turned, own)
        for role in own:
            assert (back[role] - own[role]).abs().max() < 1e-9, role
        tensors |= {source.view.layers[i][role]: x.contiguous() for role, x in turned.items()}
    (tmp_path / "turned").mkdir()
    save_file(tensors, tmp_path / "turned/model.safetensors", {"format": "pt"})
    (tmp_path / "turned/config.json").write_bytes((shared(kind) / "config.json").read_bytes())
    got, want = (logits(load(folder, torch.float64)) for folder in (tmp_path / "turned", shared(kind)))
    assert (got - want).abs().max() < 1e-10
    if any(not s.opaque and s.layout is None and s.in_space for s in source.view.specs[0].values()):
        assert moved > 0


def test_linear_is_the_mean(run, tmp_path, kind):
    two = [shared(kind), shared(kind, 7)]
    recipe = {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 0.5}} for m in two]}
    (tmp_path / "r.yml").write_text(json.dumps(recipe))
    if any(not x.is_floating_point() for x in load(two[0]).state_dict().values()):
        assert "int64" in run("merge", tmp_path / "r.yml", tmp_path / "out", expect=2).err
        return
    run("merge", tmp_path / "r.yml", tmp_path / "out")
    got, a, b = (dict(load(f).named_parameters()) for f in (tmp_path / "out", *two))
    for name in a:
        torch.testing.assert_close(got[name], (a[name] + b[name]) / 2, atol=1e-6, rtol=1e-6)


def test_generation_with_a_cache_is_the_base_s(run, tmp_path, kind):
    skip_unless_it_grows(kind, identity=True)
    models = [load(upscaled(run, shared(kind), tmp_path / "out", insert="top_half")), load(shared(kind))]
    ids = torch.arange(3, 9)[None]
    texts = [m.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False) for m in models]
    assert torch.equal(*texts) and texts[0].shape[1] == 26


def test_flows_run_on_every_kind_of_layer(run, tmp_path, kind):
    """The presets that do not zero, and the paper's alignment with outputs: finite and loaded like the base."""
    skip_unless_it_grows(kind)
    paper = MODEL_TYPES.index(kind) % 2
    more = {"zero_init": False} if paper else {}
    preset = "opt_deus_paper" if paper else "average"
    out = upscaled(run, shared(kind), tmp_path / "out", preset, {"count": 2, "where": "even"}, **more)
    assert logits(load(out)).isfinite().all()


def test_neighbouring_layers_are_compared_matrix_by_matrix(run, kind):
    """Those that both have, by the roles that alignment sees; no pair need have any."""
    facts = run("inspect", shared(kind), "--similarity", "--json").json()
    view = opened(shared(kind)).view
    assert [row["layers"] for row in facts["similarity"]] == [[i, i + 1] for i in range(view.num_layers - 1)]
    assert len(facts["layer_kinds"]) == view.num_layers
    for row in facts["similarity"]:
        assert not {"qkv", "gate_up"} & row["roles"].keys()
        for found in row["roles"].values():
            assert found["cost"] > 0 and found["aligned"] > found["plain"] - 1e-6
