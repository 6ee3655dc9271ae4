"""The base models of the benchmark: one that is trained here, one that ships, one that is fetched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from benchmarks import train_tiny
from deus_merge.models import demo as demo_models
from deus_merge.training.comparison.text import split, tokens

from .texts import text_files

VOCABULARY = 4096
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "initializer_range": 0.05,
}
STEPS, BATCH, LEARNING_RATE = 1000, 16, 1e-2
FACTS = "training.json"  # beside a model that was trained here


def provide(name: str, scratch: Path, prose: Sequence[str]) -> str:
    """The folder of a base model, which is trained or fetched when it is not there.

    Args:
        name: ``tiny`` (ships in the package), ``small`` (trained here on the prose), or ``smollm2``.
        scratch: Where it is kept.
        prose: See `texts.text_files`.
    """
    if name == "tiny":
        return str(demo_models.tiny_model())
    if name == "smollm2":
        return str(demo_models.smollm2(scratch))
    training, held_out, fingerprint = split(text_files(tuple(prose), scratch))
    folder = scratch / f"small-base-{fingerprint}"
    if not (folder / FACTS).exists():  # the last file to be written
        train_small(folder, training, held_out)
    return str(folder)


def train_small(out: Path, training: Sequence[str], held_out: Sequence[str], steps: int = STEPS, seed: int = 0) -> None:
    """Train a Llama of 10.5 M parameters: 12 layers, d 256, f 768, 8 query heads on 4 key-value heads.

    Args:
        out: Folder to write the checkpoint (bfloat16) and `FACTS` to.
        training, held_out: Texts.
        steps: Of 16 windows of 256 tokens.
        seed: Of the weights and the windows.
    """
    torch.manual_seed(seed)
    tokenizer = train_tiny.train_tokenizer(training, VOCABULARY)
    training_ids, held_out_ids = tokens(tokenizer, training), tokens(tokenizer, held_out)
    print(f"text: {len(training_ids)} training tokens, {len(held_out_ids)} held out", flush=True)
    model = LlamaForCausalLM(train_tiny.tiny_config(tokenizer, **SIZES))
    curve = train_tiny.train(model, training_ids, held_out_ids, steps, seed, batch=BATCH, lr=LEARNING_RATE, mixed=True)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": f"{steps} of {BATCH} windows of {train_tiny.CONTEXT} tokens",
        "tokens of the text": len(training_ids),
        "unigram entropy of the held-out text": train_tiny.unigram_entropy(held_out_ids),
        "held-out loss, first 32 windows": curve[-1][2],
    }
    train_tiny.save(model, tokenizer, out)
    (out / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
