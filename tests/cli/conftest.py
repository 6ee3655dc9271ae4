"""Small models, most of them broken, and a command that must be refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import make_model


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Path:
    """A folder of small models, most of them broken in one way each."""
    root = tmp_path_factory.mktemp("workshop")
    make_model(root / "base")
    make_model(root / "other", seed=1)
    make_model(root / "deep", layers=6)
    make_model(root / "wide", intermediate_size=64)
    make_model(root / "qwen3", "qwen3")
    make_model(root / "heads", num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    make_model(root / "vocabulary", vocab_size=130)
    config = json.loads((root / "base/config.json").read_text())
    tensors = load_file(root / "base/model.safetensors")

    def broken(name: str, new_config: object = config, new_tensors: dict = tensors) -> None:
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(new_config))
        save_file(new_tensors, root / name / "model.safetensors", {"format": "pt"})

    def without(name: str) -> dict:
        return {k: v for k, v in tensors.items() if k != name}

    broken("mystery", config | {"model_type": "mystery"})
    broken("mystery_depth", config | {"model_type": "mystery", "num_hidden_layers": 9})
    broken("no_type", {k: v for k, v in config.items() if k != "model_type"})
    broken("list_config", [config])
    broken("deeper", config | {"num_hidden_layers": 5})
    broken("shallower", config | {"num_hidden_layers": 3})
    broken("text_depth", config | {"num_hidden_layers": "4"})
    broken("layer_types", config | {"layer_types": ["full_attention"] * 3})
    broken("five_heads", config | {"num_attention_heads": 5})
    broken("kv_heads", config | {"num_key_value_heads": 3})
    broken("hidden_size", config | {"hidden_size": 64})
    broken("vocab_size", config | {"vocab_size": 99})
    up = "model.layers.2.mlp.up_proj.weight"
    broken("hole", new_tensors=without(up))
    broken("odd_layer", new_tensors=tensors | {up: torch.zeros(40, 32)})
    broken("no_embeddings", new_tensors=without("model.embed_tokens.weight"))
    broken("no_head", new_tensors=without("lm_head.weight"))
    broken("extra", new_tensors=tensors | {"model.layers.1.mlp.strange.weight": torch.zeros(4)})
    integers = {k: v.to(torch.int8) if "proj" in k else v for k, v in tensors.items()}
    broken("integers", new_tensors=integers)
    broken("cut_config")
    (root / "cut_config/config.json").write_text('{"model_type": ')
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    for name, file in (("weights", "model.safetensors"), ("config", "config.json"), ("tokenizer", "tokenizer.json")):
        broken(f"lfs_{name}")
        (root / f"lfs_{name}" / file).write_text(pointer)
    for name, file in (("gguf", "base.gguf"), ("gguf_and_config", "base.gguf"), ("gguf_by_name", "model.safetensors")):
        broken(name)
        (root / name / "model.safetensors").unlink()
        (root / name / file).write_bytes(b"GGUF\3\0\0\0more")
    (root / "gguf/config.json").unlink()
    broken("pickled")
    (root / "pickled/model.safetensors").rename(root / "pickled/pytorch_model.bin")
    (root / "hollow").mkdir()
    shutil.copytree(root / "base", root / "base@v2")
    return root


def census(folder: Path) -> dict:
    return {p.relative_to(folder): p.lstat().st_mtime_ns for p in folder.rglob("*")}


@pytest.fixture
def refused(run, workshop, tmp_path, monkeypatch):
    """Run a command that must be refused: exit code 2, a message with the fragments, and not a file touched."""
    monkeypatch.chdir(workshop)

    def call(arguments, fragments):
        before = census(tmp_path), census(workshop)
        done = run(*arguments, expect=2)
        assert done.out == ""
        for fragment in fragments:
            assert fragment in done.err, done.err
        for leak in ("Traceback", "Located(", "ModelRef(", "None", "object at 0x"):
            assert leak not in done.err, done.err
        assert (census(tmp_path), census(workshop)) == before
        return done.err

    return call
