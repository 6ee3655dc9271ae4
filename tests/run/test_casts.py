"""Tensors that are only cast or derived are read in slices of rows, so that a large one takes little memory."""

from __future__ import annotations

import torch
from support import make_model, weights, write_recipe

from deus_merge.plan.blocks import CAST_BYTES

ROWS = 1_100_003  # rows of 16 float32 numbers: 70 MB, more than a slice


def test_a_large_tensor_is_cast_slice_by_slice(run, tmp_path):
    base = make_model(
        tmp_path / "base", layers=1, vocab_size=ROWS, hidden_size=16, intermediate_size=16, tied=True,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    recipe = f"merge_method: passthrough\ndtype: bfloat16\nmodels: [{{model: {base}}}]\n"
    run("merge", write_recipe(tmp_path / "recipe.yml", recipe), tmp_path / "out", "--no-verify")
    ours, theirs = weights(tmp_path / "out"), weights(base)
    assert theirs["model.embed_tokens.weight"].nbytes > CAST_BYTES
    assert all(ours[name].equal(tensor.to(torch.bfloat16)) for name, tensor in theirs.items())
