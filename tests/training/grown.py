"""Models that were made deeper, and ways to train them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from deus_merge import api

IDS = torch.arange(3, 35).unsqueeze(0)  # (1, 32)


def grow(base: Path, out: Path, preset: str = "opt_deus", insert: object = "top_half") -> Path:
    api.merge(api.upscale_recipe(base, preset=preset, insert=insert), out, api.RunOptions(verify=False))
    return out


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of tensors whose bits differ."""

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().reshape(-1).view(torch.uint8)

    return {name for name in before if not torch.equal(bits(before[name]), bits(after[name]))}


def lora(model, *_):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"]))


def trainer(model, folder: Path, *callbacks) -> transformers.Trainer:
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder), max_steps=4, logging_steps=2, save_steps=4, report_to="none", disable_tqdm=True,
            learning_rate=1e-2,
        ),
        train_dataset=[{"input_ids": IDS[0], "labels": IDS[0]}] * 8,
        callbacks=list(callbacks),
    )  # fmt: skip
