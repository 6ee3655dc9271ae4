"""Small models of every family, and how tests look at checkpoints: by safetensors and transformers, not by us."""

from __future__ import annotations

import string
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import decoders, models, pre_tokenizers, trainers

TEXT = "The module defines a class whose methods open a file, read lines and return the number of bytes.\n" * 3

_SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama_bias": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 16}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8}),
}


def make_model(
    folder: Path, family: str = "llama", *, layers: int = 4, tied: bool = False, seed: int = 0,
    dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **config,
) -> Path:  # fmt: skip
    """A random model of a family, as transformers saves it; biases and norms are random too."""
    kind, extra = FAMILIES[family]
    settings = {**_SMALL, **extra, "num_hidden_layers": layers, "tie_word_embeddings": tied, **config}
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(kind(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def train_tokenizer(kind: str = "BPE", text: str = TEXT, size: int = 100, special=("<s>", "</s>"), more=()):
    """A small tokenizer of the tokenizers library: ``special`` tokens first, then the model's, then added tokens
    ``more``, special ones too. Kinds beside BPE (over bytes) also have a token ``<unk>``."""
    unknown = {} if kind == "BPE" else {"unk_token": "<unk>"}
    settings = {"vocab_size": size, "special_tokens": [*special, *unknown.values()], "show_progress": False}
    if kind == "BPE":
        alphabet = sorted(set(string.ascii_letters + ".,ĠĊ"))
        made, trainer = models.BPE(), trainers.BpeTrainer(initial_alphabet=alphabet, **settings)
    elif kind == "Unigram":
        made, trainer = models.Unigram(), trainers.UnigramTrainer(**settings, **unknown)
    else:
        made, trainer = getattr(models, kind)(**unknown), getattr(trainers, f"{kind}Trainer")(**settings)
    tokenizer = tokenizers.Tokenizer(made)
    if kind == "BPE":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens(list(more))
    return tokenizer


def save_tokenizer(folder: Path, tokenizer, **roles: str) -> Path:
    """As transformers saves it; ``roles`` are like ``eos_token="</s>"``."""
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    fast.save_pretrained(folder)
    return folder


def make_speakers(root: Path, family: str = "llama", **settings) -> dict[str, Path]:
    """Models with tokenizers of their own: base; other with its special tokens at other ids, pieces and added tokens
    that base lacks, and rows beyond its tokens; third with base's pieces and other added tokens."""
    text = f"{TEXT} each token has a row of its own, and the rows are merged token by token"
    spoken = {
        "base": (train_tokenizer(more=["<|start|>", "<|end|>"]), 0),
        "other": (train_tokenizer(text=text, size=110, special=["</s>", "<s>"], more=["<pad>", "<|tool|>"]), 5),
        "third": (train_tokenizer(more=["<|tool|>", "<|end|>", "<|third|>"]), 0),
    }
    for seed, (name, (tokenizer, padding)) in enumerate(spoken.items()):
        tokenizer.add_special_tokens(["<|endoftext|>"])  # transformers adds it to tokenizers of Qwen2
        ids = {f"{role}_token_id": tokenizer.token_to_id(t) for role, t in (("bos", "<s>"), ("eos", "</s>"))}
        rows = tokenizer.get_vocab_size() + padding
        make_model(root / name, family, vocab_size=rows, seed=seed, **ids, **settings)
        save_tokenizer(root / name, tokenizer, bos_token="<s>", eos_token="</s>")
    return {name: root / name for name in spoken}


def tokens(folder: Path) -> dict[str, int]:
    """The vocabulary that transformers loads."""
    return transformers.AutoTokenizer.from_pretrained(folder).get_vocab()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read by the safetensors library."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def load(folder: Path):
    """The model in float32 by transformers, which must find every tensor and miss none."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load(folder)(ids).logits


def token_ids(folder: Path, text: str = TEXT) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer(text, return_tensors="pt")["input_ids"][:, :128]


def write_recipe(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
