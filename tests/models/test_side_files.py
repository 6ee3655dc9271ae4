"""The files next to the weights: copied, named in a warning, or passed over because they are no part of the model."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file
from support import make_model, save_tokenizer, train_tokenizer

COPIED = {
    "modules.json": '[{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]',
    "1_Pooling/config.json": '{"word_embedding_dimension": 32}',
    "2_Dense/config.json": "{}",
    "2_Dense/pytorch_model.bin": "pickle",
    "sentence_bert_config.json": "{}",
    "config_sentence_transformers.json": "{}",
    "quantize_config.json": "{}",
    "generation_config.json": "{}",
    "preprocessor_config.json": "{}",
    "License.txt": "free",
    "GEMMA_LICENSE": "free",
    "custom_generate/generate.py": "def generate(): ...",
}
TOKENIZER = {
    "tekken.json": "{}",
    "qwen.tiktoken": "IQ== 0",
    "tokenizer.model.v3": "pieces",
    "sentencepiece.bpe.model": "pieces",
    "chat_template.json": '{"chat_template": "x"}',
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "SYSTEM_PROMPT.txt": "Be kind.",
}
NAMED = {"hf_quant_config.json": "{}", "recipe.yaml": "x", "handler.py": "x", "strange_table.json": "{}"}
PASSED_OVER = {
    "README.md": "x", "consolidated.safetensors": "x", "params.json": "{}", "model.gguf": "x", "picture.png": "x",
    "onnx/model.onnx": "x", "original/params.json": "{}", "original/a.00.pth": "x", "checkpoint-5/a.json": "x",
    ".gitattributes": "x", "training_args.bin": "x", "trainer_state.json": "{}", "optimizer.pt": "x", "model.onnx": "x",
    "requirements.txt": "x", "flax_model.msgpack": "x", "tf_model.h5": "x", "pytorch_model.bin.index.json": "{}",
}  # fmt: skip


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A model with all of them."""
    folder = make_model(tmp_path_factory.mktemp("full") / "base", layers=2)
    save_tokenizer(folder, train_tokenizer(), eos_token="</s>")
    for name, text in {**COPIED, **TOKENIZER, **NAMED, **PASSED_OVER}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "consolidated.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({
        "metadata": {}, "weight_map": dict.fromkeys(_names(folder), "model.safetensors")}))  # fmt: skip
    save_file({"tok_embeddings.weight": torch.zeros(2)}, folder / "consolidated.safetensors")
    return folder


def _names(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


def files(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_everything_is_copied_or_named(run, full, tmp_path):
    out = tmp_path / "out"
    for options, wanted in (((), {**COPIED, **TOKENIZER}), (("--no-copy-tokenizer", "--overwrite"), COPIED)):
        done = run("upscale", full, out, "--preset", "copy_next", *options)
        written = files(out)
        for name, text in wanted.items():
            assert written[name] == text.encode() or name == "generation_config.json", name
        absent = {**NAMED, **PASSED_OVER, **({} if wanted is not COPIED else TOKENIZER)}.keys() - {"README.md"}
        assert not absent & written.keys()
        (warning,) = re.findall(r"not copied from .*: (.*)", done.err)
        assert set(re.split(", ", warning)) == NAMED.keys()
        run("verify", out)
    digests = json.loads((out / "deus_merge.json").read_text())["files"]
    assert {"1_Pooling/config.json", "2_Dense/pytorch_model.bin"} <= digests.keys()
    run("strip", out, tmp_path / "base")
    assert files(tmp_path / "base")["1_Pooling/config.json"] == COPIED["1_Pooling/config.json"].encode()


def test_a_folder_is_checked_like_the_rest(run, full, tmp_path):
    """A changed, missing or strange file in a folder fails verify; the old folder is replaced as a whole."""
    out = tmp_path / "out"
    run("upscale", full, out, "--preset", "copy_next")
    for change, message in (
        (lambda: (out / "1_Pooling/config.json").write_text("{ }"), "1_Pooling/config.json is not as it was written"),
        (lambda: (out / "1_Pooling/config.json").unlink(), "1_Pooling/config.json is missing"),
        (lambda: (out / "1_Pooling/more.json").write_text("{}"), "1_Pooling/more.json was not written by the run"),
    ):
        change()
        assert message in run("verify", out, expect=3).out
        run("upscale", full, out, "--preset", "copy_next", "--overwrite")


def test_links_out_of_the_folder(run, full, tmp_path):
    """Links into the hub's cache are followed from folders, too; one to a private file is refused."""
    cache = tmp_path / "models--org--name"
    shutil.copytree(full, cache / "snapshots/abc")
    (cache / "blobs").mkdir()
    file = cache / "snapshots/abc/1_Pooling/config.json"
    file.rename(cache / "blobs/123")
    os.symlink("../../../blobs/123", file)
    run("upscale", cache / "snapshots/abc", tmp_path / "out", "--preset", "copy_next")
    assert (tmp_path / "out/1_Pooling/config.json").read_text() == COPIED["1_Pooling/config.json"]
    (tmp_path / "private").mkdir()
    (tmp_path / "private/key").write_text("secret")
    pooling = file.parent
    shutil.rmtree(pooling)
    for link in (lambda: os.symlink(tmp_path / "private", pooling), lambda: _link_to(tmp_path / "private/key", file)):
        link()
        done = run("upscale", cache / "snapshots/abc", tmp_path / "second", "--preset", "copy_next", expect=2)
        assert "a link leads out of the model's folder" in done.err and not (tmp_path / "second").exists()
        pooling.unlink() if pooling.is_symlink() else shutil.rmtree(pooling)


def _link_to(target, link):
    link.parent.mkdir()
    os.symlink(target, link)


def test_overwrite_does_not_take_a_folder_for_a_models(run, full, tmp_path):
    """1_Pooling is part of a model; 2024_notes is the user's."""
    run("upscale", full, tmp_path / "out", "--preset", "copy_next")
    (tmp_path / "out/2024_notes").mkdir()
    done = run("upscale", full, tmp_path / "out", "--preset", "copy_next", "--overwrite", expect=2)
    assert "holds more than a model" in done.err and "2024_notes" in done.err
