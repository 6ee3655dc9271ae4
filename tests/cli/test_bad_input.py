"""Wrong input, as a newcomer would give it: the message has the place, expected and got; nothing is written.

A row is a recipe and the fragments that its message must contain.
"""

from __future__ import annotations

import pytest

PASS = "merge_method: passthrough\n"
SLICE = "slices:\n  - sources:\n      - {model: base, layer_range: [0, 2]}\n"
INSERT = "even | top_half | bottom_half | all | {every: k} | {after: [i, ...]} | {count: m, where: ...}"


def source(keys: str, method: str = PASS) -> str:
    return f"{method}slices:\n  - sources:\n      - {{{keys}}}\n"


def pair(one: str, other: str, method: str = "karcher") -> str:
    return f"merge_method: {method}\nslices:\n  - sources:\n      - {{{one}}}\n      - {{{other}}}\n"


def models(*names: str, method: str = "karcher") -> str:
    return f"merge_method: {method}\nmodels:\n" + "".join(f"  - model: {name}\n" for name in names)


def scale(value: str) -> str:
    return f"{PASS}{SLICE}parameters:\n  scale: {value}\n"


def upscale(section: str, base: str = "base") -> str:
    return f"base_model: {base}\nupscale: {section}\n"


def insert(form: str) -> str:
    return upscale(f"{{insert: {form}}}")


def parameter(text: str) -> str:
    return upscale(f"\n  parameters:\n    {text}")


_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)

_MERGES = (
    "x-a: &a {"
    + ", ".join(f"k{i}: 0" for i in range(50))
    + "}\n"
    + "".join(
        f"x-{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 10)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
)

# fmt: off
RECIPES = {
    # the file
    "missing file": (None, "recipe.yml: the recipe cannot be read: No such file"),
    "empty file": ("", "recipe.yml: the text is empty"),
    "only a comment": ("# later\n", "the text is empty"),
    "a list": ("- base\n- other\n", "recipe.yml (line 1): must be a recipe", "key: value pairs", "['base', 'other']"),
    "text": ("hello\n", "(line 1): must be a recipe", "the keys align, base_model", "got:      'hello'"),
    "not utf-8": (b"merge_method: passthrough # \xe9\n", "recipe.yml: the recipe cannot be read: not UTF-8 text"),
    "nul byte": (b"merge_method: a\0\n", "not valid YAML", "unacceptable character #x0000"),
    "tab": ("slices:\n\t- sources: []\n", "(line 2): not valid YAML", "hint:     indent with spaces, not tabs"),
    "unclosed list": (f"{PASS}slices: [a\n", "(line 3): not valid YAML", "expected: ',' or ']'",
                      "got:      the end of the text", "the list that begins in line 2 does not end before"),
    "unclosed text": (f'{PASS}slices: "a\n', "(line 3): not valid YAML", "unexpected end of stream",
                      "the text that begins in line 2"),
    "two keys in a line": ("merge_method: linear: base\n", "(line 1): not valid YAML", "quote text that contains ': '"),
    "no colon": (f"{PASS}slices\n", "(line 3): not valid YAML", "expected: ':'"),
    "documents": ("a: 1\n---\nb: 2\n", "a (line 1): unknown key 'a'"),
    "undefined alias": ("slices: *all\n", "(line 1): not valid YAML", "undefined alias 'all'"),
    "double key": (PASS + SLICE + PASS, "(line 5): duplicate key 'merge_method'", "each key once"),
    "double inner key": (source("model: base, model: other"), "sources[0] (line 4): duplicate key 'model'"),
    "list as key": ("? [a, b]\n: c\n", "(line 1): a key must be text"),
    "merge key": (f"x-c: &x {{a: 1}}\n<<: *x\n{PASS}", "a (line 1): unknown key 'a'"),
    "merged text": (f"x-c: &x text\n<<: *x\n{PASS}", "(line 2): << merges mappings", "got:      !!str"),
    "two merge keys": (f"x-c: &x {{}}\n<<: *x\n<<: *x\n{PASS}", "(line 3): duplicate key '<<'", "<<: [*one, *other]"),
    "endless merge": ("slices: &a\n  - &b {<<: *b}\n", "the recipe is nested too deeply", "at most 32 levels"),
    "merges of merges": (_MERGES, "the recipe's anchors make it too large", "at most 200000 values"),
    "unused anchor": (f"common: &c 3\n{PASS}{SLICE}", "common (line 1): unknown key", "begins with x-"),
    "anchor of a misspelt key": (f"parametres: &c {{scale: 2}}\n{PASS}{SLICE}parameters: *c\n",
                                 "parametres (line 1): unknown key", "did you mean 'parameters'?"),
    "mergekit-moe": ("base_model: base\ngate_mode: hidden\nexperts:\n  - source_model: other\n",
                     "experts (line 4): this is a mergekit-moe recipe; not supported here", "with mergekit-moe"),
    "mergekit-evolve": ("genome:\n  models: [base]\n", "genome (line 2): this is a mergekit-evolve recipe"),
    "bakllama": ("layer_slices:\n  - {model: base, start: 0, end: 2}\n", "this is a bakllama recipe", "passthrough"),
    "mergekit-mega": (f"name: a\n{PASS}{SLICE}---\nname: b\n{PASS}slices: [{{sources: [{{model: a}}]}}]\n",
                      "every document has a name", "in a mergekit-mega recipe"),
    "billion laughs": (_LAUGHS, "the recipe's anchors make it too large", "at most 200000 values"),
    "endless anchor": ("slices: &a [*a]\n", "the recipe is nested too deeply", "at most 32 levels"),
    "nested": (f"slices: {'[' * 2000}{']' * 2000}\n", "the recipe is nested too deeply"),
    "python tag": ("slices: !!python/object/apply:os.system [ls]\n",
                   "slices (line 1): a tag is not supported", "!!python/object/apply:os.system"),
    "scalar tag": (scale("!!bool nay"), "parameters.scale (line 6): not a plain value", "!!bool nay"),
    "endless number": (scale("9" * 400), "parameters.scale (line 6): not a plain value", "!!int 999"),
    "huge text": ('slices: {x: [&a "' + "x" * 100_000 + '", ' + ", ".join(["*a"] * 10_000) + "]}\n",
                  "slices (line 1): must be a list of slices", "got:      {x: ['xxx", "xxx..."),

    # keys and their kinds, from the top down
    "top key": (f"{PASS}{SLICE}dtyp: bfloat16\n", "dtyp (line 5): unknown key 'dtyp'", "did you mean 'dtype'?"),
    "slice key": (f"{PASS}slices:\n  - source: []\n", "slices[0].source (line 3): unknown key", "mean 'sources'?"),
    "source key": (source("model: base, layer-range: [0, 2]"), "slices[0].sources[0].layer-range (line 4)",
                   "did you mean 'layer_range'?"),
    "models key": (f"{models('base')}    weight: 1\n", "models[0].weight (line 4): unknown key", "model, parameters"),
    "upscale key": (upscale("{presett: solar}"), "upscale.presett (line 2): unknown key", "did you mean 'preset'?"),
    "modules": (f"{PASS}modules: {{}}\n", "modules (line 2): no module", "modules: {name: {slices: [...]}}"),
    "neither form": (PASS, "exactly one of slices, models, modules, upscale", "got:      none of them"),
    "both forms": (f"{PASS}{SLICE}models: [{{model: base}}]\n", "exactly one of slices, models", "slices, models"),
    "slices a mapping": (f"{PASS}slices:\n  sources: []\n", "slices (line 3): must be a list of slices"),
    "slices empty": (f"{PASS}slices:\n", "slices (line 2): must be a list of slices", "got:      nothing"),
    "slice a name": (f"{PASS}slices: [base]\n", "slices[0] (line 2): must be a slice", "the keys align, base_model"),
    "no sources": (f"{PASS}slices:\n  - parameters: {{}}\n", "slices[0] (line 3): a slice needs sources", "model: ..."),
    "sources empty": (f"{PASS}slices:\n  - sources: []\n", "slices[0].sources (line 3): must be a list of sources"),
    "source a name": (f"{PASS}slices:\n  - sources: [base]\n", "slices[0].sources[0] (line 3): must be a source"),
    "no model": (source("layer_range: [0, 2]"), "slices[0].sources[0] (line 4): a source needs a model"),
    "no method": (SLICE, "slices[0] (line 2): no merge_method", "merge_method in the slice or at the top level"),
    "method": (f"merge_method: passthru\n{SLICE}", "merge_method (line 1): unknown merge method", "'passthrough'?"),
    "method of a slice": ("slices:\n  - merge_method: otfuse\n    sources: [{model: base}]\n",
                          "slices[0].merge_method (line 2): unknown merge method", "did you mean 'ot_fuse'?"),
    "method a list": (f"merge_method: [linear]\n{SLICE}", "merge_method (line 1)", "linear | model", "['linear']"),
    "dtype": (f"{PASS}{SLICE}dtype: bflot16\n", "dtype (line 5): unknown dtype", "did you mean 'bfloat16'?"),
    "out_dtype": (f"{PASS}{SLICE}out_dtype: int8\n", "out_dtype (line 5)", "float64 | float32 | float16 | bfloat16"),
    "dtype a number": (f"{PASS}{SLICE}dtype: 16\n", "dtype (line 5): wrong value", "got:      16"),

    # layer ranges
    "reversed": (source("model: base, layer_range: [3, 1]"), "slices[0].sources[0].layer_range (line 4): reversed",
                 "[first, last + 1]", "got:      [3, 1]", "did you mean [1, 3]?"),
    "empty": (source("model: base, layer_range: [2, 2]"), "slices[0] (line 3): the output has no layers"),
    "empty and new": (source("model: base, layer_range: [0, 4]") + "  - merge_method: ot_fuse\n    sources:"
                      " [{model: base, layer_range: [2, 2]}]\n",
                      "slices[1].sources[0] (line 6): ot_fuse makes new layers"),
    "beyond": (source("model: base, layer_range: [2, 9]"), "slices[0].sources[0].layer_range (line 4): layer_range goes"
               " beyond the 4 layers of base", "[first, last + 1] within [0, 4]", "got:      [2, 9]"),
    "one number": (source("model: base, layer_range: [2]"), "a layer_range has two numbers", "[first, last + 1]"),
    "range as text": (source("model: base, layer_range: 0-2"), "must be a layer_range", "got:      '0-2'"),
    "negative": (source("model: base, layer_range: [-1, 2]"), "layer_range[0] (line 4): wrong value", "at least 0"),
    "fraction": (source("model: base, layer_range: [0, 2.5]"), "layer_range[1] (line 4): wrong value", "whole number"),
    "unequal": (pair("model: base, layer_range: [0, 4]", "model: other, layer_range: [0, 3]"),
                "slices[0].sources[1].layer_range (line 5): the sources of a slice must have the same",
                "4 layers, as in sources[0]", "3 layers: [0, 3]"),
    "unequal depth": (pair("model: base", "model: deep"), "slices[0] (line 3): the sources of a slice must",
                      "base: 4, deep: 6", "give each source a layer_range"),
    "unequal models": (models("base", "deep"), "models (line 3)", "base: 4, deep: 6", "layer_range (in slices)"),

    # parameters
    "parameter": (source("model: base, parameters: {scal: 1}"), "sources[0].parameters.scal (line 4): passthrough has"
                  " no parameter 'scal' of a source", "did you mean 'scale'?"),
    "another's parameter": (f"{PASS}{SLICE}parameters: {{t: 1}}\n", "parameters.t (line 5): passthrough has no"),
    "slice's parameter": (pair("model: base, parameters: {t: 1}", "model: other", "slerp"),
                          "slices[0] (line 3): slerp needs t, which has no default"),
    "new layers' parameter": (source("model: base, parameters: {t: 1}", "merge_method: ot_fuse\n"),
                              "slices[0].sources[0].parameters.t (line 4)", "t is a parameter of the whole slice"),
    "parameters a list": (f"{PASS}{SLICE}parameters: [scale]\n", "parameters (line 5): must be a mapping of"),
    "number": (scale("big"), "parameters.scale (line 6): not a value of scale", "a number", "got:      'big'"),
    "true": (scale("true"), "parameters.scale (line 6)", "expected: a number", "got:      true"),
    "infinity": (scale("1e999"), "parameters.scale (line 6): not a value of scale", "'1e999'"),
    "gradient with a word": (scale("[0, half, 1]"), "parameters.scale[1] (line 6): a gradient is a list of numbers"),
    "gradient of a boolean": (f"{models('base', method='linear')}parameters: {{normalize: [0, 1]}}\n",
                              "parameters.normalize (line 4): normalize takes no gradient", "true or false"),
    "filter without value": (scale("[{filter: mlp}, {value: 1}]"), "parameters.scale[0] (line 6): a filter entry needs",
                             "value: ...", "{filter: 'mlp'}"),
    "filter key": (scale("[{filtr: mlp, value: 1}]"), "scale[0].filtr (line 6): unknown key", "mean 'filter'?"),
    "filter list": (scale("[{filter: [q, k], value: 1}]"), "scale[0].filter (line 6)", "part of a tensor name"),
    "filtered value": (scale("[{filter: q, value: big}]"), "parameters.scale[0].value (line 6)", "expected: a number"),
    "filters and numbers": (scale("[{filter: q, value: 1}, 2]"), "parameters.scale (line 6): mixed list"),
    "reg": (parameter("reg: -1"), "upscale.parameters.reg (line 4): not a value of reg", "a number above 0, or auto"),
    "reg nothing": (parameter("reg:"), "upscale.parameters.reg (line 4)", "got:      nothing"),
    "solver": (parameter("solver: sinkhron"), "not a value of solver", "| sinkhorn", "did you mean 'sinkhorn'?"),
    "zero_init": (parameter("zero_init: [q]"), "upscale.parameters.zero_init (line 4), layer 1 of the output",
                  "'q' does not write to the residual stream; these do: o, down"),
    "no layers per gap": (parameter("layers_per_gap: 0"), "layers_per_gap (line 4)", "a whole number from 1 to 64"),
    "layers per gap list": (parameter("layers_per_gap: [1, 2]"), "layers_per_gap takes no gradient", "whole number"),
    "filter on a layer": (parameter("t: [{filter: mlp, value: 0.5}]"), "t applies to a whole layer, so it"),
    "yes": (parameter("unit_rows: 'yes'"), "upscale.parameters.unit_rows (line 4)", "true or false", "got:      'yes'"),
    "upscale's parameter": (parameter("rge: 1"), "upscale.parameters.rge (line 4): ot_fuse has no", "mean 'reg'?"),

    # upscale
    "preset": (upscale("{preset: opt_dues}"), "upscale.preset (line 2): unknown preset", "did you mean 'opt_deus'?"),
    "preset a list": (upscale("{preset: [solar]}"), "upscale.preset (line 2)", "the name of a preset", "['solar']"),
    "upscale a name": (upscale("opt_deus"), "upscale (line 2): must be an upscale section", "keys insert, parameters"),
    "upscale nothing": (upscale(""), "upscale (line 2): must be an upscale section", "got:      nothing"),
    "upscale what": ("upscale: {preset: solar}\n", "upscale needs base_model", "base_model: a folder or org/name"),
    "upscale and method": (f"{upscale('{}')}merge_method: linear\n", "upscale and merge_method exclude",
                           "choose a preset inside upscale"),
    "upscale and parameters": (f"{upscale('{}')}parameters: {{reg: 1}}\n", "parameters (line 3)", "inside upscale"),
    "insert name": (insert("tophalf"), "upscale.insert (line 2): unknown insert form", "did you mean 'top_half'?"),
    "insert behind the last": (insert("{every: 4}"), "this inserts no layer: the last layer has no upper neighbour"),
    "insert number": (insert("3"), "upscale.insert (line 2): not an insert form", INSERT, "got:      3"),
    "insert list": (insert("[1, 2]"), "upscale.insert (line 2): not an insert form", INSERT, "got:      [1, 2]"),
    "insert nothing": (insert(""), "upscale.insert (line 2): not an insert form", INSERT, "got:      nothing"),
    "insert key": (insert("{evry: 2}"), "upscale.insert.evry (line 2): unknown key", "did you mean 'every'?"),
    "insert two": (insert("{every: 2, after: [1]}"), "upscale.insert (line 2): an insert form has one of every, after"),
    "insert where": (insert("{where: top}"), "an insert form has one of every, after, count", INSERT),
    "every 0": (insert("{every: 0}"), "upscale.insert.every (line 2)", "a whole number of at least 1", "got:      0"),
    "every true": (insert("{every: true}"), "upscale.insert.every (line 2)", "a whole number", "got:      true"),
    "every 9": (insert("{every: 9}"), "upscale.insert (line 2): this inserts no layer", "the 3 gaps of 4 layers"),
    "after a number": (insert("{after: 2}"), "upscale.insert.after (line 2): must be a list of layers"),
    "after the last": (insert("{after: [3]}"), "upscale.insert.after[0] (line 2): no new layer can follow layer 3:"
                       " the last layer has no upper neighbour", "0 to 2"),
    "after the end": (insert("{after: [1, 9]}"), "insert.after[1] (line 2)", "layer 9: the model ends there", "0 to 2"),
    "after twice": (insert("{after: [1, 1]}"), "insert.after[1] (line 2): layer 1 is named twice", "layers_per_gap"),
    "too many": (insert("{count: 9}"), "insert.count (line 2): 9 new layers do not fit into 3 gaps", "1 to 3"),
    "count where": (insert("{count: 1, where: upper}"), "insert.where (line 2): unknown place", "bottom | even |"),
    "solar's insert": (upscale("{preset: solar, insert: all}"), "upscale.insert (line 2): solar takes only a count"),
    "solar odd": (upscale("{preset: solar, insert: {count: 3}}"), "insert.count (line 2)", "at most 4, and an even"),
    "solar's parameter": (upscale("{preset: solar, parameters: {reg: 1}}"), "solar has no parameters"),
    "stack part": (upscale("{preset: stack, insert: {count: 3}}"), "a multiple of 4", "with where: top | middle"),

    # model references and side files
    "model a list": (source("model: [a, b]"), "slices[0].sources[0].model (line 4)", "a folder or org/name[@revision]"),
    "model nothing": (source("model: "), "slices[0].sources[0].model (line 4)", "got:      nothing"),
    "model key": (source("model: {pth: base}"), "model.pth (line 4): unknown key", "did you mean 'path'?"),
    "no path": (source("model: {revision: main}"), "model (line 4): a model reference needs a path"),
    "adapter": (source("model: base+adapter"), "slices[0].sources[0].model (line 4): adapter: no such folder"),
    "adapter key": (source("model: {model: base, lora: a}"), "slices[0].sources[0].model (line 4): a: no such folder"),
    "adapter misspelt": (source("model: {model: base, lor: a}"), "model.lor (line 4): unknown key 'lor'", "'lora'"),
    "no adapter": (source("model: base+other"), "other: not an adapter: adapter_config.json is missing"),
    "endless name": (source(f"model: {'x' * 5000}+y"), "slices[0].sources[0].model (line 4): xxx", "no such folder"),
    "no such folder": (source("model: ./bse"), "slices[0].sources[0].model (line 4): ./bse: no such folder"),
    "no such model": (source("model: nobody/nothing"), "nobody/nothing: no such folder, and not in the hub's cache"),
    "revision of a folder": (source("model: base@main"), "base@main: a local folder has no revisions", "remove @main"),
    "a file": (source("model: base/config.json"), "config.json: not a folder", "name its folder: base"),
    "a GGUF file": (source("model: gguf/base.gguf"), "base.gguf: the header is longer than the file", "truncated"),
    "tokenizer in LFS": (source("model: lfs_tokenizer"), "tokenizer.json: a Git LFS pointer", "git lfs pull"),
    "base_model a list": (f"{PASS}{SLICE}base_model: [a]\n", "base_model (line 5): wrong value", "got:      ['a']"),
    "no tokenizer": (f"{PASS}{SLICE}tokenizer_source: union\n", "tokenizer_source (line 5): base has no tokenizer",
                     "tokenizer.json, or another file", "none of them, and 128 rows of embeddings"),
    "tokenizer number": (f"{PASS}{SLICE}tokenizer_source: 3\n", "tokenizer_source (line 5): wrong value"),
    "chat_template": (f"{PASS}{SLICE}chat_template: chatlm\n", "chat_template (line 5): not a chat template",
                      "auto, alpaca, chatml, exaone, llama3, mistral, or a Jinja template", "did you mean 'chatml'?"),
    "chat_template list": (f"{PASS}{SLICE}chat_template: []\n", "chat_template (line 5)", "or a Jinja template"),
    "broken Jinja": (f"{PASS}{SLICE}chat_template: '{{% for m in messages %}}'\n", "chat_template (line 5): not a",
                     "Jinja template", "Unexpected end of template"),

    # how many sources, and whether they fit each other
    "two passed through": (models("base", "other", method="passthrough"), "models (line 3)", "one source, not 2"),
    "slerp of one": (models("base", method="slerp"), "models (line 3)", "slerp takes exactly two models, not 1"),
    "ot_fuse of three": (models("base", "other", "other", method="ot_fuse"), "ot_fuse takes one source", "not 3"),
    "no gap": (source("model: base, layer_range: [1, 2]", "merge_method: ot_fuse\n"),
               "slices[0].sources[0] (line 4): a single layer has no gap for ot_fuse", "at least two layers"),
    "foreign base": (pair("model: base", "model: other", "slerp") + "base_model: deep\n",
                     "base_model (line 6): slerp starts from the base model, but no source", "base or other", "'deep'"),
    "ties without base": (models("base", "other", method="ties") + "parameters: {weight: 1}\n",
                          "models (line 3): ties needs a base model", "base_model: base or other", "no base_model"),
    "ties without weight": (models("base", "other", method="ties") + "base_model: base\n",
                            "models[1] (line 4): ties needs weight, which has no default", "{weight: a number}",
                            "no value for model.embed_tokens.weight"),
    "weight of some tensors": (
        models("base", "other", method="linear") + "parameters: {weight: [{filter: mlp, value: 1}]}\n",
        "models[0] (line 3): linear needs weight", "no value for model.embed_tokens.weight"),
    "nuslerp of three": (models("base", "other", "wide", method="nuslerp"), "nuslerp takes exactly 2 models", "not 3"),
    "density": (models("base", "other", method="ties") + "parameters: {density: 1.5}\n", "parameters.density (line 5)",
                "a number from 0 to 1", "got:      1.5"),
    "epsilon": (models("other", method="della") + "base_model: base\nparameters: {density: 0.9, weight: 1}\n",
                "models (line 3)", "density - epsilon to density + epsilon, here 0.75 to 1.05", "between 0 and 1"),
    "cancelling weights": (
        "merge_method: multislerp\nmodels:\n  - {model: base, parameters: {weight: 1}}\n"
        "  - {model: other, parameters: {weight: -1}}\n", "the weights sum to 0 for model.embed_tokens.weight"),
    "other shapes": (models("base", "wide"), "models[1] (line 4): models do not match", "as layer 0 of base",
                     "layer 0 of wide has gate [64, 32], not [48, 32]"),
    "other tensors": (models("base", "qwen3"), "models[1] (line 4): models do not match", "has also q_norm, k_norm"),
    "other heads": (models("base", "heads"), "models[1].model (line 4): models do not match: num_attention_heads",
                    "4, as in base", "2 in heads"),
    "other vocabulary": (models("base", "vocabulary"), "models[1] (line 4): models do not match", "embeddings of base",
                         "model.embed_tokens.weight [130, 32], not [128, 32]"),
    "layers of another kind": (
        f"{PASS}slices:\n  - sources: [{{model: base}}]\n  - sources: [{{model: qwen3, layer_range: [1, 2]}}]\n",
        "slices[1].sources[0] (line 4): models do not match", "the layers of base", "layer 1 of qwen3 has also q_norm"),
    "undescribed family": (upscale("{}", "mystery"), "upscale (line 2), layer 1 of the output: ot_fuse does not know",
                           "a described family (deus-merge methods lists them)", "model_type mystery"),
    "layers differ": (upscale("{insert: all}", "extra"), "ot_fuse does not know what 'mlp.strange.weight' does"),
    "integers": (upscale("{}", "integers"), "integers/model.safetensors", "int8, which cannot be merged", "quantised"),
}
# fmt: on


@pytest.mark.parametrize("name", RECIPES)
def test_wrong_recipes(refused, tmp_path, name):
    text, *fragments = RECIPES[name]
    recipe = tmp_path / "recipe.yml"
    if text is not None:
        recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(("merge", recipe, tmp_path / "out"), fragments)
