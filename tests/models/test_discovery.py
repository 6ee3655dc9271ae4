"""Writers found and proved in families by transformers' own configs, at the sizes that are published."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from deus_merge.models.discovery import Discovery, find_writers

LLAMA = {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
DOWN, OUT = "mlp.down_proj.weight", "self_attn.o_proj.weight"
#: one tensor an expert on the disk, one for all in transformers
EXPERTS = {"mlp.experts.*.down_proj.weight", "mlp.experts.down_proj"}
BLOOM = {f"{part}.{kind}" for part in ("self_attention.dense", "mlp.dense_4h_to_h") for kind in ("weight", "bias")}
GPT2 = {f"{part}.c_proj.{kind}" for part in ("attn", "mlp") for kind in ("weight", "bias")}
OPT = {f"{part}.{kind}" for part in ("self_attn.out_proj", "fc2") for kind in ("weight", "bias")}
SHARED = {"mlp.shared_experts.down_proj.weight"}
#: model_type -> the writers of each kind of layer
KNOWN: dict[str, list[set[str]]] = {
    **dict.fromkeys(
        ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "cohere", "cohere2", "olmo", "olmo2",
         "olmo3", "glm", "glm4", "phi3", "smollm3", "granite", "arcee", "apertus", "exaone4", "seed_oss", "helium",
         "stablelm", "minicpm3", "diffllama", "bitnet", "gemma3", "qwen2_5_vl"],
        [LLAMA],
    ),
    "gpt2": [GPT2], "gpt_bigcode": [GPT2], "bloom": [BLOOM], "opt": [OPT], "biogpt": [OPT],
    "falcon": [{"self_attention.dense.weight", "mlp.dense_4h_to_h.weight"}],
    "gpt_neox": [{n.replace("self_attention", "attention") for n in BLOOM}],
    "persimmon": [{n.replace("self_attention", "self_attn") for n in BLOOM}],
    "phi": [{"self_attn.dense.weight", "self_attn.dense.bias", "mlp.fc2.weight", "mlp.fc2.bias"}],
    "gptj": [{"attn.out_proj.weight", "mlp.fc_out.weight", "mlp.fc_out.bias"}],
    "ctrl": [{f"{n}.{k}" for n in ("multi_head_attention.dense", "ffn.2") for k in ("weight", "bias")}],
    "mpt": [{"attn.out_proj.weight", "ffn.down_proj.weight"}],
    "starcoder2": [{OUT, "self_attn.o_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"}],
    "modernbert-decoder": [{"attn.Wo.weight", "mlp.Wo.weight"}],
    "mamba": [{"mixer.out_proj.weight"}], "mamba2": [{"mixer.out_proj.weight"}],
    "falcon_h1": [{"mamba.out_proj.weight", OUT, "feed_forward.down_proj.weight"}],
    "recurrent_gemma": [
        {f"{n}.{k}" for n in (f"temporal_block.{out}", "mlp_block.down_proj") for k in ("weight", "bias")}
        for out in ("linear_out", "o_proj")
    ],
    "jamba": [
        {"mamba.out_proj.weight", "feed_forward.down_proj.weight"},
        {"mamba.out_proj.weight", "feed_forward.experts.*.down_proj.weight", "feed_forward.experts.down_proj"},
        {OUT, "feed_forward.down_proj.weight"},
    ],
    "mixtral": [{OUT, "block_sparse_moe.experts.*.w2.weight", "mlp.experts.down_proj"}],
    "qwen2_moe": [{OUT, *EXPERTS, "mlp.shared_expert.down_proj.weight"}],
    "qwen3_moe": [{OUT, *EXPERTS}], "olmoe": [{OUT, *EXPERTS}],
    "deepseek_v3": [LLAMA, {OUT, *EXPERTS, *SHARED}], "glm4_moe": [LLAMA, {OUT, *EXPERTS, *SHARED}],
    "ernie4_5_moe": [LLAMA, {OUT, *EXPERTS, *SHARED}],
    "llama4_text": [{OUT, "feed_forward.experts.down_proj", "feed_forward.shared_expert.down_proj.weight"}],
    "gpt_oss": [{OUT, "self_attn.o_proj.bias", "mlp.experts.down_proj", "mlp.experts.down_proj_bias"}],
    "granitemoehybrid": [
        {"mamba.out_proj.weight", "shared_mlp.output_linear.weight", "block_sparse_moe.output_linear.weight",
         "block_sparse_moe.experts.down_proj"},
    ],
    "lfm2": [{"self_attn.out_proj.weight", "feed_forward.w2.weight"}],
    "nemotron_h": [
        {"mixer.out_proj.weight"}, {"mixer.o_proj.weight"}, {"mixer.down_proj.weight"},
        {"mixer.experts.*.down_proj.weight", "mixer.experts.down_proj", "mixer.shared_experts.down_proj.weight"},
    ],
    "qwen3_next": [
        {out, *EXPERTS, "mlp.shared_expert.down_proj.weight"} for out in ("linear_attn.out_proj.weight", OUT)
    ],
    "qwen3_5_text": [{"linear_attn.out_proj.weight", DOWN}, LLAMA],
    "rwkv": [{"attention.output.weight", "feed_forward.value.weight"}],
}  # fmt: skip
SLOW = {
    "exaone4", "seed_oss", "biogpt", "persimmon", "ctrl", "glm4_moe", "ernie4_5_moe", "qwen2_moe", "olmoe", "diffllama",
    "bitnet", "helium", "apertus", "smollm3", "glm", "gptj", "qwen2_5_vl",
}  # fmt: skip
#: model_type -> words of the reason why no zeros make its layers the identity
REFUSED = {
    "gemma3n_text": "not x + f(x)",  # AltUp
    "deepseek_v4": "not x + f(x)",  # hyper-connections
    "minimax": "not x + f(x)",  # the residual is taken behind the norm
    "longcat_flash": "not x + f(x)",  # experts that return their input
    "gemma4_text": "not x + f(x)",  # a stored scalar multiplies the whole layer
    "bert": "not x + f(x)",  # the norm is behind the sum
}


def slow(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


def found(model_type: str, **changes) -> Discovery:
    return find_writers(CONFIG_MAPPING[model_type](**changes).to_dict())


@pytest.mark.parametrize("model_type", slow(KNOWN))
def test_known_writers_are_found(model_type):
    discovery = found(model_type)
    assert discovery.reason is None
    good = [kind for kind in discovery.kinds if kind.reason is None]
    assert {frozenset(kind.zeroed) for kind in good} == {frozenset(writers) for writers in KNOWN[model_type]}
    assert not any(kind.zeroed & kind.kept for kind in good)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "changes", "writers"),
    [
        ("nemotron", {"num_key_value_heads": 8, "head_dim": 128}, [LLAMA]),
        ("hunyuan_v1_dense", {"head_dim": 128}, [LLAMA]),
        (
            "deepseek_v2",
            {"n_routed_experts": 160, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3,
             "first_k_dense_replace": 1, "topk_method": "group_limited_greedy"},
            [LLAMA, {OUT, *EXPERTS, *SHARED}],
        ),
        (
            "dbrx", {"attn_config": {"rope_theta": 5e5, "kv_n_heads": 8, "clip_qkv": 8.0}},
            [{"norm_attn_norm.attn.out_proj.weight", "ffn.experts.mlp.w2"}],
        ),
    ],
)  # fmt: skip
def test_published_values_that_a_class_lacks(model_type, changes, writers):
    kinds = found(model_type, **changes).kinds
    assert [kind.zeroed for kind in kinds] == writers


@pytest.mark.parametrize("model_type", REFUSED)
def test_layers_that_no_zeros_make_the_identity(model_type):
    discovery = found(model_type)
    assert discovery.kinds and all(REFUSED[model_type] in (kind.reason or "") for kind in discovery.kinds)
    assert discovery.must_be_zero(0, "self_attn.o_proj.weight") is None


def test_kinds_are_those_of_the_real_depth():
    discovery = found("deepseek_v3", num_hidden_layers=61, first_k_dense_replace=3)
    assert [kind.layers for kind in discovery.kinds] == [(0, 1, 2), tuple(range(3, 61))]
    assert discovery.must_be_zero(2, DOWN) and discovery.must_be_zero(60, "mlp.experts.255.down_proj.weight")
    assert discovery.must_be_zero(60, "mlp.experts.255.up_proj.weight") is False
    assert discovery.must_be_zero(60, "post_attention_layernorm.weight") is False
    assert discovery.must_be_zero(60, "mlp.unheard_of.weight") is None and discovery.must_be_zero(61, DOWN) is None


def test_a_norm_behind_a_writer_is_kept():
    """Zeroing it would cut every gradient."""
    discovery = found("olmo2")
    assert discovery.must_be_zero(0, "post_feedforward_layernorm.weight") is False
    assert discovery.must_be_zero(0, "post_attention_layernorm.weight") is False


def test_a_layer_that_others_read_from_is_not_copied():
    """Zamba 2's shared blocks have one set of weights: a copy of such a layer would change the others."""
    kinds = {kind.reason is None: kind for kind in found("zamba2").kinds}
    assert kinds[True].zeroed == {"mamba.out_proj.weight"}
    assert kinds[False].reason is not None and "reaches the rest of the model" in kinds[False].reason


def test_the_first_layer_may_be_another():
    discovery = found("rwkv")
    assert [kind.layers[:2] for kind in discovery.kinds] == [(0,), (1, 2)]
    assert discovery.kinds[0].reason and discovery.kinds[1].reason is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "unheard_of", "auto_map": {"AutoConfig": "x.Y"}}, "its code comes with the model"),
        ({"model_type": "unheard_of"}, "does not know model_type 'unheard_of'"),
        ({"model_type": 3}, "does not know model_type 3"),
        ({"model_type": "vit"}, ""),
        ({"model_type": "llama", "num_attention_heads": "many"}, ""),
    ],
)
def test_what_cannot_be_found_out_has_a_reason(config, words):
    discovery = find_writers(config)
    assert discovery.reason and words in discovery.reason and not discovery.kinds


def test_the_same_answer_every_time_and_no_trace():
    config = CONFIG_MAPPING["qwen3_moe"]().to_dict()
    torch.manual_seed(5)
    first = find_writers(config)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert find_writers(config) == first


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_family_has_an_answer(model_type):
    """Writers or a reason, never an error; and whatever is called a writer is one by the proofs."""
    try:
        config = CONFIG_MAPPING[model_type]().to_dict()
    except Exception as error:  # validation raises errors of a type of its own
        pytest.skip(f"it has no config by default: {type(error).__name__}")
    discovery = find_writers(config)
    assert bool(discovery.kinds) != bool(discovery.reason)
