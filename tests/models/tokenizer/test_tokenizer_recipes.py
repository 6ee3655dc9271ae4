"""tokenizer_source and tokenizer: through the command line; values are judged in tests/parity, the rest here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from support import (
    load,
    make_model,
    make_speakers,
    save_tokenizer,
    token_ids,
    tokens,
    train_tokenizer,
    weights,
    write_recipe,
)

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
JOINED = "base_model: {base}\nmodels: [{{model: {base}}}, {{model: {other}}}]\n"
LINEAR = "merge_method: linear\nparameters: {{weight: 0.5}}\n"
PASS = "merge_method: passthrough\nslices: [{{sources: [{{model: {base}, layer_range: [0, 4]}}]}}]\n"


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def same_but(folder: Path, new: Path, **changes: object) -> Path:
    """A copy of a model with another config.json."""
    shutil.copytree(folder, new)
    (new / "config.json").write_text(json.dumps(read(folder, "config.json") | changes))
    return new


@pytest.fixture
def merge(run, speakers, tmp_path):
    """Merge a recipe about `speakers`; returns the output, which verifies, and what it printed on stderr."""

    def call(text: str, name: str = "out", **more: Path) -> tuple[Path, str]:
        recipe = write_recipe(tmp_path / f"{name}.yml", text.format(**speakers | more))
        done = run("merge", recipe, tmp_path / name, "--quiet")
        checks = run("verify", tmp_path / name, "--json").json()["checks"]
        skipped = {c["name"]: c["detail"] for c in checks if c["passed"] is None}
        assert skipped.keys() <= {"logits", "copied tensors"}, checks
        derived = "were derived (adapter, tokenizer, document)"
        assert derived in skipped.get("copied tensors", derived)
        return tmp_path / name, done.err

    return call


def test_texts_of_every_source(merge, speakers):
    """Texts that sources encode alike, and the added tokens of each, which stay special or not."""
    out, _ = merge(f"{LINEAR}{JOINED}tokenizer_source: union\n")
    merged, base, other = (
        transformers.AutoTokenizer.from_pretrained(f) for f in (out, speakers["base"], speakers["other"])
    )
    for source, text in ((base, "<s>a.b</s>"), (base, "R<|start|>, <|end|>"), (other, "x<pad>y <|tool|>")):
        assert merged.tokenize(text) == source.tokenize(text)
        assert merged.decode(merged(text).input_ids) == text
    assert base.tokenize("a.b") == other.tokenize("a.b") and base.tokenize("<pad>") != other.tokenize("<pad>")
    assert base.get_vocab().items() <= merged.get_vocab().items()
    assert (merged.bos_token, merged.eos_token) == ("<s>", "</s>")
    flags = {t.content: t.special for t in merged.added_tokens_decoder.values()}
    theirs = {t.content: t.special for s in (other, base) for t in s.added_tokens_decoder.values()}
    assert flags == theirs and not merged.decode(merged("<|tool|>").input_ids, skip_special_tokens=True)


def test_rows_that_stay_are_copied(merge, speakers, run, tmp_path):
    """Where the output has the base's tokens at the base's rows, the tensors go from file to file."""
    out, _ = merge(f"{PASS}tokenizer_source: base\n")
    manifest = read(out, "deus_merge.json")
    assert {t["action"] for t in manifest["tensors"].values()} == {"copy"} and manifest["function_preserving"]
    assert (out / "tokenizer.json").read_bytes() == (speakers["base"] / "tokenizer.json").read_bytes()
    assert manifest["vocabulary"]["maps"][HEAD][0]["own"] == manifest["vocabulary"]["rows"] == 103
    plain = write_recipe(tmp_path / "plain.yml", PASS.format(**speakers))
    assert "vocabulary" not in run("plan", plain, "--json").json()


def test_rows_that_move_are_derived(merge, speakers):
    """Embeddings of one model in another order: derived when they are read, as the manifest records."""
    out, stderr = merge(f"{PASS}base_model: {{base}}\ntokenizer_source: {{other}}\n")
    assert "embeddings: no source has an embedding for 17 tokens ('Ġt'" in stderr and "rows of zeros" in stderr
    manifest = read(out, "deus_merge.json")
    actions = {name: t["action"] for name, t in manifest["tensors"].items()}
    assert {name for name, action in actions.items() if action == "derive"} == {EMBEDDINGS, HEAD}
    assert {action for name, action in actions.items() if name not in (EMBEDDINGS, HEAD)} == {"copy"}
    assert not manifest["function_preserving"]
    merged, base = weights(out), weights(speakers["base"])
    known, mine = tokens(speakers["base"]), tokens(out)
    assert mine == tokens(speakers["other"]) and len(merged[HEAD]) == len(mine)  # rows beyond the tokens are gone
    for token, at in mine.items():
        for name in (EMBEDDINGS, HEAD):
            wanted = base[name][known[token]] if token in known else torch.zeros(32)
            assert torch.equal(merged[name][at], wanted)


def test_ids_of_special_tokens_move(merge, speakers, tmp_path):
    """config.json and generation_config.json follow the tokens; a token that is gone gives way to the tokenizer's."""
    gone = tokens(speakers["base"])["<|start|>"]
    ids = {"pad_token_id": gone, "eos_token_id": [2, 1], "decoder_start_token_id": 0}
    base = same_but(speakers["base"], tmp_path / "base", **ids)
    generation = {"eos_token_id": [1, 0, gone], "pad_token_id": gone, "suppress_tokens": [0], "max_length": 1}
    (base / "generation_config.json").write_text(json.dumps(generation))
    out, stderr = merge(f"{PASS}tokenizer_source: {{other}}\n", base=base)
    mine, known = tokens(out), {i: t for t, i in tokens(base).items()}
    config, generation = read(out, "config.json"), read(out, "generation_config.json")
    assert config["bos_token_id"] == mine["<s>"] == 1 and config["decoder_start_token_id"] == mine["<s>"]
    assert config["eos_token_id"] == [mine[known[2]], mine["</s>"]] and config["vocab_size"] == len(mine)
    assert config["pad_token_id"] is None and f"config.json: the token of pad_token_id {gone} is not in" in stderr
    assert generation == {
        "eos_token_id": [0, 1], "pad_token_id": None, "suppress_tokens": [1], "max_length": 1
    }  # fmt: skip
    untouched, _ = merge(f"{PASS}tokenizer_source: union\n", "untouched", base=base)
    assert (untouched / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_of_a_deeper_model(run, speakers, tmp_path, tied):
    """An up-scaled model computes what its base computes for the base's tokens, and knows the new one as its model."""
    base = make_speakers(tmp_path, tied=tied)["base"]
    token = f'{{kind: model_token, model: {base}, token: "</s>"}}'
    section = f"tokenizer: {{pad_to_multiple_of: 16, tokens: {{<|new|>: {{source: {token}}}}}}}\n"
    for name, text in (
        ("upscaled", f"base_model: {base}\nupscale: {{preset: opt_deus, insert: all}}\n"),
        ("fused", f"slices: [{{merge_method: ot_fuse, sources: [{{model: {base}, layer_range: [0, 4]}}]}}]\n"),
    ):
        done = run("merge", write_recipe(tmp_path / f"{name}.yml", text + section), tmp_path / name)
        assert "'<|new|>' is in no model's tokenizer: it is added" in done.err
        out = tmp_path / name
        assert read(out, "config.json")["vocab_size"] == 112
        model, ids = load(out), token_ids(out)
        assert torch.equal(ids, token_ids(base))
        with torch.no_grad():
            ours, theirs = model(ids).logits, load(base)(ids).logits
            assert torch.equal(ours[..., :103], theirs)
            new = tokens(out)["<|new|>"]
            assert torch.allclose(ours[..., new], theirs[..., 1])
        rows = weights(out)[EMBEDDINGS]
        assert torch.allclose(rows[104:], rows[:104].mean(dim=0).expand(8, -1), atol=1e-6)
        assert run("verify", out).code == 0


def test_plans_differ_by_ids_alone(run, speakers, tmp_path):
    """Two tokens of a source that change places make another plan, which a resume would refuse."""
    other = tmp_path / "other"
    shutil.copytree(speakers["other"], other)
    text = f"{LINEAR}{JOINED}tokenizer_source: base\n".format(**speakers | {"other": other})
    recipe = write_recipe(tmp_path / "r.yml", text)
    before = run("plan", recipe, "--json").json()
    data = read(other, "tokenizer.json")
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(data))
    after = run("plan", recipe, "--json").json()
    assert before["vocabulary"]["digest"] == after["vocabulary"]["digest"]  # of the output
    assert before["plan_hash"] != after["plan_hash"]


def test_a_model_without_a_tokenizer_has_the_first_ones(merge, speakers, tmp_path):
    without = make_model(tmp_path / "without_tokenizer", vocab_size=103, seed=7)
    out, stderr = merge(f"{LINEAR}{JOINED}tokenizer_source: union\n", other=without)
    assert f"{without} has no tokenizer: that of {speakers['base']} is assumed" in stderr
    base, other, merged = (weights(f)[HEAD] for f in (speakers["base"], without, out))
    assert torch.allclose(merged, (base + other) / 2, atol=1e-6)


def test_tokens_beyond_the_embeddings(merge, run, speakers, tmp_path):
    """A plain merge keeps such a tokenizer and warns; the union takes their embeddings from a model that has them."""
    short = make_model(tmp_path / "short", vocab_size=101)
    save_tokenizer(short, train_tokenizer(more=["<|start|>", "<|tool|>"]))
    beyond = "has 1 token ('<|tool|>') beyond the 101 rows of its embeddings"
    plain = write_recipe(tmp_path / "plain.yml", PASS.format(base=short))
    assert beyond in run("merge", plain, tmp_path / "plain").err
    checks = run("verify", tmp_path / "plain", "--json", expect=3).json()["checks"]
    assert [c["name"] for c in checks if c["passed"] is False] == ["tokenizer"]
    out, err = merge(f"{LINEAR}{JOINED}tokenizer_source: union\n", base=short)
    assert f"{beyond}: they are ignored" in err
    at, there = tokens(out)["<|tool|>"], tokens(speakers["other"])["<|tool|>"]
    assert torch.allclose(weights(out)[HEAD][at], weights(speakers["other"])[HEAD][there])


def test_a_special_token_beyond_the_embeddings(merge, tmp_path):
    """transformers adds a pad token that tokenizer_config.json names, so it has to have a row."""
    short = make_model(tmp_path / "short", vocab_size=101)
    save_tokenizer(short, train_tokenizer(more=["<|start|>", "<pad>"]), pad_token="<pad>")
    out, stderr = merge(f"{PASS}tokenizer_source: base\n", base=short)
    assert (
        "has 1 token ('<pad>') beyond the 101 rows" in stderr and "embedding for 1 token ('<pad>'): rows of" in stderr
    )
    assert tokens(out) == tokens(short) and len(weights(out)[HEAD]) == 102 and not weights(out)[HEAD][101].any()


def test_plain_merges_tell_of_other_ids(run, tmp_path):
    """Without tokenizer settings rows are merged in their order, with a warning if tokens differ."""
    folders = {}
    for name, special in (("base", ["<s>", "</s>"]), ("other", ["</s>", "<s>"]), ("like", ["<s>", "</s>"])):
        folders[name] = make_model(tmp_path / name, vocab_size=100)
        save_tokenizer(folders[name], train_tokenizer(special=special))
    recipe = write_recipe(tmp_path / "r.yml", f"{LINEAR}{JOINED}".format(**folders))
    warnings = run("plan", recipe, "--json").json()["warnings"]
    assert (
        len(warnings) == 1
        and "at the ids of 2 tokens ('</s>', '<s>')" in warnings[0]
        and "tokenizer_source: union" in warnings[0]
    )
    recipe = write_recipe(tmp_path / "r.yml", f"{LINEAR}{JOINED}".format(**folders | {"other": folders["like"]}))
    assert run("plan", recipe, "--json").json()["warnings"] == []


def test_no_transformers_without_tokenizer_settings(speakers, tmp_path):
    """Reading tokenizers is for recipes that say something of them."""
    recipe = write_recipe(tmp_path / "r.yml", f"{PASS}chat_template: chatml\n".format(**speakers))
    code = f"import sys; from deus_merge import api; api.plan({str(recipe)!r})\n"
    code += "assert not {'transformers', 'tokenizers', 'torch', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_documents_take_and_give_tokens(run, speakers, tmp_path):
    """A document's result has its tokenizer; rows of tokens may come from one that gives nothing else."""
    first = f"{LINEAR}{JOINED}tokenizer_source: union\nchat_template: chatml\n".format(**speakers)
    last = (
        "merge_method: passthrough\nbase_model: {base}\nslices: [{{sources: [{{model: {base}, layer_range: [0, 2]}}]}},"
        " {{sources: [{{model: mixed, layer_range: [0, 2]}}]}}]\n"
        "tokenizer: {{source: mixed, tokens: {{<|tool|>: {{source: mixed}}, <s>: {{source: mixed, force: true}}}}}}\n"
    ).format(**speakers)
    run("merge", write_recipe(tmp_path / "one.yml", first), tmp_path / "mixed")
    run("merge", write_recipe(tmp_path / "two.yml", last.replace("mixed", str(tmp_path / "mixed"))), tmp_path / "two")
    run("merge", write_recipe(tmp_path / "both.yml", f"name: mixed\n{first}---\n{last}"), tmp_path / "both")
    theirs, ours = weights(tmp_path / "two"), weights(tmp_path / "both")
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[n], t) for n, t in theirs.items())
    assert tokens(tmp_path / "both") == tokens(tmp_path / "mixed") == tokens(tmp_path / "two")
    at = tokens(tmp_path / "both")["<|tool|>"]
    assert torch.equal(ours[HEAD][at], weights(tmp_path / "mixed")[HEAD][at]) and ours[HEAD][at].any()
    assert (tmp_path / "both/chat_template.jinja").exists()
    assert run("verify", tmp_path / "both").code == 0


def test_a_family_that_nobody_described(run, tmp_path):
    """Word embeddings are brought into order, position embeddings are not."""
    folders = {}
    for seed, (name, size, special) in enumerate((("base", 100, ["<s>", "</s>"]), ("other", 110, ["</s>", "<s>"]))):
        torch.manual_seed(seed)
        config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=size, n_positions=100)
        folders[name] = tmp_path / name
        transformers.GPT2LMHeadModel(config).save_pretrained(folders[name])
        save_tokenizer(folders[name], train_tokenizer(size=size, special=special))
    text = f"{LINEAR}{JOINED}tokenizer_source: union\n".format(**folders)
    run("merge", write_recipe(tmp_path / "r.yml", text), tmp_path / "out")
    base, other, merged = (weights(f) for f in (*folders.values(), tmp_path / "out"))
    words, positions = "transformer.wte.weight", "transformer.wpe.weight"
    ids, known = tokens(folders["other"]), tokens(folders["base"])
    for token, at in tokens(tmp_path / "out").items():
        theirs = other[words][ids[token]]
        wanted = (base[words][known[token]] + theirs) / 2 if token in known else theirs
        assert torch.allclose(merged[words][at], wanted, atol=1e-6)
    assert torch.allclose(merged[positions], (base[positions] + other[positions]) / 2, atol=1e-6)
    assert load(tmp_path / "out").config.vocab_size == len(merged[words]) == 110


# fmt: off
WRONG = {
    "both": ("tokenizer_source: base\ntokenizer: {{source: union}}\n", "tokenizer (line 5): a recipe has tokenizer or",
             "hint:     write tokenizer_source as source: inside"),
    "key": ("tokenizer: {{sorce: union}}\n", "tokenizer.sorce (line 4): unknown key", "did you mean 'source'?"),
    "name": ("tokenizer: [union]\n", "tokenizer (line 4): must be a tokenizer section"),
    "source": ("tokenizer: {{source: [a]}}\n", "tokenizer.source (line 4): wrong value"),
    "misspelt union": ("tokenizer_source: unoin\n", "tokenizer_source (line 4): unoin: no such", "mean 'union'?"),
    "folder without one": ("tokenizer_source: .\n", "tokenizer_source (line 4): ", "the tokenizer cannot be loaded"),
    "multiple": ("tokenizer: {{pad_to_multiple_of: 0}}\n", "tokenizer.pad_to_multiple_of (line 4): wrong value",
                 "at least 1", "got:      0"),
    "tokens": ("tokenizer: {{tokens: [a]}}\n", "tokenizer.tokens (line 4): must be a mapping from tokens"),
    "empty token": ('tokenizer: {{tokens: {{"": {{}}}}}}\n', "a token has at least one character"),
    "token key": ("tokenizer: {{tokens: {{a: {{froce: true}}}}}}\n", "tokens.a.froce (line 4)", "did you mean 'force'"),
    "force": ("tokenizer: {{tokens: {{a: {{source: {base}, force: 2}}}}}}\n", "force (line 4)", "true or false"),
    "force alone": ("tokenizer: {{tokens: {{a: {{force: true}}}}}}\n", "tokens.a (line 4): force needs a source"),
    "kind": ("tokenizer: {{tokens: {{a: {{source: {{kind: zeros}}}}}}}}\n", "a.source.kind (line 4): unknown kind",
             "model_token | zero", "did you mean 'zero'?"),
    "zero with a model": ("tokenizer: {{tokens: {{a: {{source: {{kind: zero, model: {base}}}}}}}}}\n", "unknown key"),
    "which token": ("tokenizer: {{tokens: {{a: {{source: {{kind: model_token, model: {base}}}}}}}}}\n",
                    "tokens.a.source (line 4): a model_token has a model, and a token or a token_id"),
    "two tokens": ("tokenizer: {{tokens: {{a: {{source: {{kind: model_token, model: b, token: c, token_id: 1}}}}}}}}\n",
                   "a model_token has a model, and a token or a token_id"),
    "token a list": ("tokenizer: {{tokens: {{a: {{source: {{kind: model_token, model: {base}, token: [b]}}}}}}}}\n",
                     "tokens.a.source.token (line 4): wrong value"),
    "token_id": ("tokenizer: {{tokens: {{a: {{source: {{kind: model_token, model: {other}, token_id: 900}}}}}}}}\n",
                 "tokens.a.source (line 4): ", "has no row 900", "a token_id below 118"),
    "foreign model": ("tokenizer: {{tokens: {{a: {{source: {third}}}}}}}\n", "a model that is not in the recipe", "or"),
    "token of a model": ("tokenizer: {{tokens: {{<|start>: {{source: {base}}}}}}}\n", "tokens.<|start>.source (line 4)",
                         "has no embedding for a token '<|start>'", "did you mean '<|start|>'?"),
    "token of nobody": ("tokenizer: {{tokens: {{<|start>: {{}}}}}}\n", "no model's tokenizer has a token '<|start>'",
                        "{{kind: zero}}", "did you mean '<|start|>'?"),
}
# fmt: on


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings(run, speakers, tmp_path, name):
    text, *fragments = WRONG[name]
    recipe = write_recipe(tmp_path / "r.yml", f"merge_method: karcher\n{JOINED}{text}".format(**speakers))
    done = run("merge", recipe, tmp_path / "out", expect=2)
    for fragment in fragments:
        assert fragment.replace("{{", "{").replace("}}", "}") in done.err, done.err
    assert not (tmp_path / "out").exists() and "Traceback" not in done.err


def test_other_kinds_and_other_sizes(run, speakers, tmp_path):
    wordpiece = make_model(tmp_path / "wordpiece", vocab_size=90)
    save_tokenizer(wordpiece, train_tokenizer("WordPiece", size=80))
    models = speakers | {"other": wordpiece}
    recipe = write_recipe(tmp_path / "r.yml", f"{LINEAR}{JOINED}tokenizer_source: union\n".format(**models))
    stderr = run("plan", recipe, expect=2).err
    assert f"tokenizer_source (line 5): {wordpiece}: tokenizers of different kinds have no union" in stderr
    assert f"BPE over bytes, as that of {speakers['base']}" in stderr and "WordPiece over characters" in stderr
    recipe = write_recipe(tmp_path / "r.yml", f"{LINEAR}{JOINED}".format(**models))
    assert "hint:     tokenizer_source: union or base" in run("plan", recipe, expect=2).err


def test_damaged_tokenizers(run, speakers, tmp_path):
    """An error where a recipe uses them; a plain merge copies them, and warns that they were not checked."""
    for number, content in enumerate((b"{", b"[]", b'{"model": {}}', b'{"model": {"vocab": {"a": -1}}}', b"\xff")):
        folder = same_but(speakers["other"], tmp_path / str(number))
        (folder / "tokenizer.json").write_bytes(content)
        plain = write_recipe(tmp_path / "plain.yml", PASS.format(base=folder))
        assert "was not checked" in run("plan", plain, "--json").json()["warnings"][0]
        asked = write_recipe(tmp_path / "asked.yml", f"{PASS}tokenizer_source: base\n".format(base=folder))
        assert (
            f"tokenizer_source (line 3): {folder}: the tokenizer cannot be loaded" in run("plan", asked, expect=2).err
        )
