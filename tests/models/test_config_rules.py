"""config.json: checks against tensors, other depths and dtypes, and the keys of sections; without any file."""

from __future__ import annotations

import copy

import pytest

from deus_merge.core.errors import ArchitectureError, PlanError
from deus_merge.models.config_json import section, value_at, with_section
from deus_merge.models.config_rules import (
    LayerEntries,
    check_config,
    config_patch,
    deeper_config,
    typed_config,
    widened_config,
)
from deus_merge.models.head_layout import layer_heads
from deus_merge.models.view import view_model

PATH = ("num_hidden_layers",)
CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 64, "tie_word_embeddings": False,
}  # fmt: skip


def shapes(head: int = 8, **other: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of CONFIG's tensors with heads of this size."""
    layer = {
        "input_layernorm.weight": (32,), "post_attention_layernorm.weight": (32,),
        "self_attn.q_proj.weight": (4 * head, 32), "self_attn.k_proj.weight": (2 * head, 32),
        "self_attn.v_proj.weight": (2 * head, 32), "self_attn.o_proj.weight": (32, 4 * head),
        "mlp.gate_proj.weight": (48, 32), "mlp.up_proj.weight": (48, 32), "mlp.down_proj.weight": (32, 48),
    }  # fmt: skip
    found = {"model.embed_tokens.weight": (64, 32), "model.norm.weight": (32,), "lm_head.weight": (64, 32)}
    found |= {f"model.layers.{i}.{name}": shape for i in range(3) for name, shape in layer.items()}
    return found | other


def check(config: dict, sizes: dict[str, tuple[int, ...]]) -> None:
    check_config(config, view_model(config, tuple(sizes), "here"), sizes, "here")


def test_configs_that_fit():
    check(CONFIG, shapes())
    check(CONFIG | {"head_dim": 6}, shapes(head=6))  # the head size is not always d / H
    check({k: v for k, v in CONFIG.items() if k != "vocab_size"}, shapes())  # what a config lacks is not compared
    check(CONFIG | {"layer_types": ["full_attention"] * 3}, shapes())
    known = {name: shape for name, shape in shapes().items() if "up_proj" not in name}  # of codes, no shape is known
    check_config(CONFIG, view_model(CONFIG, tuple(shapes()), "here"), known, "here")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.self_attn.q_proj.weight", (24, 32)),
        ("model.layers.1.self_attn.k_proj.weight", (32, 32)),
        ("model.layers.1.self_attn.v_proj.weight", (32, 32)),
        ("model.layers.1.self_attn.o_proj.weight", (32, 16)),
        ("model.layers.2.mlp.down_proj.weight", (32, 32)),
        ("model.layers.2.mlp.up_proj.weight", (48, 48)),
        ("model.embed_tokens.weight", (65, 32)),
        ("lm_head.weight", (64, 31)),
    ],
)
def test_each_matrix_is_compared(name, shape):
    with pytest.raises(ArchitectureError, match=f"config.json does not fit {name}") as caught:
        check(CONFIG, shapes(**{name: shape}))
    assert caught.value.expected == f"shape {list(shapes()[name])}" and caught.value.got == list(shape)


@pytest.mark.parametrize("count", [2, 4])
def test_layer_types_have_the_depth(count):
    with pytest.raises(ArchitectureError, match="layer_types does not fit the depth"):
        check(CONFIG | {"layer_types": ["full_attention"] * count}, shapes())


def test_heads():
    view = view_model(CONFIG, tuple(shapes()), "here")
    heads = layer_heads(CONFIG, view)
    assert heads is not None and (heads.query, heads.key_value, heads.size, heads.rotary) == (4, 2, 8, "phases")
    assert layer_heads(CONFIG | {"num_attention_heads": 0}, view) is None
    for shape in ({"q": (64, 32)}, {"o": (32, 64)}):  # what the config leaves out is in the shapes
        assert layer_heads(CONFIG, view, 0, shape).size == 16
    assert layer_heads(CONFIG | {"num_attention_heads": "4"}, view) is None
    assert layer_heads(CONFIG | {"num_key_value_heads": 3}, view).mismatch is not None


def entries(config: dict, layers: list[int]) -> list[LayerEntries]:
    return [LayerEntries(config, layer, "model", PATH) for layer in layers]


def test_lists_follow_their_layers():
    config = CONFIG | {"layer_types": ["a", "b", "c"], "eos_token_id": [1, 2, 3], "architectures": ["x", "y", "z"],
                       "other": [7, 8]}  # fmt: skip
    before = copy.deepcopy(config)
    deeper = deeper_config(config, PATH, entries(config, [0, 1, 1, 2]), "here")
    assert deeper == config | {"num_hidden_layers": 4, "layer_types": ["a", "b", "b", "c"]}
    assert list(deeper) == list(config) and config == before


def test_numbers_follow_their_layers():
    config = CONFIG | {"fullatt_block_indexes": [0, 2]}
    for layers, numbers in (([0, 1, 2], [0, 2]), ([0, 1, 1, 2], [0, 3]), ([0, 2, 1], [0, 1]), ([1], [])):
        deeper = deeper_config(config, PATH, entries(config, layers), "here")
        assert deeper == config | {"num_hidden_layers": len(layers), "fullatt_block_indexes": numbers}


def test_numbers_that_belong_to_something_else_must_stay_valid():
    config = CONFIG | {"deepstack_visual_indexes": [0, 2]}
    moved = deeper_config(config, PATH, entries(config, [0, 1, 1, 2]), "here")
    assert moved["deepstack_visual_indexes"] == [0, 3]
    for layers in ([0, 1], [0, 0, 1, 2]):
        with pytest.raises(PlanError, match="deepstack_visual_indexes refers to layers by index"):
            deeper_config(config, PATH, entries(config, layers), "here")


def test_a_model_without_what_the_donor_says():
    config = CONFIG | {"layer_types": ["a", "b", "c"]}
    with pytest.raises(PlanError, match="no 'layer_types', which the donor has"):
        deeper_config(config, PATH, [*entries(config, [0]), *entries(CONFIG, [1])], "here")
    with pytest.raises(PlanError, match="the donor's config.json has no 'layer_types'"):
        deeper_config(CONFIG, PATH, [*entries(CONFIG, [0]), *entries(config, [1])], "here")


def test_dtypes():
    assert typed_config({"dtype": "float32", "torch_dtype": "float32"}, "BF16") == {
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    assert typed_config({}, "F16") == {"torch_dtype": "float16"}
    assert typed_config({"dtype": "float32"}, None) == {"dtype": "float32"}
    half = {"dtype": "bfloat16"}
    assert widened_config(half, ["BF16"]) is half and widened_config(half, []) is half
    assert widened_config(half, ["F32"]) == {"dtype": "float32"}
    assert widened_config({"dtype": "float32"}, ["BF16"]) == {"dtype": "float32"}  # never narrower than declared
    assert widened_config({"dtype": 3}, ["F32"]) == {"dtype": 3}


def test_patches_turn_one_config_into_another():
    old = {"a": 1, "gone": 2, "inner": {"x": 1, "y": 2}, "same": [1]}
    new = {"a": 3, "inner": {"x": 1, "z": None}, "same": [1], "fresh": None}
    assert config_patch(old, new) == {"gone": None, "a": 3, "inner": {"y": None, "z": None}, "fresh": None}
    assert config_patch(old, old) == {}


def test_sections():
    config = {"a": 1, "text_config": {"num_layers": 2}, "z": 3}
    path = ("text_config", "num_layers")
    assert section(config, path) == {"num_layers": 2}
    assert section(config, ("a",)) is config and section(config, ()) is config
    replaced = with_section(config, path, {"num_layers": 5})
    assert replaced == {"a": 1, "text_config": {"num_layers": 5}, "z": 3}
    assert list(replaced) == list(config) and config["text_config"] == {"num_layers": 2}
    assert with_section(config, ("a",), {"b": 1}) == {"b": 1}
    assert value_at(config, path) == 2
    assert value_at(config, ("a", "b")) is None and value_at(config, ("none",)) is None
