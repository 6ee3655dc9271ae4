"""What a plan decides for each output tensor: parameters, dtype, source and action. No tensor is read here."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support import make_model, make_speakers, weights, write_recipe

from deus_merge import api
from deus_merge.core.tensors import Action

UP, NORM, EMBEDDINGS, HEAD = (
    "model.layers.{}.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abc"):
        make_model(folder / name, layers=4, seed=seed)
    make_model(folder / "biased", "llama_bias", layers=4, seed=3)
    make_model(folder / "shallow", layers=3, seed=5)
    make_model(folder / "half", layers=4, seed=4, dtype=torch.bfloat16)
    return folder


@pytest.fixture
def outputs(models, monkeypatch, tmp_path):
    """Name -> (block, output) of a recipe's plan."""
    monkeypatch.chdir(models)

    def call(text: str, **options) -> dict:
        plan = api.plan(write_recipe(tmp_path / "recipe.yml", text), **options)
        return {output.name: (block, output) for block, output in plan.outputs}

    return call


@pytest.mark.parametrize("first", ["source", "slice", "module", "recipe"])
def test_the_nearest_setting_holds(outputs, first):
    """A source's, else its slice's, else its module's, else the recipe's, for every tensor."""
    levels = ["source", "slice", "module", "recipe"]
    factors = {level: f"{{scale: {2 + i}}}" for i, level in enumerate(levels) if i >= levels.index(first)}
    source, piece, module = (f", parameters: {factors[n]}" if n in factors else "" for n in levels[:3])
    text = (
        f"merge_method: passthrough\nparameters: {factors['recipe']}\nmodules:\n"
        f"  default: {{slices: [{{sources: [{{model: a, layer_range: [0, 4]{source}}}]{piece}}}]{module}}}\n"
    )
    for name, (_, output) in outputs(text).items():
        assert output.source_parameters[0]["scale"] == 2 + levels.index(first), name


def test_a_filter_meets_the_name_in_the_source(outputs):
    """Layer 1 of a becomes layer 0 of the output."""
    text = (
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [1, 3], parameters: "
        "{scale: [{filter: layers.1.mlp.up, value: 0.5}, {value: 1}]}}]\n"
    )
    found = outputs(text)
    assert found[UP.format(0)][1].source_parameters[0]["scale"] == 0.5
    assert found[UP.format(1)][1].source_parameters[0]["scale"] == 1


def test_gradients_go_from_the_first_layer_of_a_slice_to_its_last(outputs):
    text = (
        "merge_method: slerp\nbase_model: a\nslices:\n- sources: [{model: a, layer_range: [0, 4]}, "
        "{model: b, layer_range: [0, 4]}]\nparameters: {t: [0, 0.3]}\n"
    )
    found = outputs(text)
    ts = [found[UP.format(i)][1].parameters["t"] for i in range(4)]
    assert ts == pytest.approx([0, 0.1, 0.2, 0.3])
    one = text.replace("[0, 4]", "[2, 3]")
    assert outputs(one)[UP.format(0)][1].parameters["t"] == pytest.approx(0.3)  # as in mergekit
    grown = "base_model: a\nslices:\n- merge_method: ot_fuse\n  sources: [{model: a, layer_range: [%s]}]\n"
    grown += "  parameters: {t: [0.2, 0.8]}\n"
    found = outputs(grown % "0, 4")
    assert [found[UP.format(i)][1].parameters["t"] for i in (1, 3, 5)] == pytest.approx([0.2, 0.5, 0.8])
    assert outputs(grown % "0, 2")[UP.format(1)][1].parameters["t"] == pytest.approx(0.8)


def test_embeddings_follow_the_first_slice_and_the_head_the_last(outputs):
    text = (
        "base_model: a\nslices:\n"
        "- {merge_method: linear, sources: [{model: a, layer_range: [0, 2], parameters: {weight: 0.4}},"
        " {model: b, layer_range: [0, 2], parameters: {weight: 0.6}}]}\n"
        "- {merge_method: passthrough, sources: [{model: c, layer_range: [2, 4]}]}\n"
    )
    found = outputs(text)
    assert found[EMBEDDINGS][0].method == "linear" and found[EMBEDDINGS][1].action is Action.COMPUTE
    for name in (NORM, HEAD):  # of c alone they would not fit the donor's vocabulary
        block, output = found[name]
        assert output.action is Action.COPY and block.sources[output.source].model == 0
    scaled = "merge_method: passthrough\nmodels: [{model: a}]\nparameters: {scale: 0.5}\n"
    assert all(output.action is Action.COMPUTE for _, output in outputs(scaled).values())
    head, first = (
        "- {merge_method: linear, sources: [{model: a, layer_range: [2, 4], parameters: {weight: 0.4}},"
        " {model: b, layer_range: [2, 4], parameters: {weight: 0.6}}]}\n",
        "- {merge_method: passthrough, sources: [{model: a, layer_range: [0, 2]}]}\n",
    )
    found = outputs(f"base_model: a\nslices:\n{first}{head}")
    assert found[EMBEDDINGS][1].action is Action.COPY
    assert found[NORM][1].action is found[HEAD][1].action is Action.COMPUTE


def test_out_dtype_is_what_is_written(outputs):
    text = "merge_method: passthrough\nmodels: [{model: a}]\ndtype: float32\nout_dtype: float16\n"
    assert {(o.dtype, o.action) for _, o in outputs(text).values()} == {("F16", Action.CAST)}
    mixed = "merge_method: linear\nmodels: [{model: half}, {model: a}]\nparameters: {weight: 1}\n"
    assert {o.dtype for _, o in outputs(mixed).values()} == {"F32"}


def test_whole_numbers_stay_what_they_are(run, models, tmp_path):
    """Beside float weights a checkpoint may hold counters or masks: no dtype of a recipe is theirs."""
    base = shutil.copytree(models / "a", tmp_path / "base")
    tensors = weights(base) | {"counter": torch.tensor([7, 300]), "model.layers.2.mask": torch.tensor([True, False])}
    tensors |= {f"model.layers.{i}.mask": torch.tensor([True, False]) for i in range(4)}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    text = f"merge_method: passthrough\ndtype: bfloat16\nmodels: [{{model: {base}}}]\n"
    run("merge", write_recipe(tmp_path / "recipe.yml", text), tmp_path / "out", "--no-verify")
    ours = weights(tmp_path / "out")
    for name, tensor in ours.items():
        if tensors[name].is_floating_point():
            assert tensor.dtype == torch.bfloat16
        else:
            assert tensor.dtype == tensors[name].dtype and tensor.equal(tensors[name]), name
    scaled = text.replace(f"model: {base}", f"model: {base}, parameters: {{scale: 0.5}}")
    said = run("plan", write_recipe(tmp_path / "recipe.yml", scaled), expect=2).err
    assert "cannot be merged" in said and "floating point" in said


def test_sources_are_aligned_to_the_base_model_else_to_the_last(outputs):
    linear = (
        "merge_method: linear\nalign: symmetry\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}, {model: c}]\n"
    )
    blocks = {b.index: b for b, _ in outputs(linear).values() if b.layers}
    assert {b.align.target for b in blocks.values()} == {2}
    slerp = (
        "merge_method: slerp\nalign: symmetry\nparameters: {t: 1}\nbase_model: a\nmodels: [{model: a}, {model: b}]\n"
    )
    blocks = {b.index: b for b, _ in outputs(slerp).values() if b.layers}
    assert {b.align.target for b in blocks.values()} == {0}
    alone = linear.replace("parameters: {weight: 1}\n", "").replace("model: ", "parameters: {weight: 0}, model: ")
    for weighted, action in (("a", Action.ALIGN), ("c", Action.COPY)):
        text = alone.replace(
            f"parameters: {{weight: 0}}, model: {weighted}", f"parameters: {{weight: 1}}, model: {weighted}"
        )
        assert {o.action for b, o in outputs(text).values() if b.layers} == {action}
    none = alone.replace("symmetry", "none").replace("weight: 0}, model: a", "weight: 1}, model: a")
    assert {o.action for b, o in outputs(none).values() if b.layers} == {Action.COPY}


def test_a_bias_is_zeroed_with_its_projection(run, models, outputs, tmp_path):
    """A zeroed projection that left its bias would add that to the residual stream."""
    for zeroed, other in (("o", "mlp.down_proj"), ("down", "self_attn.o_proj")):
        run("upscale", models / "biased", tmp_path / zeroed, "--insert", "{after: [1]}", "-p", f"zero_init=[{zeroed}]")
        ours = {n: t for n, t in weights(tmp_path / zeroed).items() if n.startswith("model.layers.2.")}
        for name, tensor in ours.items():
            writes = name.split(".", 3)[3].rsplit(".", 1)[0] in ("self_attn.o_proj", "mlp.down_proj")
            assert bool(tensor.any()) == (not writes or other in name), name


def test_layers_of_a_gap_lean_to_the_nearer_neighbour(run, models, tmp_path):
    run("upscale", models / "a", tmp_path / "out", "--insert", "{after: [1]}", "-p", "layers_per_gap=3", "-p",
        "alignment=none", "-p", "zero_init=false", "-p", "restore_norm=none")  # fmt: skip
    ours, theirs = weights(tmp_path / "out"), weights(models / "a")
    low, high = (theirs[UP.format(i)].double() for i in (1, 2))
    for slot, t in enumerate((0.25, 0.5, 0.75)):
        wanted = (1 - t) * low + t * high
        assert (ours[UP.format(2 + slot)].double() - wanted).abs().max() < 1e-6


def test_the_ends_of_t_are_copies(outputs, run, models, tmp_path):
    """At t = 1 layer B, scaled where it is not zeroed; at t = 0 layer A, if nothing is aligned."""
    text = "base_model: a\nupscale: {{insert: {{after: [1]}}, parameters: {{t: {t}, {more}}}}}\n"
    for t, more, copied in (
        (1, "alignment: symmetry", 2), (0, "alignment: none", 1), (0, "alignment: symmetry", None),
        (0.5, "alignment: none", None),
    ):  # fmt: skip
        block, output = outputs(text.format(t=t, more=more))[UP.format(2)]
        if copied is None:
            assert output.action is Action.COMPUTE
        else:
            assert output.action is Action.COPY and block.sources[output.source].layer == copied
    run("upscale", models / "a", tmp_path / "out", "--insert", "{after: [1]}", "-p", "t=1", "-p", "zero_init=[o]",
        "-p", "output_scale=0.5")  # fmt: skip
    ours, theirs = weights(tmp_path / "out"), weights(models / "a")
    down = "model.layers.2.mlp.down_proj.weight"
    torch.testing.assert_close(ours[down], 0.5 * theirs[down])
    assert ours[UP.format(2)].equal(theirs[UP.format(2)])


@pytest.mark.parametrize(
    ("text", "preserved"),
    [
        ("base_model: a\nupscale: {insert: all}\n", True),
        ("base_model: a\nupscale: {insert: all, parameters: {zero_init: [o]}}\n", False),
        ("base_model: a\nupscale: {preset: average, insert: all}\n", False),
        ("merge_method: passthrough\nmodels: [{model: a}]\n", True),
        ("merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 3]}]}]\n", False),
        ("base_model: a\nmerge_method: passthrough\nslices: [{sources: [{model: b, layer_range: [0, 4]}]}]\n", False),
        ("merge_method: passthrough\ndtype: bfloat16\nmodels: [{model: a}]\n", False),
        (
            "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [1, 2]}]\n"
            "- sources: [{model: a, layer_range: [0, 1]}]\n- sources: [{model: a, layer_range: [2, 4]}]\n",
            False,
        ),
    ],
)
def test_what_keeps_the_function(models, monkeypatch, tmp_path, text, preserved):
    monkeypatch.chdir(models)
    assert api.plan(write_recipe(tmp_path / "recipe.yml", text)).function_preserving == preserved


def test_other_tokens_are_another_function(tmp_path):
    """The layers are the base's, but an id means another token."""
    speakers = make_speakers(tmp_path, layers=2)
    text = f"merge_method: passthrough\nmodels: [{{model: {speakers['base']}}}]\ntokenizer_source: "
    for tokenizer, preserved in ((speakers["base"], True), (speakers["other"], False)):
        plan = api.plan(write_recipe(tmp_path / "recipe.yml", f"{text}{tokenizer}\n"))
        assert plan.function_preserving == preserved


def test_a_layer_that_is_there_a_second_time_is_new(models, monkeypatch, tmp_path):
    monkeypatch.chdir(models)
    text = (
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 3]}]\n"
        "- sources: [{model: a, layer_range: [1, 4]}]\n"
    )
    plan = api.plan(write_recipe(tmp_path / "recipe.yml", text))
    assert plan.new_layers == (3, 4)
    assert {n.split(".")[2] for n in plan.new_parameters} == {"3", "4"}


def test_a_layer_of_another_module_is_another_layer(tmp_path):
    """Encoder and decoder both have a layer 0; neither is a repetition of the other's."""
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 8}
    config = transformers.T5Config(vocab_size=64, **sizes)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    sources = f"{{slices: [{{sources: [{{model: {tmp_path / 't5'}, layer_range: [0, 2]}}]}}]}}"
    text = f"merge_method: passthrough\nmodules:\n  encoder: {sources}\n  decoder: {sources}\n"
    plan = api.plan(write_recipe(tmp_path / "recipe.yml", text))
    assert plan.new_layers == () and plan.new_parameters == ()


def test_bytes_read_are_what_is_read(models, monkeypatch, tmp_path):
    """Zeros read nothing; several layers of one gap read their neighbours once; a cast reads the stored bytes."""
    monkeypatch.chdir(models)

    def read(text: str) -> int:
        return api.plan(write_recipe(tmp_path / "recipe.yml", text)).bytes_read

    total = sum(t.nbytes for t in weights(models / "a").values())
    layer = {n: t.nbytes for n, t in weights(models / "a").items() if ".layers.1." in n}
    zeroed = sum(size for n, size in layer.items() if "o_proj" in n or "down_proj" in n)
    assert read("merge_method: passthrough\nmodels: [{model: a}]\n") == total
    assert read("merge_method: passthrough\ndtype: bfloat16\nmodels: [{model: a}]\n") == total
    grown = "base_model: a\nupscale: {insert: {after: [1]}, parameters: {layers_per_gap: %d}}\n"
    for count in (1, 3):
        assert read(grown % count) == total + 2 * (sum(layer.values()) - zeroed)
    tuned = "name: t\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n---\n"
    assert (
        read(tuned + "merge_method: linear\nmodels: [{model: t}, {model: c}]\nparameters: {weight: 1}\n") == 4 * total
    )
    twice = "merge_method: passthrough\nslices:\n" + 2 * "- sources: [{model: t, layer_range: [0, 4]}]\n"
    layers = sum(t.nbytes for n, t in weights(models / "a").items() if ".layers." in n)
    assert read(tuned + twice) == 3 * (total + layers)  # its layers are computed a second time


def test_tokenizers_stay_behind_only_when_asked(models, monkeypatch, tmp_path):
    base = shutil.copytree(models / "a", tmp_path / "base")
    (base / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {}}}))
    (base / "LICENSE").write_text("mine")
    recipe = api.upscale_recipe(base, preset="copy_next")
    assert {"tokenizer.json", "LICENSE"} <= set(api.plan(recipe).files)
    assert set(api.plan(recipe, copy_tokenizer=False).files) == set(api.plan(recipe).files) - {"tokenizer.json"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("merge_method: slerp\nparameters: {t: 1}\nmodels: [{model: a}, {model: b}, {model: c}]\n", "exactly two"),
        (
            "merge_method: linear\nparameters: {weight: 1}\nslices:\n- sources: [{model: a, layer_range: [0, 2]},"
            " {model: b, layer_range: [0, 3]}]\n",
            "the same number of layers",
        ),
        ("merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: shallow}]\n", "4 layers"),
        ("merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 5]}]}]\n", "beyond the 4 layers"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b}]\n", "needs weight"),
        ("merge_method: ties\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n", "needs a base model"),
        ("merge_method: model_stock\nbase_model: a\nmodels: [{model: b}]\n", "takes at least 2"),
        ("merge_method: arcee_fusion\nbase_model: a\nmodels: [{model: b}, {model: c}]\n", "takes exactly 1"),
        (
            "merge_method: slerp\nbase_model: c\nparameters: {t: 1}\nslices:\n- sources: "
            "[{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]\n",
            "no source of the slice",
        ),
        ("merge_method: passthrough\nbase_model: a\nslices: [{sources: [{model: biased, layer_range: [0, 2]}]}]\n",
         "has also"),
        (
            "merge_method: della\nbase_model: a\nmodels: [{model: b, parameters: {weight: 1, density: 0.9}}]\n",
            "must be between 0 and 1",
        ),
        (
            "merge_method: multislerp\nmodels: [{model: a, parameters: {weight: 1}}, "
            "{model: b, parameters: {weight: -1}}]\n",
            "sum to 0",
        ),
    ],
)  # fmt: skip
def test_refused_before_anything_is_read(run, models, monkeypatch, tmp_path, text, told):
    monkeypatch.chdir(models)
    assert told in run("plan", write_recipe(tmp_path / "recipe.yml", text), expect=2).err


def test_a_base_model_needs_no_weight(outputs):
    text = "merge_method: ties\nbase_model: a\nmodels: [{model: a}, {model: b, parameters: {weight: 1}}]\n"
    assert outputs(text)[UP.format(0)][1].action is Action.COMPUTE


def test_layers_that_stay_take_no_parameters(outputs):
    """Of a slice that grows; what the recipe sets for other slices is not for them."""
    text = (
        "base_model: a\nparameters: {scale: 0.5}\nslices:\n"
        "- {merge_method: passthrough, sources: [{model: a, layer_range: [0, 1]}]}\n"
        "- {merge_method: ot_fuse, sources: [{model: a, layer_range: [1, 4]}]}\n"
    )
    found = {block.layers: block for block, _ in outputs(text).values() if block.layers}
    assert [found[(layer,)].how for layer in (0, 1, 3, 5)] == ["compute", "copy", "copy", "copy"]
