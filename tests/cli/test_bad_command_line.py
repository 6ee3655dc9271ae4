"""Broken models and wrong command lines: the message has the place, expected and got; nothing is written.

A row is a model or a command line and the fragments that its message must contain.
"""

from __future__ import annotations

from string import Template

import pytest

INSERT = "even | top_half | bottom_half | all | {every: k} | {after: [i, ...]} | {count: m, where: ...}"

# fmt: off
# A model folder, and the fragments; all begin with `base_model (line 1): <folder>`.
MODELS = {
    "pickled": ("no safetensors file", "got:      pytorch_model.bin", "a pickle is a program: --allow-pickle"),
    "hollow": ("config.json: the file is missing",),
    "list_config": ("config.json: the config is not a JSON object",),
    "cut_config": ("config.json: the config is not strict JSON",),
    "no_type": ("config.json has no model_type",),
    "deeper": ("config.json's num_hidden_layers does not fit the tensors", "expected: 5 layers", "got:      4 layers"),
    "shallower": ("num_hidden_layers does not fit the tensors", "expected: 3 layers, 0 to 2", "got:      4 layers"),
    "text_depth": ("num_hidden_layers must be a positive integer", "the number of layers, at least 1", "got:      '4'"),
    "mystery_depth": ("unknown family 'mystery': no depth in config.json fits its 4 layers", "num_hidden_layers or"),
    "layer_types": ("layer_types does not fit the depth", "expected: 4 entries, one per layer", "got:      3 entries"),
    "hole": ("layer 2 lacks its 'up' tensor", "expected: model.layers.2.mlp.up_proj.weight"),
    "no_embeddings": ("the checkpoint lacks model.embed_tokens.weight",),
    "no_head": ("the checkpoint lacks lm_head.weight", "tie_word_embeddings: false"),
    "five_heads": ("config.json does not fit model.layers.0.self_attn.q_proj.weight", "expected: shape [40, 32]",
                   "got:      [32, 32]", "num_attention_heads: 5"),
    "kv_heads": ("does not fit model.layers.0.self_attn.k_proj.weight", "expected: shape [24, 32]"),
    "hidden_size": ("config.json does not fit", "hidden_size: 64"),
    "vocab_size": ("does not fit model.embed_tokens.weight", "expected: shape [99, 32]", "got:      [128, 32]"),
    "lfs_weights": ("model.safetensors: a Git LFS pointer, not the file itself", "git lfs pull"),
    "lfs_config": ("config.json: a Git LFS pointer, not the file itself", "git lfs pull"),
    "gguf": ("base.gguf: the header is longer than the file", "truncated"),
    "gguf_and_config": ("base.gguf: a GGUF file is read only as a model of its own",
                        "name the file itself as the model"),
    "gguf_by_name": ("model.safetensors: a GGUF file is read only as a model of its own", "rename it to *.gguf"),
    "odd_layer": ("does not fit model.layers.2.mlp.up_proj.weight", "expected: shape [48, 32]", "got:      [40, 32]"),
}

UP = ("upscale", "base", "$out")
COMMANDS = {
    "command": (("upscal", "base", "$out"), "no such command 'upscal'", "did you mean 'upscale'?"),
    "no arguments": (("merge",), "missing argument 'RECIPE'", "hint:     deus-merge merge --help"),
    "no OUT": (("merge", "$recipe"), "missing argument 'OUT'", "usage:    deus-merge merge [OPTIONS] RECIPE OUT"),
    "one too many": (("merge", "$recipe", "$out", "more"), "unexpected extra argument (more)"),
    "option": ((*UP, "--overwrit"), "error: no such option --overwrit", "did you mean '--overwrite'?"),
    "recipe a folder": (("merge", "base", "$out"), "base: the recipe cannot be read: Is a directory"),
    "plan of nothing": (("plan", "nothing.yml"), "nothing.yml: the recipe cannot be read: No such file"),
    "model": (("upscale", "./bse", "$out"), "base_model: ./bse: no such folder"),
    "no model": (("upscale", "", "$out"), "base_model: wrong value", "a folder or org/name"),
    "preset": ((*UP, "--preset", "solr"), "upscale.preset: unknown preset", "did you mean 'solar'?"),
    "dtype": ((*UP, "--dtype", "bf16"), "dtype: unknown dtype", "did you mean 'bfloat16'?"),
    "insert no YAML": ((*UP, "--insert", "{every: 2"), "--insert (line 1): not valid YAML", "expected: ',' or '}'"),
    "insert twice": ((*UP, "--insert", "all\n---\nall"), "--insert (line 3): a second document", "one YAML document"),
    "insert word": ((*UP, "--insert", "top"), "upscale.insert: unknown insert form", INSERT),
    "insert empty": ((*UP, "--insert", ""), "--insert: the text is empty"),
    "insert 0": ((*UP, "--insert", "{count: 0}"), "upscale.insert.count: wrong value", "at least 1", "got:      0"),
    "param": ((*UP, "-p", "reg"), "--param: 'reg' is not NAME=VALUE"),
    "param without name": ((*UP, "-p", "=3"), "--param: '=3' is not NAME=VALUE"),
    "param without value": ((*UP, "-p", "reg="), "--param: 'reg=' is not NAME=VALUE"),
    "param twice": ((*UP, "-p", "t=1", "-p", "t=0"), "--param: 't' is given twice"),
    "param no YAML": ((*UP, "-p", "zero_init=[o"), "--param zero_init (line 1): not valid YAML"),
    "param name": ((*UP, "-p", "rge=3"), "upscale.parameters.rge: ot_fuse has no parameter", "did you mean 'reg'?"),
    "param value": ((*UP, "-p", "reg=-1"), "upscale.parameters.reg: not a value of reg", "a number above 0, or auto"),
    "size": ((*UP, "--max-memory", "8 gigs"), "error: --max-memory: '8 gigs' is not a size", "like 5GB or 8GiB"),
    "size 0": ((*UP, "--max-shard-size", "0"), "--max-shard-size: ", "at least 1 byte"),
    "memory": ((*UP, "--max-memory", "1MB"), "--max-memory: the plan needs more memory", "got:      1.00 MB"),
    "threads": ((*UP, "--threads", "100000000"), "-j: 100000000 is not in the range"),
    "seed": ((*UP, "--seed", "x"), "--seed / --random-seed: 'x' is not a valid integer"),
    "device": ((*UP, "--device", "gpu"), "--device: unknown device", "auto, cpu, cuda or cuda:N", "got:      gpu"),
    "device number": ((*UP, "--device", "cuda:99"), "CUDA device\n  expected: ", "got:      cuda:99"),
    "OUT = source": (("upscale", "base", "base"), "base: the output and a source must not contain each other"),
    "OUT in source": (("upscale", "base", "base/deeper"), "must not contain each other", "a folder outside the models"),
    "OUT around source": (("upscale", "base", "."), "must not contain each other", "a folder outside the models"),
    "OUT a file": (("upscale", "base", "$recipe"), "recipe.yml: the output is not a folder", "choose another output"),
    "OUT under a file": (("upscale", "base", "$recipe/out"), "recipe.yml", "Not a directory"),
    "OUT not empty": (("upscale", "base", "$full"), "the output folder is not empty", "keep.txt", "--overwrite"),
    "OUT no model": (("upscale", "base", "$full", "--overwrite"), "holds no model: it will not be overwritten"),
    "verify": (("verify", "base"), "base/deus_merge.json: no manifest", "merge and upscale write one"),
    "demo before it ran": (("upscale", "demo/SmolLM2-135M-Instruct", "$out"), "not in the hub's cache",
                           "deus-merge demo makes the models in demo/", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "option far off": ((*UP, "--zzz"), "error: no such option --zzz\n", "hint:     deus-merge upscale --help"),
    "choice": ((*UP, "--optimizer", "adam"), "error: --optimizer: 'adam' is not one of 'adamw'"),
    "no such folder": (("verify", "./bse"), "error: OUT: Directory './bse' does not exist\n"),
    "recipes": (("recipes", "opt_dues"), "no recipe 'opt_dues' ships", "did you mean 'opt_deus'"),
    "completion": (("completion", "csh"), "[bash|zsh|fish]", "'csh' is not one of 'bash', 'zsh', 'fish'"),
    "inspect": (("inspect", "./bse"), "./bse: no such folder"),
    "methods": (("methods", "ot_fues"), "unknown name 'ot_fues'", "did you mean 'ot_fuse' or 'opt_deus'?"),
    "methods far off": (("methods", "xyzzy"), "unknown name 'xyzzy'", "deus-merge methods without a name lists all"),
    "json": ((*UP, "--json", "--preset", "solr"), "upscale.preset: unknown preset"),
}
# fmt: on


@pytest.mark.parametrize("name", MODELS)
def test_wrong_models(refused, tmp_path, workshop, name):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"base_model: {name}\nupscale: {{preset: average}}\n")
    told = refused(("merge", recipe, tmp_path / "out"), (f"base_model (line 1): {workshop / name}", *MODELS[name]))
    assert f"did you mean '{name}'" not in told  # that is what was written


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_command_lines(refused, tmp_path, name):
    arguments, *fragments = COMMANDS[name]
    recipe, full = tmp_path / "recipe.yml", tmp_path / "full"
    recipe.write_text("base_model: base\nupscale: {}\n")
    full.mkdir()
    (full / "keep.txt").write_text("mine")
    given = [Template(a).substitute(out=tmp_path / "out", recipe=recipe, full=full) for a in arguments]
    lines = refused(given, fragments).splitlines()
    begins = ("error: ", "  expected: ", "  got:      ", "  hint:     ", "  usage:    ")
    assert all(line.startswith(begins) for line in lines), lines


def test_an_existing_output_outlives_wrong_input(run, refused, tmp_path):
    out = tmp_path / "out"
    run("upscale", "base", out, "--preset", "copy_next")
    refused(("upscale", "base", out), ("the output folder is not empty", "--overwrite"))
    refused(("upscale", "base", out, "--overwrite", "--preset", "solr"), ("did you mean 'solar'?",))
    refused(("upscale", "base", out, "--overwrite", "--max-memory", "1MB"), ("needs more memory",))
