"""Model cards: valid by the hub's own library, complete, and true of what is next to them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from support import make_model, save_tokenizer, train_tokenizer, write_recipe

from deus_merge import training
from deus_merge.report.card_edits import trained_card
from deus_merge.report.card_metadata import RELATIONS, split_card

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = """---
license: other
license_name: toy-licence
license_link: LICENSE
language: en
tags: [toy, "base_model:adapter:x/y", "region:us", "\\x1b[31m", 7]
pipeline_tag: text-generation
datasets: [a/b]
model-index: []
---
# A toy
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A repository in a cache of the hub, and two local models."""
    root = tmp_path_factory.mktemp("cards")
    repository = root / "hub/models--toy--base"
    snapshot = make_model(repository / "snapshots" / COMMIT, seed=0)
    save_tokenizer(snapshot, train_tokenizer(size=100), bos_token="<s>", eos_token="</s>")
    (snapshot / "README.md").write_text(CARD)
    (snapshot / "LICENSE").write_text("free")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    make_model(root / "same", seed=1)
    (root / "same/README.md").write_text(CARD.replace("LICENSE", "https://toy.example/licence"))
    make_model(root / "other", seed=2)
    (root / "other/README.md").write_text("---\nlicense: mit\nlanguage: [de, en]\n---\n")
    return root


@pytest.fixture
def toy(made, monkeypatch, tmp_path) -> str:
    monkeypatch.setenv("HF_HUB_CACHE", str(made / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(made / "hub"))
    monkeypatch.chdir(tmp_path)
    return "toy/base"


def data_of(out: Path) -> dict:
    """A card's metadata, once the hub's library has read it and every rule that needs no network was checked."""
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert ModelCardData(**data).to_dict() == data == split_card(card.content)[0]
    assert yaml.safe_load(ModelCardData(**data).to_yaml()) == data
    for name in data.get("base_model", ()):
        validate_repo_id(name)
        assert name.count("/") == 1
    assert data.get("base_model_relation", "merge") in RELATIONS
    assert ("license_name" in data) <= (data.get("license") == "other")
    link = data.get("license_link", "https://")
    assert link.startswith("https://") or (out / link).is_file()
    return data


def test_what_a_base_says_is_inherited(run, toy):
    run("upscale", toy, "out", "--insert", "{after: [1]}")
    assert data_of(Path("out")) == {
        "license": "other",
        "license_name": "toy-licence",
        "license_link": "LICENSE",
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["toy", "merge", "deus_merge", "depth-up-scaling"],
        "base_model": ["toy/base"],
        "base_model_relation": "merge",
    }
    assert json.loads(Path("out/deus_merge.json").read_text())["sources"][0]["folder"] == f"toy/base@{COMMIT}"
    run("upscale", "out", "again", "--insert", "{after: [0]}")  # an output of ours knows what it was made from
    assert data_of(Path("again"))["base_model"] == ["toy/base"] and "Not in `base_model`" not in text_of("again")


def test_licences_of_several_sources(run, toy, made):
    recipe = "merge_method: linear\nmodels: [{{model: {0}}}, {{model: {1}}}]\nparameters: {{weight: 1}}\n"
    run("merge", write_recipe(Path("same.yml"), recipe.format(toy, made / "same")), "same")
    assert data_of(Path("same"))["license_name"] == "toy-licence" and "Licence of" not in text_of("same")
    assert text_of("same").startswith("# toy/base + same, 4 layers\n")
    run("merge", write_recipe(Path("other.yml"), recipe.format(toy, made / "other")), "other")
    data = data_of(Path("other"))
    assert "license" not in data and data["language"] == ["en", "de"] and data["base_model"] == ["toy/base"]
    limits = text_of("other").partition("## Limits")[2]
    assert "Licence of toy/base: other (toy-licence)." in limits and "Licence of other: mit." in limits
    assert "the id on the hub is not known: other." in limits


def text_of(out: str) -> str:
    return split_card(Path(out, "README.md").read_text())[1].lstrip()


@pytest.mark.parametrize(
    "front", ["license: [", "- a\n- b", "license: 7\ntags: {a: 1}\nlanguage: [1, 2]\nbase_model: x", ""]
)
def test_odd_cards_of_bases(run, tmp_path, front):
    make_model(tmp_path / "base")
    (tmp_path / "base/README.md").write_text(f"---\n{front}\n---\n# Base\n")
    run("upscale", tmp_path / "base", tmp_path / "out", "--insert", "{after: [1]}")
    data = data_of(tmp_path / "out")
    assert data["tags"] == ["merge", "deus_merge", "depth-up-scaling"] and data.keys() <= {
        "library_name", "pipeline_tag", "tags"
    }  # fmt: skip
    assert "Licence of base: not known." in (tmp_path / "out/README.md").read_text()


def test_the_code_in_a_card_runs(run, toy, monkeypatch):
    run("upscale", toy, "out", "--insert", "{after: [1]}")
    text = text_of("out")
    monkeypatch.chdir("out")
    scope: dict = {}
    for block in [part.partition("```")[0] for part in text.split("```python\n")[1:]]:
        exec(block, scope)
    trained = {name for name, p in scope["model"].named_parameters() if p.requires_grad}
    assert trained == set(training.new_parameters(".")) and len(scope["tokenizer"]) == 100
    new = sum(p.numel() for p in scope["model"].parameters() if p.requires_grad)
    everything = sum(p.numel() for p in scope["model"].parameters())
    assert f"{(everything - new) / 1000:.2f} k → {everything / 1000:.2f} k parameters ({new / 1000:.2f} k new)" in text


def test_a_card_for_a_trained_model(run, toy):
    """Where there is none, or a stub; a trainer's own is kept below ours, and somebody's own as it is."""
    run("upscale", toy, "out", "--insert", "{after: [1]}")
    model = training.prepare("out").model
    training.save_trained(model, "out", "saved")
    data, text = data_of(Path("saved")), text_of("saved")
    assert data == {**data_of(Path("out")), "base_model_relation": "finetune"}
    assert "Its new layers 2 were trained after that; all others are as they were." in text
    assert "add nothing until" not in text and "are not trained" not in text
    now = "2 and all others were trained after that"
    training.carry_manifest("out", "saved", all_layers=True)  # again, of a card that is ours
    assert text_of("saved") == text.replace("2 were trained after that; all others are as they were", now)

    model.save_pretrained("theirs")
    card = Path("theirs/README.md")
    written = {
        "---\ntags: []\n---\n# Model Card for Model ID\n" + "- **License:** [More Information Needed]\n" * 4: (
            False,
            False,
        ),
        TRAINERS: (True, False),
        "# My model\nAsk me.\n": (False, True),
    }
    for before, (below, same) in written.items():
        card.write_text(before)
        Path("theirs/deus_merge.json").unlink(missing_ok=True)
        training.carry_manifest("out", "theirs")
        now = card.read_text()
        assert (now == before) is same and ("## Layers" in now) is not same
        assert ("### Training hyperparameters" in now.replace("####", "###")) is below
    card.write_text(TRAINERS)
    training.carry_manifest("out", "theirs")
    data = data_of(Path("theirs"))
    assert (
        data["datasets"] == ["toy/text"]
        and data["license_name"] == "toy-licence"
        and "More information" in card.read_text()
    )
    assert card.read_text().count("\n# ") == 1 and "<!--" not in card.read_text()


TRAINERS = """---
library_name: transformers
license: apache-2.0
datasets:
- toy/text
tags:
- generated_from_trainer
---

<!-- This model card has been generated automatically according to the information the Trainer had access to. You
should probably proofread and complete it, then remove this comment. -->

# out

This model is a fine-tuned version of out on the toy/text dataset.

## Model description

More information needed

### Training hyperparameters

- learning_rate: 0.0003
"""


def test_a_card_that_somebody_edited():
    card = "---\nlicense: mit\n---\n# Mine\n\nNothing of what we write is left.\n"
    text = trained_card(card, None, [3, 5], base_trained=True)
    assert text is not None
    front, body = split_card(text)
    assert front == {"license": "mit"}
    assert body.lstrip().startswith("# Mine\n\nIts new layers 3, 5 and all others were trained after that.\n\nNothing")
    assert body.rstrip().endswith("Nothing of what we write is left.")
    assert trained_card(card, "# Somebody's own\n", [3], base_trained=False) is None


def test_no_card_was_wanted(run, toy):
    run("upscale", toy, "out", "--insert", "{after: [1]}", "--no-write-model-card")
    training.save_trained(training.prepare("out").model, "out", "saved")
    assert not os.path.exists("saved/README.md")


@pytest.mark.parametrize("names", [3, {"a": 1}, "LlamaForCausalLM", [3, None], [], None, True])
def test_class_names_and_dtypes_may_be_anything(run, tmp_path, names):
    base = make_model(tmp_path / "base", layers=2)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": names, "dtype": names or 7}))
    run("upscale", base, tmp_path / "out", "--insert", "all", "--preset", "llama_pro")
    run("verify", tmp_path / "out", "--source", base, expect=None)
    assert "AutoModel.from_pretrained" in (tmp_path / "out/README.md").read_text()
