"""Tied and untied heads in one merge: the embeddings of a tied model are its head, and the output is untied."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from support import make_model, make_speakers, tokens, weights, write_recipe

_TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_EYES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
         "patch_size": 8}  # fmt: skip


def llava(folder, *, tied: bool, seed: int):
    torch.manual_seed(seed)
    text, eyes = transformers.LlamaConfig(**_TEXT, tie_word_embeddings=tied), transformers.CLIPVisionConfig(**_EYES)
    config = transformers.LlavaConfig(text_config=text, vision_config=eyes, tie_word_embeddings=tied)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def llama(folder, *, tied: bool, seed: int):
    return make_model(folder, layers=2, tied=tied, seed=seed)


def head_and_embeddings(folder):
    """(v, d) each, of the model that transformers loads, which must find every tensor and miss none."""
    kind = transformers.AutoModelForCausalLM
    if "text_config" in json.loads((folder / "config.json").read_text()):
        kind = transformers.LlavaForConditionalGeneration
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.get_output_embeddings().weight.data, model.get_input_embeddings().weight.data


@pytest.mark.parametrize("donor_is_tied", [True, False])
@pytest.mark.parametrize("make", [llama, llava])
def test_a_tied_and_an_untied_model(run, tmp_path, make, donor_is_tied):
    one = make(tmp_path / "one", tied=donor_is_tied, seed=0)
    two = make(tmp_path / "two", tied=not donor_is_tied, seed=1)
    text = (
        f"merge_method: linear\nmodels:\n  - {{model: {one}, parameters: {{weight: 0.25}}}}\n"
        f"  - {{model: {two}, parameters: {{weight: 0.75}}}}\n"
    )
    run("merge", write_recipe(tmp_path / "recipe.yml", text), tmp_path / "out")
    run("verify", tmp_path / "out")
    got, first, second = (head_and_embeddings(folder) for folder in (tmp_path / "out", one, two))
    for ours, a, b in zip(got, first, second, strict=True):
        torch.testing.assert_close(ours, 0.25 * a + 0.75 * b)
    config = json.loads((tmp_path / "out/config.json").read_text())
    parts = (config, config.get("text_config", {}))
    assert config["tie_word_embeddings"] is False and not any(part.get("tie_word_embeddings") for part in parts)


def test_heads_of_two_and_the_config_of_a_third(run, tmp_path):
    """The output has the head that was merged, or none where the merged models have none, whatever the donor has."""
    models = {name: llama(tmp_path / name, tied=tied, seed=i) for i, (name, tied) in enumerate(
        {"tied": True, "tied too": True, "untied": False}.items())}  # fmt: skip
    for base, others in (("tied", ("tied too", "untied")), ("untied", ("tied", "tied too"))):
        sources = ", ".join(f"{{model: {models[name]}}}" for name in others)
        text = f"merge_method: linear\nparameters: {{weight: 1}}\nbase_model: {models[base]}\n"
        text += f"slices: [{{sources: [{sources}]}}]\n"
        run("merge", write_recipe(tmp_path / "recipe.yml", text), tmp_path / "out", "--overwrite")
        head, embeddings = head_and_embeddings(tmp_path / "out")
        assert head.equal(embeddings) == (base == "untied")


def test_copies_stay_tied(run, tmp_path):
    """Layers of an untied model do not untie the model that they are put into."""
    tied, untied = llama(tmp_path / "tied", tied=True, seed=0), llama(tmp_path / "untied", tied=False, seed=1)
    text = "merge_method: passthrough\nslices:\n" + "".join(f"  - sources: [{{model: {m}}}]\n" for m in (tied, untied))
    run("merge", write_recipe(tmp_path / "recipe.yml", f"{text}base_model: {tied}\n"), tmp_path / "out")
    assert "lm_head.weight" not in weights(tmp_path / "out")
    head_and_embeddings(tmp_path / "out")


def test_a_tied_head_takes_part_in_united_tokens(run, tmp_path):
    one = make_speakers(tmp_path / "tied", layers=1, tied=True)["base"]
    two = make_speakers(tmp_path / "untied", layers=1, tied=False)["other"]
    text = "merge_method: linear\nparameters: {weight: 0.5}\ntokenizer_source: union\n"
    text += f"models: [{{model: {one}}}, {{model: {two}}}]\n"
    run("merge", write_recipe(tmp_path / "recipe.yml", text), tmp_path / "out")
    ours, *known = (dict(zip(("ids", "head"), (tokens(f), head_and_embeddings(f)[0]), strict=True))
                    for f in (tmp_path / "out", one, two))  # fmt: skip
    shared = [token for token in ours["ids"] if all(token in k["ids"] for k in known)]
    assert len(shared) > 50
    for token in shared:
        rows = [k["head"][k["ids"][token]] for k in known]
        torch.testing.assert_close(ours["head"][ours["ids"][token]], (rows[0] + rows[1]) / 2)
