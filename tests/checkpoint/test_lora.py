"""model+adapter in recipes, compared with peft's own merge of the whole model."""

from __future__ import annotations

import json
import os
import shutil
import sys

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import load, logits, make_model, save_tokenizer, tokens, train_tokenizer, weights, write_recipe

from deus_merge.checkpoint.hub import split_adapter
from deus_merge.checkpoint.lora import LoraSource
from deus_merge.checkpoint.reader import Checkpoint
from deus_merge.core.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's, while it trains and merges tied models
LINEAR = ["q_proj", "v_proj", "down_proj"]
#: name -> family, and what LoraConfig gets
ADAPTERS = {
    "plain": ("llama", {"target_modules": LINEAR}),
    "all linear": ("qwen3", {"target_modules": "all-linear", "r": 3, "lora_alpha": 7}),
    "rslora": ("llama", {"target_modules": LINEAR, "use_rslora": True}),
    "dora": ("llama", {"target_modules": [*LINEAR, "embed_tokens"], "use_dora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": LINEAR,
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 6, "down_proj": 2},
            "alpha_pattern": {r"layers\.[01]\.mlp\.down_proj": 5, "v_proj": 1},
        },
    ),
    "saved modules": ("llama", {"target_modules": LINEAR, "modules_to_save": ["lm_head", "input_layernorm"]}),
    "embeddings": ("qwen2", {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
    "all biases": ("qwen2", {"target_modules": ["k_proj", "o_proj"], "bias": "all"}),
    "own biases": ("llama_bias", {"target_modules": LINEAR, "lora_bias": True}),
    "pissa": ("llama", {"target_modules": LINEAR, "init_lora_weights": "pissa"}),
    "some layers": ("llama", {"target_modules": ["o_proj"], "layers_to_transform": [1]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Models of two layers, created on demand: family, tied?, dtype -> folder."""
    root, created = tmp_path_factory.mktemp("bases"), {}

    def base(family: str = "llama", tied: bool = False, dtype: torch.dtype = torch.float32):
        key = (family, tied, dtype)
        if key not in created:
            folder = root / str(len(created))
            if family == "gpt2":
                sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}
                config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
                transformers.GPT2LMHeadModel(config).save_pretrained(folder)
            else:
                make_model(folder, family, layers=2, tied=tied, dtype=dtype)
            created[key] = folder
        return created[key]

    return base


def whole_model(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def adapter(base, folder, *, seed: int = 0, **options):
    """An adapter as training leaves it: every weight it has is random."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **options})
    model = peft.get_peft_model(whole_model(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise) if "magnitude" not in name else parameter.mul_(1 + 0.2 * noise.abs())
    model.save_pretrained(folder)
    return folder


def merged_by_peft(base, folder, dtype=torch.float32):
    return peft.PeftModel.from_pretrained(whole_model(base, dtype), folder).merge_and_unload()


def passthrough(run, out, model, *options, more=""):
    out.mkdir(exist_ok=True)
    recipe = write_recipe(out / "r.yml", f"merge_method: passthrough\nmodels: [{{model: {model}}}]\n{more}")
    run("merge", recipe, out / "model", *options)
    return out / "model"


@pytest.mark.parametrize("case", ADAPTERS)
def test_as_peft_merges_it(run, bases, tmp_path, case):
    family, options = ADAPTERS[case]
    base = bases(family)
    folder = adapter(base, tmp_path / "adapter", **options)
    ours = weights(passthrough(run, tmp_path, f"{base}+{folder}"))
    theirs = merged_by_peft(base, folder).state_dict()
    changed = 0
    for name, tensor in weights(base).items():
        their = theirs[name if name in theirs else f"transformer.{name}"]
        torch.testing.assert_close(ours[name], their, rtol=1e-6, atol=1e-6)
        changed += not their.equal(tensor)
    record = json.loads((tmp_path / "model/deus_merge.json").read_text())
    actions = [o["action"] for o in record["tensors"].values()]
    assert changed >= actions.count("derive") > 0 and set(actions) == {"copy", "derive"}
    assert (tmp_path / "model" / record["sources"][0]["adapter"]).samefile(folder)
    assert run("verify", tmp_path / "model", "--json").json()["passed"]


def test_one_rounding_of_a_bfloat16_model(run, bases, tmp_path):
    base = bases(dtype=torch.bfloat16)
    folder = adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    ours = weights(passthrough(run, tmp_path, f"{base}+{folder}"))
    theirs = merged_by_peft(base, folder).state_dict()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16
        exact = theirs[name].to(torch.bfloat16)
        apart = (tensor.float() - exact.float()).abs() > 0  # where float32 sums fall on the two sides of a half
        assert float(apart.float().mean()) < 1e-3, name


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_tied_head_is_untied_when_only_one_of_the_two_was_trained(run, bases, tmp_path, saved):
    """The function is that of the trained model."""
    base = bases(tied=True)
    folder = adapter(base, tmp_path / "adapter", target_modules=LINEAR, modules_to_save=saved)
    out = passthrough(run, tmp_path, f"{base}+{folder}")
    assert load(out).config.tie_word_embeddings is False
    ids = torch.arange(40)[None]
    trained = peft.PeftModel.from_pretrained(whole_model(base), folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(out, ids), trained(ids).logits, rtol=1e-4, atol=1e-5)


def test_adapted_embeddings_stay_tied(run, bases, tmp_path):
    base = bases(tied=True)
    folder = adapter(base, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    out = passthrough(run, tmp_path, f"{base}+{folder}")
    assert load(out).config.tie_word_embeddings and "lm_head.weight" not in weights(out)
    theirs = merged_by_peft(base, folder).state_dict()["model.embed_tokens.weight"]
    torch.testing.assert_close(weights(out)["model.embed_tokens.weight"], theirs, rtol=1e-6, atol=1e-6)


def test_adapters_everywhere(run, bases, tmp_path, monkeypatch):
    """In sources, as base model, as tokenizer source, in both forms; like merges of models that peft merged before."""
    base = shutil.copytree(bases(), tmp_path / "base")
    save_tokenizer(base, train_tokenizer())
    names = {}
    for seed, name in enumerate("ab"):
        folder = adapter(base, tmp_path / name, seed=seed, target_modules=LINEAR)
        merged_by_peft(base, folder).save_pretrained(tmp_path / f"{name}-merged")
        save_tokenizer(tmp_path / f"{name}-merged", train_tokenizer())
        names[name] = folder
    short, long = f"{base}+a", f"{{model: {{path: {base}, revision: null}}, lora: {{path: b}}}}"
    text = (
        "merge_method: ties\nbase_model: {base}\nmodels: [{{model: {a}}}, {{model: {b}}}]\n"
        "parameters: {{weight: 0.6, density: 0.7}}\ntokenizer_source: {b}\n---\n"
        "base_model: {a}\nmerge_method: ot_fuse\nslices: [{{sources: [{{model: {a}, layer_range: [0, 2]}}]}}]\n"
    )
    monkeypatch.chdir(tmp_path)
    for number, part in enumerate(text.split("---\n")):
        created = []
        for kind, (a, b) in {"ours": (short, long), "theirs": ("a-merged", "b-merged")}.items():
            recipe = write_recipe(tmp_path / f"{kind}{number}.yml", part.format(base=base, a=a, b=b))
            run("merge", recipe, tmp_path / f"{kind}{number}")
            created.append(weights(tmp_path / f"{kind}{number}"))
        for name, tensor in created[1].items():
            torch.testing.assert_close(created[0][name], tensor, rtol=1e-5, atol=1e-5)
    planned = run("plan", tmp_path / "ours1.yml", "--json").json()
    assert planned["function_preserving"] and planned["models"][0]["model"] == short
    monkeypatch.chdir("/")
    assert run("plan", tmp_path / "ours1/deus_merge.yml", "--json").json()["plan_hash"] == planned["plan_hash"]
    card = (tmp_path / "ours1/README.md").read_text()
    assert "the id on the hub is not known: base+a" in card and str(tmp_path) not in card


def test_an_adapter_over_a_document(run, bases, tmp_path):
    """As if the document had been written to a folder before."""
    first, second = bases(), make_model(tmp_path / "second", layers=2, seed=5)
    folder = adapter(first, tmp_path / "adapter", target_modules=[*LINEAR, "embed_tokens"])
    linear = f"merge_method: linear\nmodels: [{{model: {first}}}, {{model: {second}}}]\nparameters: {{weight: 1}}\n"
    whole = write_recipe(
        tmp_path / "r.yml",
        f"name: mean\n{linear}---\nmerge_method: passthrough\nmodels: [{{model: mean+{folder}}}]\n",
    )
    run("merge", whole, tmp_path / "ours")
    run("merge", write_recipe(tmp_path / "one.yml", linear), tmp_path / "mean")
    theirs = weights(passthrough(run, tmp_path / "two", f"{tmp_path}/mean+{folder}"))
    assert all(tensor.equal(theirs[name]) for name, tensor in weights(tmp_path / "ours").items())
    assert "- mean\n" not in (tmp_path / "ours/README.md").read_text()


def test_rows_are_those_of_the_whole(bases, tmp_path):
    base = Checkpoint.open(bases())
    source = LoraSource(base, adapter(bases(), tmp_path / "adapter", target_modules=LINEAR, use_dora=True))
    for name, info in source.tensors.items():
        whole, rows = source.read(name), info.shape[0]
        parts = [source.slice(name, at, min(at + 5, rows)) for at in range(0, rows, 5)]
        assert torch.cat(parts).equal(whole), name
        assert source.root(name) == (base, name) and info.derived == (not whole.equal(base.read(name)))
    base.close()


def test_only_what_is_needed_is_read(bases, tmp_path, monkeypatch):
    folder = adapter(bases(), tmp_path / "adapter", target_modules=LINEAR)
    source = LoraSource(Checkpoint.open(bases()), folder)
    read = []
    real = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: read.append(name) or real(self, name))
    source.read("model.layers.1.mlp.down_proj.weight")
    assert sorted(n.rpartition("layers.1.mlp.down_proj.")[2] for n in read) == [
        "lora_A.weight", "lora_B.weight", "weight",
    ]  # fmt: skip


def test_another_adapter_is_another_plan(run, bases, tmp_path):
    """Its config and its header count, and a resume knows its files."""
    base = bases()
    folder = adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    recipe = write_recipe(tmp_path / "r.yml", f"merge_method: passthrough\nmodels: [{{model: {base}+{folder}}}]\n")
    first = run("plan", recipe, "--json").json()["plan_hash"]
    options = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**options, "lora_alpha": 7}))
    assert run("plan", recipe, "--json").json()["plan_hash"] != first
    files = LoraSource(Checkpoint.open(base), folder).files
    assert {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"} == {f.name for f in files}


PREFIXES = ("model.", "model.language_model.", "language_model.model.", "transformer.", "backbone.", "")


def renamed(folder, new, old: str, prefix: str):
    """A copy of a model or an adapter whose names have another prefix."""
    shutil.copytree(folder, new)
    (file,) = new.glob("*.safetensors")
    names = ("layers.", "embed_tokens", "norm.")
    head = "base_model.model." if file.name.startswith("adapter") else ""
    tensors = {
        head + prefix + n.removeprefix(head + old) if n.startswith(tuple(head + old + m for m in names)) else n: t
        for n, t in load_file(file).items()
    }
    save_file(tensors, file)
    return new


@pytest.mark.parametrize("of_adapter", PREFIXES)
def test_names_with_other_prefixes(bases, sound, tmp_path, of_adapter):
    """An adapter was trained with one class, and the model is saved by another one: the same tensors change alike."""
    plain = LoraSource(Checkpoint.open(bases()), sound)
    folder = renamed(sound, tmp_path / "adapter", "model.", of_adapter)
    for i, of_model in enumerate(PREFIXES):
        base = Checkpoint.open(renamed(bases(), tmp_path / str(i), "model.", of_model))
        other = LoraSource(base, folder)
        changed = [name for name, tensor in other.tensors.items() if tensor.derived]
        assert len(changed) == sum(tensor.derived for tensor in plain.tensors.values()) == 6
        for name in changed[:3]:
            assert other.read(name).equal(plain.read(f"model.{name.removeprefix(of_model)}"))


def test_a_name_that_two_tensors_may_have(bases, sound, tmp_path):
    """Two stacks, and an adapter that names neither: refused."""
    base = shutil.copytree(bases(), tmp_path / "two")
    tensors = load_file(base / "model.safetensors")
    tensors |= {n.replace("model.", "language_model.model."): t.clone() for n, t in tensors.items() if "layers" in n}
    save_file(tensors, base / "model.safetensors")
    folder = renamed(sound, tmp_path / "adapter", "model.", "transformer.")
    with pytest.raises(CheckpointError, match="changes tensors that are missing"):
        LoraSource(Checkpoint.open(base), folder)
    LoraSource(Checkpoint.open(base), sound)  # exact names are meant


def test_the_tokenizer_of_an_adapter(run, bases, sound, tmp_path):
    """That with which it was trained is the output's; a template without a vocabulary is only named."""
    base, folder = shutil.copytree(bases(), tmp_path / "base"), shutil.copytree(sound, tmp_path / "adapter")
    save_tokenizer(base, train_tokenizer(), eos_token="</s>")
    model = f"{base}+{folder}"
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    out = passthrough(run, tmp_path / "one", model)
    assert not (out / "chat_template.jinja").exists()
    recipe = tmp_path / "one/r.yml"
    assert "not copied from the adapter, which has no vocabulary: chat_template.jinja" in run("plan", recipe).err
    save_tokenizer(folder, train_tokenizer(more=["<|tool|>"]), eos_token="</s>")
    assert "that of the adapter, where the model's differs: " in run("plan", recipe).err
    out = passthrough(run, tmp_path / "two", model)
    assert "<|tool|>" in tokens(out) and (out / "chat_template.jinja").exists()
    for file in folder.glob("*token*"):
        shutil.copy(file, base)
    shutil.copy(folder / "chat_template.jinja", base)
    assert "tokenizer" not in run("plan", recipe).err


def spoil(folder, what: str) -> None:
    """Change one thing in an adapter."""
    config, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    options, tensors = json.loads(config.read_text()), load_file(file)
    first = next(n for n in tensors if n.endswith("layers.0.self_attn.q_proj.lora_A.weight"))
    if what == "no config":
        config.unlink()
    elif what == "pickled":
        file.rename(folder / "adapter_model.bin")
    elif what in ("LOHA", "PREFIX_TUNING"):
        config.write_text(json.dumps({**options, "peft_type": what}))
    elif what == "layer_replication":
        config.write_text(json.dumps({**options, what: [[0, 2], [1, 2]]}))
    elif what == "corda":
        config.write_text(json.dumps({**options, "init_lora_weights": what}))
    elif what == "half":
        tensors.pop(first)
    elif what == "ranks":
        tensors[first] = torch.zeros(3, 32)
    elif what == "shapes":
        tensors[first] = torch.zeros(4, 40)
    elif what == "strange module":
        tensors = {name.replace("q_proj", "qkv"): tensor for name, tensor in tensors.items()}
    elif what == "strange tensor":
        tensors[first.replace("lora_A", "lora_C")] = torch.zeros(4)
    elif what == "vocabulary":
        tensors["base_model.model.lm_head.weight"] = torch.zeros(130, 32)
    elif what == "empty":
        tensors = {}
    if file.exists():
        save_file(tensors, file)


WRONG = {
    "no config": ("not an adapter: adapter_config.json is missing", "a folder that peft saved"),
    "pickled": ("adapter_model.safetensors is missing", "adapter_model.bin", "only safetensors is read"),
    "LOHA": ("adapter_config.json: an adapter of an unsupported kind", "peft_type: LORA", "LOHA"),
    "layer_replication": ("adapters with layer_replication are not supported", "merge the adapter with peft"),
    "corda": ("adapters with init_lora_weights are not supported", "path_initial_model_for_weight_conversion"),
    "half": ("model.layers.0.self_attn.q_proj: lora_A.weight is missing",),
    "ranks": ("its two matrices have different ranks", "3 and 4"),
    "shapes": ("for a model of other shapes", "[32, 32] for model.layers.0.self_attn.q_proj.weight", "[32, 40]"),
    "strange module": (
        "changes tensors that are missing from the model",
        "layers.0.self_attn.qkv",
        "may be an adapter of another model",
    ),
    "strange tensor": ("a tensor of an unknown kind", "lora_C"),
    "vocabulary": ("for a model of other shapes", "[128, 32] for lm_head.weight", "[130, 32]", "added tokens"),
    "empty": ("the adapter changes nothing",),
}


@pytest.fixture(scope="module")
def sound(bases, tmp_path_factory):
    return adapter(bases(), tmp_path_factory.mktemp("sound") / "adapter", target_modules=LINEAR)


@pytest.mark.parametrize("what", WRONG)
def test_wrong_adapters(run, bases, sound, tmp_path, what):
    folder = shutil.copytree(sound, tmp_path / "adapter")
    spoil(folder, what)
    recipe = write_recipe(tmp_path / "r.yml", f"merge_method: passthrough\nmodels:\n  - model: {bases()}+{folder}\n")
    done = run("merge", recipe, tmp_path / "out", expect=2)
    for fragment in ("models[0].model (line 3): ", str(folder), *WRONG[what]):
        assert fragment in done.err, done.err
    assert not (tmp_path / "out").exists()


def test_an_adapter_alone_is_no_model(run, sound, tmp_path):
    recipe = write_recipe(tmp_path / "r.yml", f"merge_method: passthrough\nmodels: [{{model: {sound}}}]\n")
    assert "the folder holds an adapter, not a model" in run("plan", recipe, expect=2).err


def test_without_peft_it_says_what_to_install(run, bases, sound, tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path / "r.yml", f"merge_method: passthrough\nmodels: [{{model: {bases()}+{sound}}}]\n")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert 'hint:     pip install "deus-merge[lora]"' in run("plan", recipe, expect=2).err


def test_commands_without_a_recipe_take_adapters(run, bases, sound, tmp_path):
    model = f"{bases()}+{sound}"
    assert run("inspect", model, "--json").json()["layers"] == 2
    run("upscale", model, tmp_path / "out", "--insert", "all", "--lora-merge-cache", tmp_path / "unused")
    assert load(tmp_path / "out").config.num_hidden_layers == 3 and not (tmp_path / "unused").exists()


def test_pluses_in_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("c++", "c++/a+b", "base"):
        os.makedirs(folder)
    assert split_adapter("c++/a+b") == ("c++/a+b", None)
    assert split_adapter("base+c++/a+b") == ("base", "c++/a+b")
    assert split_adapter("c+++base") == ("c++", "base")
    assert split_adapter("org/name@main+org/adapter@v1") == ("org/name@main", "org/adapter@v1")
    assert split_adapter("org/name@main") == ("org/name@main", None)
