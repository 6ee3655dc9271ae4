"""Recipes that both tools run: every method, with gradients, filters and parameters of sources, slices and the recipe.

In a recipe ``{base}``, ``{a}``, ``{b}`` and ``{c}`` stand for models; a, b and c are fine-tunes of base.
"""

from __future__ import annotations

from dataclasses import dataclass

#: family of architectures -> dtype of its checkpoints, whether embeddings are tied, what both tools are told of dtypes.
#: mergekit does most of its arithmetic in the stored dtype; in float32 it gives what we do, and both round once.
FAMILIES = {
    "llama": ("float32", False, ""),
    "qwen2": ("bfloat16", True, "dtype: float32\nout_dtype: bfloat16\n"),
}

WEIGHTS = """
  - {{model: {a}, parameters: {{weight: [0.2, 0.9, 0.5], density: 0.6}}}}
  - model: {b}
    parameters:
      weight: [{{filter: mlp, value: [0.7, -0.3]}}, {{filter: k_proj, value: 0}}, {{value: 0.4}}]
      density: [{{filter: self_attn, value: [0.3, 0.9]}}, {{value: 0.35}}]
  - {{model: {c}}}
"""


def family(method: str, *settings: str, models: str = WEIGHTS) -> str:
    """A task vector method over three models: their own parameters, and the recipe's for what they leave open."""
    settings = ("weight: 0.3", *settings)
    return f"merge_method: {method}\nbase_model: {{base}}\nmodels:{models}parameters: {{{{{', '.join(settings)}}}}}\n"


def plain(method: str, *models: str, settings: str = "", base: bool = True) -> str:
    """A method over models without parameters of their own."""
    listed = "".join(f"  - model: {{{m}}}\n" for m in models)
    return (
        f"merge_method: {method}\n"
        + ("base_model: {base}\n" if base else "")
        + f"models:\n{listed}"
        + (f"parameters: {{{{{settings}}}}}\n" if settings else "")
    )


#: The same tensors from both tools.
EQUAL = {
    "passthrough": plain("passthrough", "a", base=False),
    "merge_keys": """
x-weights: &weights {{weight: 0.5}}
x-more: &more {{weight: 9, normalize: false}}
merge_method: linear
parameters: {{<<: [*weights, *more], weight: 3}}
models:
  - {{model: {a}, parameters: {{<<: *weights}}}}
  - {{model: {b}, parameters: {{<<: [*weights, {{weight: 7}}]}}}}
  - {{<<: &source {{model: {a}, parameters: {{weight: 1}}}}, model: {c}}}
""",
    "anchors": """
common: [&lower [0, 2], &upper [2, 4]]
merge_method: passthrough
slices:
  - sources: [{{model: {a}, layer_range: *lower}}]
  - sources: [{{model: {a}, layer_range: *upper}}]
""",
    "empty_slices": """
merge_method: passthrough
slices:
  - sources: [{{model: {b}, layer_range: [0, 0]}}]
  - sources: [{{model: {a}, layer_range: [0, 2]}}]
  - sources: [{{model: {b}, layer_range: [1, 1]}}]
  - sources: [{{model: {a}, layer_range: [2, 4]}}]
  - sources: [{{model: {c}, layer_range: [4, 4]}}]
""",
    "empty_slice_merged": """
merge_method: linear
base_model: {a}
parameters: {{weight: 1}}
slices:
  - sources: [{{model: {a}, layer_range: [0, 4]}}, {{model: {b}, layer_range: [0, 4]}}]
  - sources: [{{model: {b}, layer_range: [2, 2]}}, {{model: {c}, layer_range: [0, 0]}}]
    parameters: {{weight: 2}}
""",
    "numbers_as_text": """
merge_method: slerp
base_model: {b}
slices:
  - sources: [{{model: {a}, layer_range: ["0", "4"]}}, {{model: {b}, layer_range: [0, 4.0]}}]
parameters: {{t: [{{filter: mlp, value: ["0.5", "1e-1"]}}, {{value: "0.25"}}]}}
""",
    "booleans_as_text": plain("linear", "a", "b", base=False, settings="weight: '2', normalize: 'False'"),
    "one_filter": """
merge_method: linear
models:
  - {{model: {a}, parameters: {{weight: {{filter: mlp, value: 3}}}}}}
  - {{model: {b}, parameters: {{weight: {{value: [1, 2]}}}}}}
parameters: {{weight: 0.5}}
""",
    "ties_lambda_of_a_source": """
merge_method: ties
base_model: {base}
models:
  - {{model: {a}, parameters: {{weight: 1, density: 0.5, lambda: 0.2}}}}
  - {{model: {b}, parameters: {{weight: 1, density: 0.5, lambda: 0.9}}}}
parameters: {{lambda: 0.7}}
""",
    "override_architecture": """
merge_method: linear
base_model: {b}
parameters: {{weight: 1}}
models:
  - model: {{model: {{path: {a}}}, override_architecture: YiForCausalLM}}
  - model: {b}
""",
    "keys_without_a_value": """
merge_method: linear
base_model:
slices: null
tokenizer_source: ~
chat_template:
parameters:
models: [{{model: {a}, parameters: {{weight: 1}}}}, {{model: {b}, parameters: {{weight: 2}}}}]
""",
    "passthrough_scale": """
merge_method: passthrough
slices:
  - sources:
      - model: {a}
        layer_range: [0, 2]
        parameters: {{scale: [{{filter: down_proj, value: [0.5, 2]}}, {{filter: embed, value: 3}}, {{value: 1}}]}}
  - sources: [{{model: {a}, layer_range: [1, 3]}}]
    parameters: {{scale: [{{filter: o_proj, value: 0}}, {{filter: norm, value: [1.5, 0.5]}}]}}
""",
    "linear": """
merge_method: linear
models:
  - {{model: {a}, parameters: {{weight: [0.2, 0.9]}}}}
  - {{model: {b}, parameters: {{weight: [{{filter: mlp, value: 3}}, {{filter: layers.1, value: 0}}, {{value: 1e-1}}]}}}}
""",
    "linear_in_a_module": """
merge_method: linear
parameters: {{weight: 5}}
modules:
  default:
    models:
      - {{model: {a}, parameters: {{weight: [{{filter: mlp, value: 3}}]}}}}
      - {{model: {b}}}
    parameters: {{weight: [{{filter: self_attn, value: [0.1, 0.6]}}]}}
""",
    "linear_sum_with_joined_base": plain("linear", "a", "b", settings="weight: 0.25, normalize: false"),
    "linear_precedence": """
merge_method: linear
slices:
  - sources:
      - {{model: {a}, layer_range: [0, 2], parameters: {{weight: [{{filter: mlp, value: 0.9}}]}}}}
      - {{model: {b}, layer_range: [0, 2]}}
    parameters: {{weight: [{{filter: self_attn, value: [0.1, 0.6]}}]}}
  - sources:
      - {{model: {a}, layer_range: [1, 3]}}
      - {{model: {b}, layer_range: [2, 4], parameters: {{weight: [{{filter: layers.2, value: 5}}, {{value: 1}}]}}}}
parameters: {{weight: 2}}
""",
    "slerp": """
merge_method: slerp
base_model: {b}
slices:
  - sources: [{{model: {a}, layer_range: [0, 4]}}, {{model: {b}, layer_range: [0, 4]}}]
parameters:
  t: [{{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}}, {{filter: norm, value: [0.9, 0.1]}}, {{value: 0.35}}]
""",
    "slerp_far": plain("slerp", "far", settings="t: [0.1, 0.8]"),
    "nuslerp": plain("nuslerp", "a", "far", base=False, settings="weight: [0.2, 0.7]"),
    "nuslerp_weights": """
merge_method: nuslerp
models:
  - {{model: {far}, parameters: {{weight: [{{filter: mlp, value: [1, 0]}}, {{value: 0.3}}]}}}}
  - {{model: {b}, parameters: {{weight: 0.6}}}}
""",
    "nuslerp_base": plain("nuslerp", "a", "b", settings="weight: 0.5"),
    "nuslerp_rows": plain("nuslerp", "a", "far", settings="weight: 0.5, nuslerp_flatten: false", base=False),
    "nuslerp_rows_base": plain("nuslerp", "a", "b", settings="weight: 0.5, nuslerp_flatten: false"),
    "nuslerp_columns": plain(
        "nuslerp", "b", "far", settings="weight: 0.5, nuslerp_flatten: false, nuslerp_row_wise: true", base=False
    ),
    "multislerp": """
merge_method: multislerp
models:
  - {{model: {a}, parameters: {{weight: [0.2, 0.8]}}}}
  - {{model: {far}, parameters: {{weight: 0.5}}}}
  - {{model: {c}, parameters: {{weight: [{{filter: mlp, value: 0}}, {{value: 0.1}}]}}}}
""",
    "multislerp_base": plain("multislerp", "a", "b", "c", settings="weight: 0.4, normalize_weights: false"),
    "multislerp_two": plain("multislerp", "a", "b", settings="weight: [1, 2], eps: 1e-6"),
    "multislerp_one": plain("multislerp", "a", settings="weight: 0.2"),
    "karcher": plain("karcher", "a", "far", "c", base=False),
    "karcher_two": plain("karcher", "a", "far", base=False, settings="max_iter: 3, tol: 1e-9"),
    "karcher_joined_base": plain("karcher", "far", "b"),
    "karcher_one": plain("karcher", "a", base=False),
    "task_arithmetic": family("task_arithmetic", "lambda: [0.5, 1.5]"),
    "task_arithmetic_normalize": family("task_arithmetic", "normalize: true"),
    "task_arithmetic_alone": plain("task_arithmetic", "a", settings="weight: 1"),
    "task_arithmetic_zero": plain("task_arithmetic", "a", "b", settings="weight: 0"),
    "ties": family("ties", "lambda: [{{filter: up_proj, value: 0.4}}, {{value: 1}}]"),
    "ties_sum": family("ties", "normalize: 0", "int8_mask: 1", "density: 0.8"),
    "ties_rescale": family("ties", "rescale: true"),
    "ties_all": plain("ties", "a", "b", "c", settings="weight: 0.5"),
    "ties_none": plain("ties", "a", "b", settings="weight: 0.5, density: 0"),
    "ties_few": plain("ties", "a", "b", settings="weight: 0.5, density: 1e-5"),
    "ties_alone": plain("ties", "a", settings="weight: -0.5, density: 0.3"),
    "ties_base_listed": """
merge_method: ties
base_model: {base}
slices:
  - sources:
      - {{model: {base}, layer_range: [0, 4], parameters: {{weight: 7, density: 0.1}}}}
      - {{model: {a}, layer_range: [0, 4], parameters: {{weight: 1}}}}
      - {{model: {b}, layer_range: [0, 4], parameters: {{weight: [{{filter: gate, value: 0.5}}]}}}}
    parameters: {{density: [0.9, 0.2]}}
parameters: {{weight: 0.7, density: 0.5}}
""",
    "dare_linear_all": family("dare_linear", models="\n  - {{model: {a}}}\n  - {{model: {b}}}\n"),
    "dare_ties_all": plain("dare_ties", "a", "b", "c", settings="weight: 0.5, normalize: true"),
    "dare_ties_none": plain("dare_ties", "a", "b", settings="weight: 0.5, density: 0"),
    "breadcrumbs": family("breadcrumbs", "gamma: [0.01, 0.2]"),
    "breadcrumbs_normalize": family("breadcrumbs", "normalize: true", "rescale: true", "gamma: 0.05"),
    "breadcrumbs_ties": family("breadcrumbs_ties", "gamma: 0.1", "lambda: 0.7"),
    "breadcrumbs_ties_many_outliers": family("breadcrumbs_ties", "gamma: 0.9", "normalize: true"),
    "breadcrumbs_none": plain("breadcrumbs", "a", settings="weight: 1, density: 0"),
    "della_all": plain("della", "a", "b", "c", settings="weight: [0.1, 0.6]"),
    "della_linear_all": plain("della_linear", "a", "b", settings="weight: 0.5, normalize: true, lambda: 0.8"),
    "della_none": plain("della", "a", "b", settings="weight: 0.5, density: 0"),
    "model_stock": plain("model_stock", "a", "b", "c"),
    "model_stock_two": plain("model_stock", "a", "b"),
    "model_stock_rows": plain("model_stock", "a", "b", "c", settings="filter_wise: true"),
    "sce": plain("sce", "a", "b", "c", settings="select_topk: 0.4"),
    "sce_gradient": plain(
        "sce", "a", "b", settings="select_topk: [{{filter: mlp, value: [0.1, 0.9]}}], int8_mask: true"
    ),
    "sce_all": plain("sce", "a", "b", "c"),
    "sce_none": plain("sce", "a", "b", settings="select_topk: 0"),
    "sce_alone": plain("sce", "a", settings="select_topk: 0.5"),
    "arcee_fusion": plain("arcee_fusion", "a"),
    "nearswap": plain("nearswap", "a", settings="t: [{{filter: norm, value: 1e-4}}, {{value: [0.001, 0.1]}}]"),
    "ram": plain("ram", "a", "b", "c"),
    "ram_epsilon": plain("ram", "a", "b", settings="epsilon: 0.02"),
    "ramplus_tl": plain("ramplus_tl", "a", "b", "c"),
    "ramplus_tl_set": plain("ramplus_tl", "a", "b", "c", settings="r: [0.1, 2], alpha: 5, epsilon: 1e-2"),
}

JOINED = "base_model: {base}\nmodels: [{{model: {base}}}, {{model: {other}}}]\n"
THREE = "base_model: {base}\nmodels: [{{model: {base}}}, {{model: {other}}}, {{model: {third}}}]\n"
_LINEAR = "merge_method: linear\nparameters: {{weight: 0.5}}\n"
_SLERP = "merge_method: slerp\nparameters: {{t: [0.2, 0.7]}}\n"
_TIES = "merge_method: ties\nparameters: {{weight: 0.6, density: 0.7}}\n"

#: Of `support.make_speakers`: the same vocabulary from both tools, and the same rows for its tokens.
TOKENIZERS = {
    "union_linear": f"{_LINEAR}{JOINED}tokenizer_source: union\n",
    "union_slerp": f"{_SLERP}{JOINED}tokenizer_source: union\n",
    "union_ties": f"{_TIES}{JOINED}tokenizer_source: union\n",
    "union_of_three": f"{_LINEAR}{THREE}tokenizer: {{{{}}}}\n",
    "base_slerp": f"{_SLERP}{JOINED}tokenizer_source: base\n",
    "base_of_three": f"{_TIES}{THREE}tokenizer_source: base\n",
    "model": f"{_LINEAR}{JOINED}tokenizer_source: {{other}}\n",
    "model_ties": f"{_TIES}{JOINED}tokenizer: {{{{source: {{other}}}}}}\n",
    "model_outside_of_the_recipe": f"{_SLERP}{JOINED}tokenizer_source: {{third}}\n",
    "padded": f"{_SLERP}{JOINED}tokenizer: {{{{source: union, pad_to_multiple_of: 64}}}}\n",
    "padded_base": f"{_LINEAR}{THREE}tokenizer: {{{{source: base, pad_to_multiple_of: 7}}}}\n",
    "tokens": f"""{_LINEAR}{JOINED}tokenizer:
  source: union
  tokens:
    <|start|>: {{{{source: {{base}}, force: true}}}}
    <|end|>: {{{{source: {{base}}}}}}
    <pad>: {{{{source: {{{{kind: model_token, model: {{other}}, token: "</s>"}}}}}}}}
    </s>: {{{{source: {{{{kind: model_token, model: {{base}}, token_id: 7}}}}, force: true}}}}
    <s>: {{{{source: {{{{kind: zero}}}}}}}}
    <|new|>: {{{{source: {{{{kind: zero}}}}}}}}
    <|copied|>: {{{{source: {{{{kind: model_token, model: {{base}}, token: "<s>"}}}}}}}}
""",
    "tokens_of_three": f"""{_TIES}{THREE}tokenizer:
  source: union
  tokens:
    <|end|>: {{{{source: {{third}}, force: true}}}}
    <|tool|>: {{{{source: {{other}}}}}}
""",
    "slices": """merge_method: passthrough
base_model: {base}
slices:
  - sources: [{{model: {base}, layer_range: [0, 2]}}]
  - sources: [{{model: {other}, layer_range: [1, 3]}}]
  - sources: [{{model: {base}, layer_range: [3, 4]}}]
tokenizer_source: union
""",
    "merged_slices": """merge_method: slerp
base_model: {base}
slices:
  - sources: [{{model: {base}, layer_range: [0, 2]}}, {{model: {other}, layer_range: [0, 2]}}]
  - sources: [{{model: {base}, layer_range: [1, 3]}}, {{model: {third}, layer_range: [1, 3]}}]
parameters: {{t: 0.4}}
tokenizer_source: union
""",
}

#: In bfloat16 mergekit's ties differ (see `RANKED`), and its configs of deeper Qwen2 models do not load.
NOT_QWEN2 = ("union_ties", "base_of_three", "model_ties", "tokens_of_three", "slices")

#: Those of `EQUAL` that mergekit widens by itself when models are stored in bfloat16.
STORED = ("passthrough_scale", "linear", "slerp")

#: Those that choose elements by their ranks. Bfloat16 models differ by multiples of the same few numbers, so that many
#: elements have the same rank; mergekit's sort is not stable and takes any of them, we take the first.
RANKED = ("ties", "breadcrumbs", "sce", "arcee")

#: What both tools refuse, and a fragment of our message.
REFUSED = {
    "ties without a base": (plain("ties", "a", "b", base=False, settings="weight: 1"), "ties needs a base model"),
    "sce without a base": (plain("sce", "a", "b", base=False), "sce needs a base model"),
    "weight missing": (plain("dare_ties", "a", "b"), "dare_ties needs weight"),
    "weight for some tensors": (
        plain("task_arithmetic", "a", settings="weight: [{{filter: mlp, value: 1}}]"),
        "task_arithmetic needs weight",
    ),
    "nuslerp of three": (plain("nuslerp", "a", "b", "c", base=False, settings="weight: 1"), "exactly 2 models"),
    "nuslerp with one of them as base": (
        plain("nuslerp", "a", "base", settings="weight: 1"),
        "exactly 2 models in addition to the base model, not 1",
    ),
    "nearswap of three": (
        plain("nearswap", "a", "b", settings="t: 1"),
        "exactly 1 model in addition to the base model, not 2",
    ),
    "nearswap without t": (plain("nearswap", "a"), "nearswap needs t"),
    "arcee_fusion of three": (plain("arcee_fusion", "a", "b"), "exactly 1 model in addition"),
    "model_stock of two": (plain("model_stock", "a"), "at least 2 models in addition to the base model, not 1"),
    "multislerp of a base": (plain("multislerp", "base", settings="weight: 1"), "at least 1 model in addition"),
    "epsilon too large": (plain("della", "a", settings="weight: 1, density: 0.9"), "probabilities from density"),
    "tokenizer twice": (
        plain("linear", "a", "b", settings="weight: 1") + "tokenizer_source: base\ntokenizer: {{source: union}}\n",
        "tokenizer or tokenizer_source, not both",
    ),
    "recipe of mergekit-moe": (
        "base_model: {a}\ngate_mode: random\nexperts: [{{source_model: {a}}}, {{source_model: {b}}}]\n",
        "this is a mergekit-moe recipe; not supported here",
    ),
    "base outside of the slice": (
        "merge_method: ties\nbase_model: {base}\nslices:\n  - sources: [{{model: {a}, layer_range: [0, 4]}}]\n"
        "parameters: {{weight: 1}}\n",
        "ties starts from the base model",
    ),
}


@dataclass(frozen=True)
class Drawn:
    """A random merge of one source, judged by its law."""

    method: str
    density: float
    settings: str = ""
    epsilon: float = 0.0


DRAWN = {
    "dare_linear": Drawn("dare_linear", 0.3),
    "dare_linear_raw": Drawn("dare_linear", 0.7, "rescale: false"),
    "dare_ties": Drawn("dare_ties", 0.9),
    "della": Drawn("della", 0.4, "epsilon: 0.3", epsilon=0.3),
    "della_linear": Drawn("della_linear", 0.6, "rescale: false", epsilon=0.15),
}
SEEDS = range(4)


def drawn(case: Drawn) -> str:
    """The recipe of a random merge."""
    extra = f", {case.settings}" if case.settings else ""
    return plain(case.method, "a", settings=f"weight: 1, density: {case.density}{extra}")
