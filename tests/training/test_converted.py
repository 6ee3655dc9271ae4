"""Models whose parameters are not what is stored: all experts of a layer in one, for example."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from grown import IDS, grow

from deus_merge import api, training

_SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def make(folder: Path, model_type: str) -> Path:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **_SMALL)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "granitemoe", "minimax_m2"])
def test_growing_training_saving_and_stripping(tmp_path, model_type):
    """Only the new layers change; what the trainer saved is verified; stripped it is the base, byte for byte."""
    base = make(tmp_path / "base", model_type)
    out = grow(base, tmp_path / "out", insert={"after": [1]})
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training.freeze_base(model, out)
    optimizer = torch.optim.AdamW(training.optimizer_groups(model, out, lr=0.01, zeroed_lr=0.1))
    watch = training.Watch(model, out)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    watch.check()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".layers.2." in name for name in changed)
    model.save_pretrained(tmp_path / "trained")
    training.carry_manifest(out, tmp_path / "trained")
    assert api.verify(tmp_path / "trained").passed
    api.strip(tmp_path / "trained", tmp_path / "stripped")
    one, other = (Path(tmp_path, name, "model.safetensors").read_bytes() for name in ("stripped", "base"))
    assert one == other
