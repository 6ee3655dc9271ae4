"""A GGUF file as a model: read as transformers reads it, a tensor or some rows at a time."""

from __future__ import annotations

import json
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf_files import write_gguf
from safetensors.torch import load_file
from support import train_tokenizer

from deus_merge.checkpoint import LoadOptions, open_source
from deus_merge.checkpoint.gguf import GgufSource
from deus_merge.core.errors import CheckpointError
from deus_merge.models.demo import _smollm2_gguf

pytest.importorskip("gguf", reason="the gguf extra is not installed")
pytest.importorskip("accelerate", reason="transformers loads GGUF files with accelerate")

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def mixed(name: str) -> str:
    """As llama.cpp mixes types: blocks of 32 and of 256 columns, and embeddings of their own."""
    return "Q4_K" if "down_proj.weight" in name and ".0." in name else "Q6_K" if "down_proj" in name else "Q8_0"


_FEW = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SOME = {**_FEW, "intermediate_size": 48, "num_key_value_heads": 2}
_MORE = {**_SOME, "hidden_size": 64, "intermediate_size": 256}

#: a model's config, the types of its matrices, and the dtype of the model that the file stands for
CASES = {
    "llama": (transformers.LlamaConfig(**_SOME), lambda n: "F32", "F32"),
    "llama, tied, mixed": (transformers.LlamaConfig(**_MORE, tie_word_embeddings=True), mixed, "BF16"),
    "llama, Q4_0": (transformers.LlamaConfig(**_MORE), lambda n: "Q4_0", "BF16"),
    "qwen2, F16": (transformers.Qwen2Config(**_SOME), lambda n: "F16", "F16"),
    "qwen2, Q5_1": (transformers.Qwen2Config(**_MORE), lambda n: "Q5_1", "BF16"),
    "qwen3, BF16": (transformers.Qwen3Config(**_SOME, head_dim=128), lambda n: "BF16", "BF16"),
    "gemma2": (transformers.Gemma2Config(**_SOME, head_dim=8, tie_word_embeddings=True), lambda n: "BF16", "BF16"),
    "gpt2": (transformers.GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4), lambda n: "F32", "F32"),
}


def random_model(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """A model whose norms and biases are random, too."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    fast = train_tokenizer(size=150)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer):
    """The GGUF file of a case, not to be changed."""
    made: dict[str, Path] = {}

    def path(case: str) -> Path:
        if case not in made:
            config, kind, _ = CASES[case]
            file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
            made[case] = write_gguf(file, random_model(config), tokenizer, kind, TEMPLATE)
        return made[case]

    return path


def opened(path: Path) -> GgufSource:
    return open_source(str(path), LoadOptions())


def by_transformers(path: Path, dtype="float32") -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype).eval()


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_that_transformers_reads(case, written):
    path = written(case)
    source, expected = opened(path), by_transformers(path).state_dict()
    tied = source.config["tie_word_embeddings"]
    assert source.tensors.keys() == expected.keys() - ({"lm_head.weight"} if tied else set())
    assert {t.dtype for t in source.tensors.values()} == {CASES[case][2]}
    for name, tensor in source.tensors.items():
        ours = source.read(name)
        assert tensor.derived and tensor.quantization is None
        assert ours.dtype == torch.float32 and ours.shape == tensor.shape
        assert torch.equal(ours, expected[name]), name
        rows = len(ours)
        for start, stop in ((0, 1), (rows // 3, 2 * rows // 3 + 1), (rows - 1, rows), (1, 1)):
            assert torch.equal(source.slice(name, start, stop), ours[start:stop]), name
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint == source.fingerprint and list(copy.tensors) == list(source.tensors)
    assert torch.equal(copy.read(name), ours)


def test_only_the_rows_at_hand_are_dequantised(written, monkeypatch):
    """Also of Llama's queries, whose rows are in another order in the file."""
    import gguf

    source, asked = opened(written("llama, tied, mixed")), []
    real = gguf.dequantize
    monkeypatch.setattr(gguf, "dequantize", lambda data, kind: asked.append(len(data)) or real(data, kind))
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        source.slice(name, 3, 5)
    assert asked == [2, 2]
    whole = source.read(name)
    monkeypatch.setattr("deus_merge.checkpoint.gguf._BLOCK_BYTES", 10 * 4 * whole.shape[1])
    asked.clear()
    assert torch.equal(source.read(name), whole) and set(asked) == {10, len(whole) % 10}


@torch.no_grad()
@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_deeper_model_computes_what_the_file_does(form, written, run, tmp_path):
    path, out = written("llama, tied, mixed"), tmp_path / "out"
    run("upscale", path if form == "file" else path.parent, out, "--insert", "all")
    checks = run("verify", out, "--json").json()["checks"]
    assert all(check["passed"] is not False for check in checks)
    assert "must not contain each other" in run("upscale", path, path.parent, "--overwrite", expect=2).err
    base, deeper = by_transformers(path, torch.bfloat16), transformers.AutoModelForCausalLM.from_pretrained(out)
    assert (deeper.dtype, deeper.config.num_hidden_layers) == (torch.bfloat16, 3)
    ids = torch.arange(1, 40).view(1, -1)  # (1, t)
    assert torch.equal(deeper.eval()(ids).logits, base(ids).logits)

    ours = transformers.AutoTokenizer.from_pretrained(out)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    added = {"<|endoftext|>": 256}  # transformers adds it, and no row of embeddings is its own
    assert ours.get_vocab() | added == theirs.get_vocab() and ours.chat_template == TEMPLATE
    assert ours("the bytes of a file") == theirs("the bytes of a file")
    assert {"tokenizer.json", "generation_config.json"} <= {file.name for file in out.iterdir()}
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@torch.no_grad()
def test_llama_3_keeps_its_scaling_of_rotary_frequencies(run, tmp_path):
    """A file has the factors alone, and transformers leaves them out."""
    scaling = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    settings = {**_SOME, "head_dim": 16, "max_position_embeddings": 131072}
    model = random_model(transformers.LlamaConfig(**settings, rope_parameters=scaling))
    plain = 500000.0 ** -(np.arange(0, 16, 2) / 16)  # (d/2,)
    factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)  # (d/2,)
    assert factors[0] == 1 and factors[-1] == 32 and len(set(factors)) > 2

    path = write_gguf(tmp_path / "llama3.gguf", model, more=lambda w: w.add_tensor("rope_freqs.weight", factors))
    source = opened(path)
    assert source.config["rope_parameters"] == scaling
    assert "rope_freqs.weight" not in source.tensors
    run("upscale", path, tmp_path / "out")
    deeper = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(60).view(1, -1)  # (1, t)
    torch.testing.assert_close(deeper.eval()(ids).logits, model(ids).logits)

    write_gguf(path, model, more=lambda w: w.add_tensor("rope_freqs.weight", factors**2))
    with pytest.raises(CheckpointError, match=r"tensor 'rope_freqs.weight'") as caught:
        opened(path)
    assert "not Llama 3's" in str(caught.value)


CONVERT = "transformers' from_pretrained(folder, gguf_file=name), then save_pretrained(new_folder)"


def expect_refusal(path: Path, *fragments: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        opened(path)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


def test_damaged_files_are_refused(written, tmp_path):
    content = written("llama, tied, mixed").read_bytes()
    path = tmp_path / "damaged.gguf"

    def refuse(changed: bytes, *fragments: str) -> None:
        path.write_bytes(changed)
        expect_refusal(path, str(path), *fragments)

    refuse(content[:-1000], "'blk.1.ffn_down.weight' ends after the end of the file", "the file is truncated")
    for size in (5, 20, 30, 400, 2000):
        refuse(content[:size], "the header is longer than the file", f"{size} bytes")
    refuse(b"GGML" + content[4:], "not a GGUF file")
    refuse(content[:4] + struct.pack(">I", 3) + content[8:], "a GGUF version that is not read", CONVERT)
    huge = struct.pack("<Q", 2**62)
    refuse(content[:16] + huge + content[24:], "")  # a number of entries
    key = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    refuse(content[:key] + huge + content[key + 8 :], "the header is longer than the file")
    key = content.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    refuse(content[:key] + huge + content[key + 8 :], "the header is longer than the file")
    at = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4  # its sizes, type and offset
    refuse(content[: at + 8] + huge + content[at + 16 :], "'blk.0.attn_q.weight' ends after the end of the file")
    refuse(content[:at] + struct.pack("<Q", 33) + content[at + 8 :], "its rows are not whole blocks of 32")
    refuse(content[: at + 16] + struct.pack("<I", 9999) + content[at + 20 :], "cannot dequantise", "type 9999")


def test_a_changed_file_is_noticed(written, tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(written("llama").read_bytes())
    source = opened(path)
    source.read("model.norm.weight")
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        source.read("model.norm.weight")


def test_what_cannot_be_mapped_is_named(written, tmp_path):
    content = written("llama").read_bytes()
    path = tmp_path / "odd.gguf"

    def refuse(before: bytes, after: bytes, *fragments: str) -> None:
        assert len(before) == len(after) and before in content
        path.write_bytes(content.replace(before, after))
        expect_refusal(path, CONVERT, *fragments)

    refuse(b"llama", b"lamma", "cannot map the architecture 'lamma'")
    refuse(b"blk.1.ffn_up.w", b"blk.1.ffn_xx.w", "tensor 'blk.1.ffn_xx.weight': it has no counterpart")
    refuse(b"llama.block_count\4\0\0\0\2", b"llama.block_count\4\0\0\0\3", "lacks tensors", "model.layers.2.")
    refuse(b"llama.feed_forward_length\4\0\0\0\x30", b"llama.feed_forward_length\4\0\0\0\x31",
           "'blk.0.ffn_gate.weight' does not fit", "[49, 32]", "[48, 32]")  # fmt: skip

    config, kind, _ = CASES["llama"]
    model = random_model(config)
    stack = np.zeros((2, 48, 32), np.float32)
    for more, *fragments in (
        (lambda w: w.add_tensor("blk.0.ffn_up_exps.weight", stack), "'blk.0.ffn_up_exps.weight': a stack of experts"),
        (lambda w: w.add_string("llama.rope.scaling.type", "yarn"), "llama.rope.scaling.type", "got:      yarn"),
    ):
        expect_refusal(write_gguf(path, model, kind=kind, more=more), CONVERT, *fragments)
    part = write_gguf(path, model, more=lambda w: w.add_uint16("split.count", 3))
    expect_refusal(part, "a part of a GGUF file", "llama-gguf-split --merge")


def test_an_architecture_that_transformers_comes_to_read_elsewhere_is_refused(written, monkeypatch):
    """Its queries would be read in the wrong order."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS

    elsewhere = "transformers.integrations.gguf.gguf_conversion_mapping"
    monkeypatch.setitem(pytest.importorskip(elsewhere, reason="there is one way only").GGUF_ARCHS, "llama", None)
    opened(written("llama"))  # both ways
    monkeypatch.delitem(TENSOR_PROCESSORS, "llama")
    expect_refusal(written("llama"), "cannot map the architecture 'llama'", "newer way", CONVERT)


def test_several_files_and_a_missing_package(written, tmp_path, monkeypatch):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    expect_refusal(tmp_path, "several GGUF files", "a.gguf, b.gguf", f"name one of them: {tmp_path / 'a.gguf'}")
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it could not be found
    expect_refusal(written("llama"), 'pip install "deus-merge[gguf]"', "not installed")


@pytest.mark.slow
def test_smollm2_is_what_its_conversion_is(real):
    source, converted = opened(_smollm2_gguf()), load_file(real / "model.safetensors")
    assert source.tensors.keys() == converted.keys()
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight",
                 "model.layers.29.self_attn.k_proj.weight", "model.layers.7.mlp.down_proj.weight"):  # fmt: skip
        assert torch.equal(source.read(name).bfloat16(), converted[name]), name
    assert torch.equal(source.slice(name, 5, 9).bfloat16(), converted[name][5:9])
    theirs = json.loads((real / "config.json").read_text())
    del theirs["dtype"], theirs["_model_name_or_path"]
    assert source.config == theirs | {"dtype": "bfloat16"}
    for name, content in source.side_files.items():
        assert content == (real / name).read_bytes(), name
    assert set(source.side_files) == {f.name for f in real.iterdir()} - {
        "config.json", "model.safetensors", "README.md",
    }  # fmt: skip
