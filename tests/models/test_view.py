"""Tensor names sorted into layers and roles; stacks of layers found by names. Without any file."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deus_merge.core.errors import ArchitectureError
from deus_merge.models.family import families
from deus_merge.models.stacks import depth_path, find_stacks, is_vision_or_audio, module_name
from deus_merge.models.view import prefix_of, view_model

LLAMA = families()["llama"]
NAMES = [s.name for s in LLAMA.layer if not s.optional]


def llama(depth: int, prefix: str = "model.layers", head: bool = True) -> tuple[str, ...]:
    ends = ("model.embed_tokens.weight", "model.norm.weight", *(["lm_head.weight"] if head else []))
    return (*ends, *(f"{prefix}.{i}.{name}" for i in range(depth) for name in NAMES))


def config(depth: object, **more: object) -> dict:
    return {"model_type": "llama", "num_hidden_layers": depth} | more


def test_a_described_family():
    extra = ("model.layers.1.self_attn.q_proj.bias", "model.layers.1.own.weight", "model.other")
    old = ("model.layers.0.self_attn.rotary_emb.inv_freq",)
    view = view_model(config(2), (*extra, *old, *reversed(llama(2))), "here")
    assert view.described and view.num_layers == 2 and view.layers_path == ("num_hidden_layers",)
    assert list(view.layers[0]) == [s.role for s in LLAMA.layer if not s.optional]  # in the family's order
    assert view.layers[1]["q.bias"] == extra[0] and view.layers[1]["own.weight"] == extra[1]
    assert view.before == ("model.embed_tokens.weight",)
    assert view.after == ("model.norm.weight", "lm_head.weight", "model.other")
    assert set(view.names()) == {*llama(2), *extra}  # rotary buffers are ignored
    assert {s.role for s in LLAMA.layer if s.writes_residual} == {"o", "o.bias", "down", "down.bias"}
    assert view.spec("q").out_space == "query_heads" and view.spec("own.weight") is None


@pytest.mark.parametrize("depth", [True, 0, -1, 2.0, "2", None, [2]])
def test_depths_are_positive_integers(depth):
    with pytest.raises(ArchitectureError, match="num_hidden_layers must be a positive integer"):
        view_model(config(depth), llama(1), "here")


@pytest.mark.parametrize(
    ("depth", "stored", "got"),
    [
        (4, (0, 1, 2), "3 layers, missing: 3"),
        (2, (0, 1, 2), "3 layers, up to 2"),
        (2, (0, 2), "2 layers, missing: 1"),
        (9, (8,), "1 layer, missing: 0, 1, 2, 3, 4 and 3 more"),
    ],
)
def test_depths_fit_the_tensors(depth, stored, got):
    names = (*llama(0), *(f"model.layers.{i}.{name}" for i in stored for name in NAMES))
    with pytest.raises(ArchitectureError, match="does not fit the tensors") as caught:
        view_model(config(depth), names, "here")
    assert caught.value.got == got


def test_every_layer_has_the_required_tensors():
    names = tuple(name for name in llama(3) if name != "model.layers.2.mlp.up_proj.weight")
    with pytest.raises(ArchitectureError, match="layer 2 lacks its 'up' tensor") as caught:
        view_model(config(3), names, "here")
    assert caught.value.expected == "model.layers.2.mlp.up_proj.weight"


def test_tied_embeddings_may_lack_the_head():
    assert view_model(config(1), llama(1, head=False), "here").after == ("model.norm.weight",)
    assert view_model(config(1, tie_word_embeddings=True), llama(1, head=False), "here").num_layers == 1
    with pytest.raises(ArchitectureError, match="lacks lm_head.weight"):
        view_model(config(1, tie_word_embeddings=False), llama(1, head=False), "here")
    with pytest.raises(ArchitectureError, match=r"lacks model\.norm\.weight"):
        view_model(config(1), tuple(n for n in llama(1) if n != "model.norm.weight"), "here")


def test_a_tensor_with_the_name_of_a_role():
    with pytest.raises(ArchitectureError, match="has the name of the role 'q'"):
        view_model(config(1), (*llama(1), "model.layers.0.q"), "here")


def test_prefixes_with_other_braces():
    assert prefix_of(3, "a.{layer}.") == "a.3."
    assert prefix_of(3, "a.{layer}.{layer}.") == "a.{layer}.3."  # the last one is the index


def test_the_language_model_takes_precedence_over_a_larger_tower():
    tower = [f"vision_tower.layers.{i}.{part}.weight" for i in range(8) for part in "abc"]
    text = [f"model.layers.{i}.mlp.weight" for i in range(2)]
    found = {"model_type": "new", "vision_config": {"num_hidden_layers": 8}, "text_config": {"num_hidden_layers": 2}}
    view = view_model(found, (*tower, *text), "here")
    assert view.layer_prefix == "model.layers.{layer}." and view.layers_path == ("text_config", "num_hidden_layers")
    assert not view.described and view.family is None and view.layers[1] == {"mlp.weight": text[1]}
    assert is_vision_or_audio(("vision_config", "depth")) and not is_vision_or_audio(view.layers_path)


def test_sections_of_a_described_family_have_roles():
    names = llama(2, "language.layers", head=False)
    nested = {"model_type": "new", "text_config": {"model_type": "llama", "num_hidden_layers": 2}}
    view = view_model(nested, names, "here")
    assert view.family is not None and view.family.name == "llama" and not view.described
    assert view.layers[1]["gate"] == "language.layers.1.mlp.gate_proj.weight"
    assert view.layer_prefix == view.family.layer_prefix == "language.layers.{layer}."
    lacking = tuple(n for n in names if n != "language.layers.1.mlp.gate_proj.weight")
    assert view_model(nested, lacking, "here").family is None  # one layer differs from the family's
    flat = {"model_type": "llama-like", "num_hidden_layers": 2}
    assert view_model(flat, names, "here").family is None


def test_stacks_by_names():
    names = ["a.layers.0.x", "a.layers.1.x.layers.7.y", "a.layers.01.x", "h.2.z", "a.layers.x.0", "layers.3"]
    assert find_stacks(names) == {
        "a.layers": {0: {"x": "a.layers.0.x"}, 1: {"x.layers.7.y": "a.layers.1.x.layers.7.y"}},
        "h": {2: {"z": "h.2.z"}},
    }


def test_keys_of_depths():
    sides = {"num_layers": 3, "encoder_layers": 3, "num_decoder_layers": 2, "vision_config": {"depth": 3}}
    assert depth_path(sides, "encoder.layers", 3) == ("encoder_layers",)  # its own key, before the general one
    assert depth_path(sides, "decoder.block", 2) == ("num_decoder_layers",)
    assert depth_path(sides, "model.layers", 3) == ("num_layers",)
    assert depth_path(sides, "visual.blocks", 3) == ("vision_config", "depth")
    assert depth_path(sides, "visual.blocks", 2) is None  # not the depth of another stack
    assert depth_path({"audio_config": {"encoder_layers": 4}}, "audio_tower.layers", 4) == (
        "audio_config",
        "encoder_layers",
    )
    assert depth_path({"text_config": {"n_layer": 4}}, "model.h", 4) == ("text_config", "n_layer")


def test_names_of_modules():
    assert module_name("vision.encoder.layers", ("vision_config", "depth")) == "vision_tower"
    assert module_name("audio.layers", ("audio_config", "num_layers")) == "audio_tower"
    assert module_name("model.decoder.layers", ("decoder_layers",)) == "decoder"
    assert module_name("model.layers", ("num_hidden_layers",)) == "text_decoder"


def test_the_order_of_roles_does_not_depend_on_the_process():
    """Names of a mixer have one description; in which order a set gives them depends on a seed of the interpreter."""
    names = [f"linear_attn.{name}" for name in ("A_log", "conv1d.weight", "dt_bias", "in_proj_qkvz.weight")]
    script = f"""
from deus_merge.models.family import families
print(list(families()["qwen3_next"].sort(frozenset({names})).names))
"""
    orders = {
        subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True,
                       text=True, check=True).stdout
        for seed in "1234"
    }  # fmt: skip
    assert len(orders) == 1
