"""The base models of the benchmark: some that are trained here, one that ships, one that is fetched."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from benchmarks import train_tiny
from deus_merge.models import demo as demo_models
from deus_merge.training.comparison.text import split, tokens

from .texts import text_files


@dataclass(frozen=True)
class Training:
    """A base that is trained here: a Llama with the words and in the way of `benchmarks.train_tiny`.

    Attributes:
        sizes: Of its config.
        vocabulary: Tokens, of a tokenizer that is trained on the text's first millions of characters.
        steps, batch: Optimizer steps, and windows of 256 tokens in each.
        lr: The highest learning rate.
    """

    sizes: Mapping[str, object]
    vocabulary: int
    steps: int
    batch: int
    lr: float


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, deviation: float
) -> dict[str, object]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "initializer_range": deviation,
    }


TRAININGS = {
    "small": Training(_llama(256, 768, 12, 8, 4, 0.05), vocabulary=4096, steps=1000, batch=16, lr=1e-2),
    "large": Training(_llama(1280, 3584, 28, 20, 5, 0.02), vocabulary=16_384, steps=360, batch=64, lr=2e-3),
}
FACTS = "training.json"  # beside a model that was trained here
_TOKENIZED = 12_000_000  # characters that a tokenizer is trained on


def provide(name: str, scratch: Path, text: Sequence[str], device: str = "cpu") -> str:
    """The folder of a base model, which is trained or fetched when it is not there.

    Args:
        name: Of `suites.MODELS`: ``tiny`` ships in the package, SmolLM2 is fetched, those of `TRAININGS` are trained.
        scratch: Where it is kept.
        text: What one that is trained here learns; see `texts.text_files`.
        device: Where it is trained.
    """
    if name == "tiny":
        return str(demo_models.tiny_model())
    if name.startswith("smollm2"):
        return str(demo_models.smollm2(scratch))
    training, held_out, fingerprint = split(text_files(tuple(text), scratch))
    folder = scratch / f"{name}-base-{fingerprint}"
    if not (folder / FACTS).exists():  # the last file to be written
        train_base(TRAININGS[name], folder, training, held_out, device)
    return str(folder)


def train_base(
    how: Training, out: Path, training: Sequence[str], held_out: Sequence[str], device: str = "cpu", seed: int = 0
) -> None:
    """Train a Llama with tied embeddings.

    Args:
        how: Its sizes and its training.
        out: Folder to write the checkpoint (bfloat16) and `FACTS` to.
        training, held_out: Texts.
        device: Where it is trained.
        seed: Of the weights and the windows.
    """
    torch.manual_seed(seed)
    tokenizer = train_tiny.train_tokenizer(_first(training, _TOKENIZED), how.vocabulary)
    training_ids, held_out_ids = tokens(tokenizer, training), tokens(tokenizer, held_out)
    print(f"text: {len(training_ids)} training tokens, {len(held_out_ids)} held out", flush=True)
    with torch.device(device):
        model = LlamaForCausalLM(train_tiny.tiny_config(tokenizer, **how.sizes))
    began = time.monotonic()
    curve = train_tiny.train(model, training_ids, held_out_ids, how.steps, seed, batch=how.batch, lr=how.lr, mixed=True)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": f"{how.steps} of {how.batch} windows of {train_tiny.CONTEXT} tokens",
        "tokens of the text": len(training_ids),
        "seconds": round(time.monotonic() - began),
        "unigram entropy of the held-out text": train_tiny.unigram_entropy(held_out_ids),
        "held-out loss, first 32 windows": curve[-1][2],
    }
    train_tiny.save(model, tokenizer, out)
    (out / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def _first(texts: Sequence[str], characters: int) -> list[str]:
    """The first texts, about so long together."""
    found: list[str] = []
    for text in texts:
        if characters <= 0:
            break
        found.append(text)
        characters -= len(text)
    return found
