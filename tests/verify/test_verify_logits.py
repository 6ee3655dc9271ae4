"""``verify --logits``: one block in memory, and bit for bit what the whole model computes."""

from __future__ import annotations

import pytest
import torch
import transformers
from outputs import places
from support import FAMILIES, TEXT, load, make_model, write_recipe

from deus_merge.verify import logits

CASES = [(family, {}) for family in FAMILIES] + [
    ("llama", {"tied": True, "dtype": torch.bfloat16, "max_shard_size": "20kB"}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "tied": True}),
]


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_streamed_logits_are_the_whole_model_s(tmp_path, family, settings):
    folder = make_model(tmp_path / "model", family, **settings)
    ids = torch.randint(0, 128, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = load(folder)(ids).logits[0]
    streamed, whole_because = logits.run(folder, ids)
    assert whole_because is None and streamed.dtype == torch.float32
    assert torch.equal(streamed, whole)


def test_one_block_of_weights_is_in_memory(tmp_path):
    folder = make_model(tmp_path / "model", layers=12)
    model, real = [], []

    def look(module, _):
        model.append(module)  # the first is the whole model
        real.append(sum(p.numel() for p in model[0].parameters() if p.device.type != "meta"))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        logits.run(folder, torch.arange(40).view(1, 40))
    finally:
        handle.remove()
    layer = sum(p.numel() for p in model[0].model.layers[0].parameters())
    assert max(real) == layer and len(real) > 100


def test_a_family_that_nobody_described_is_loaded_whole(tmp_path):
    config = transformers.OpenAIGPTConfig(n_layer=2, n_embd=32, n_head=2, vocab_size=128)
    transformers.OpenAIGPTLMHeadModel(config).save_pretrained(tmp_path / "model")
    ids = torch.arange(40).view(1, 40)
    found, whole_because = logits.run(tmp_path / "model", ids)
    assert "'openai-gpt' is not described" in whole_because
    with torch.no_grad():
        assert torch.equal(found, load(tmp_path / "model")(ids).logits[0])


def test_verify_compares_logits(run, tiny, tmp_path):
    text = write_recipe(tmp_path / "text.txt", TEXT)

    def compared(out, expect=0):
        checks = run("verify", out, "--logits", text, "--json", expect=expect).json()["checks"]
        return next(c for c in checks if c["name"] == "logits")

    run("upscale", tiny, tmp_path / "same")
    same = compared(tmp_path / "same")
    assert "equal bit for bit" in same["detail"] and same["facts"]["equal"]
    assert same["facts"]["loss"] == same["facts"]["loss_base"] and same["facts"]["largest_difference"] == 0
    run("upscale", tiny, tmp_path / "other", "--preset", "average")
    other = compared(tmp_path / "other")
    assert other["passed"] and "largest difference" in other["detail"] and other["facts"]["largest_difference"] > 0
    file, begin, _ = places(tmp_path / "same")["model.layers.2.mlp.up_proj.weight"]
    with file.open("r+b") as stream:
        stream.seek(begin + 1)
        stream.write(b"\x40")
    assert compared(tmp_path / "same", expect=3)["passed"] is False
    text.write_text("")
    assert "fewer than two tokens" in compared(tmp_path / "same", expect=3)["detail"]
