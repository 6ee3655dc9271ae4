"""Whatever a recipe can ask for gives the CPU's tensors on another device; new files of the registries join."""

from __future__ import annotations

import json

import pytest
import torch
from device_recipes import INSERTS, MERGES, SOLVERS, aligned_recipe, insert_recipe, merge_recipe, settings
from device_runs import DEVICE, IS_SIMULATED, read_ahead
from support import make_model, make_speakers
from test_contract import is_tied
from tiny_models import MODEL_TYPES, shared

from deus_merge.align.options import ALIGNMENTS
from deus_merge.core.units import FLOAT_DTYPES
from deus_merge.methods.registry import methods
from deus_merge.recipe.presets import PRESETS

#: presets whose new layers are not copies
COMPUTING_PRESETS = [n for n, p in PRESETS.items() if p.parameters is not None and p.parameters.get("t") not in (0, 1)]
#: of each way in which tensors consist of several matrices
QUICK_KINDS = ("codegen", "gpt_oss", "gpt2", "falcon:new", "qwen3_5_moe_text", "qwen3_vl_moe_text", "phi3", "llama")
#: solvers that take many passes, which take seconds when nothing is stored
SLOW_SOLVERS = ("progot", "unbalanced")


@pytest.mark.parametrize("busy", [False, True], ids=["defaults", "busy"])
@pytest.mark.parametrize("name", MERGES)
def test_every_merge_method(as_on_cpu, models, name, busy):
    if name == "passthrough" and not busy:
        pytest.skip("copies everything: nothing is computed")
    as_on_cpu(merge_recipe(name, models, busy=busy))


@pytest.mark.parametrize("busy", [False, True], ids=["defaults", "busy"])
@pytest.mark.parametrize("name", INSERTS)
def test_every_method_that_inserts_layers(as_on_cpu, models, name, busy):
    as_on_cpu(insert_recipe(name, models["base"], 3, **settings(methods()[name], busy)))


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_in_every_alignment(as_on_cpu, models, solver, alignment):
    recipe = insert_recipe("ot_fuse", models["base"], solver=solver, alignment=alignment, zero_init=False)
    assert bool(as_on_cpu(recipe).plans) == (alignment != "none")


@pytest.mark.parametrize(
    "solver", [pytest.param(s, marks=pytest.mark.slow) if s in SLOW_SOLVERS else s for s in SOLVERS]
)
def test_every_solver_in_little_memory(as_on_cpu, models, solver):
    """Costs and plans are computed again in row blocks."""
    recipe = insert_recipe("ot_fuse", models["base"], solver=solver, alignment="transport_flow", zero_init=False)
    as_on_cpu(recipe, minimum_memory=True)


@pytest.mark.parametrize(
    "parameters",
    [
        {"alignment": "symmetry", "match": "partial", "match_fraction": 0.5},
        {"alignment": "transport_flow", "match": "partial", "match_score": 0.1, "unit_rows": False},
        {"alignment": "transport_flow", "plan_scale": "coupling", "restore_norm": "tensor"},
        {"alignment": "transport_flow", "cost": "sqeuclidean", "cost_scale": "median", "reg": 0.1},
        {"alignment": "transport_flow", "cost": "cosine", "cost_scale": "none", "compute_dtype": "float64"},
        {"alignment": "symmetry", "compute_dtype": "float64", "restore_norm": "none", "layers_per_gap": 2},
    ],
    ids=lambda parameters: "-".join(map(str, parameters.values())),
)
def test_settings_of_the_fusion(as_on_cpu, models, parameters):
    as_on_cpu(insert_recipe("ot_fuse", models["base"], zero_init=False, **parameters))


@pytest.mark.parametrize("align", [a for a in ALIGNMENTS if a != "none"])
@pytest.mark.parametrize("name", ["slerp", "dare_ties"])
def test_aligned_slices(as_on_cpu, models, name, align):
    assert as_on_cpu(aligned_recipe(name, models, align)).plans


@pytest.mark.parametrize("name", COMPUTING_PRESETS)
def test_presets_that_compute(as_on_cpu, models, name):
    as_on_cpu({"base_model": models["base"], "upscale": {"preset": name, "insert": {"after": [0]}}})


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in QUICK_KINDS else pytest.mark.slow) for k in MODEL_TYPES]
)
def test_every_family(as_on_cpu, kind):
    """A new file in models/families/ joins with the tiny models of tests/families."""
    if is_tied(kind):
        pytest.skip("no layer can be added to it")
    insert = {"insert": {"after": [1]}, "parameters": {"zero_init": False}}
    as_on_cpu({"base_model": str(shared(kind)), "upscale": insert})


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_output_dtype(as_on_cpu, models, dtype):
    as_on_cpu(merge_recipe("linear", models, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_stored_dtype(as_on_cpu, tmp_path, dtype):
    paths = {
        n: str(make_model(tmp_path / n, layers=2, seed=i, dtype=dtype)) for i, n in enumerate(("base", "one", "two"))
    }
    as_on_cpu(merge_recipe("ties", paths))
    as_on_cpu(insert_recipe("ot_fuse", paths["base"], zero_init=False))


def test_documents(as_on_cpu, models):
    """One document's result is the next one's source; its blocks are computed on the device, too."""
    first = {"name": "tuned", **merge_recipe("dare_ties", models)}
    second = {"base_model": "tuned", "upscale": {"insert": "all", "parameters": {"layers_per_gap": 2}}}
    as_on_cpu([first, second], seed=7)
    as_on_cpu([first, second], seed=7, minimum_memory=True)


def test_embeddings_in_another_order(as_on_cpu, tmp_path):
    """Rows are taken from several models, some as means."""
    speakers = {name: str(path) for name, path in make_speakers(tmp_path, layers=2).items()}
    recipe = {
        "merge_method": "linear",
        "base_model": speakers["base"],
        "models": [{"model": speakers["base"]}, {"model": speakers["other"]}],
        "parameters": {"weight": 0.5},
        "tokenizer_source": "union",
    }
    as_on_cpu(recipe)


@pytest.mark.parametrize("name", ["dare_linear", "della"])
def test_random_numbers_of_tensors_longer_than_a_run(as_on_cpu, tmp_path, name):
    """Runs are longer on a device than on the CPU; what is drawn for an element is the same."""
    paths = {
        n: str(make_model(tmp_path / n, layers=1, seed=i, vocab_size=36000))  # 1.15 million elements: two tosses
        for i, n in enumerate(("base", "one", "two"))
    }
    as_on_cpu(merge_recipe(name, paths) | {"parameters": {"weight": 0.4, "density": 0.55}}, seed=5)


def test_read_ahead_and_write_behind(as_on_cpu, device_process, models, tmp_path):
    """While a block is finished, the next one's inputs come to the device; a thread of its own writes."""
    recipe = merge_recipe("slerp", models)
    result = as_on_cpu(recipe)
    assert len(result.writers) == 1 and result.writers.pop().startswith("write-behind")
    if IS_SIMULATED:
        (tmp_path / "ahead.yml").write_text(json.dumps(recipe))
        seen = device_process.call(read_ahead, tmp_path / "ahead.yml", tmp_path / "ahead", DEVICE)
        assert len(seen) == 5 and all(uploads == wanted for uploads, wanted in seen), seen
