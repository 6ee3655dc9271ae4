"""What a plan says of memory, by laws: limits are kept, and nothing that is alive at once is left out."""

from __future__ import annotations

import pytest
import torch
from support import make_model, write_recipe

from deus_merge import api
from deus_merge.core.tensors import Action
from deus_merge.plan.blocks import CAST_BYTES
from deus_merge.run.document_results import document_results

TUNED = (
    "name: tuned\nmerge_method: linear\nmodels:\n- {model: a, parameters: {weight: 0.3}}\n"
    "- {model: b, parameters: {weight: 0.7}}\n"
)
RECIPES = {
    "copies": "merge_method: passthrough\nmodels: [{model: a}]\n",
    "fused": "base_model: a\nupscale: {insert: all}\n",
    "the paper's": "base_model: a\nupscale: {preset: opt_deus_paper, insert: all}\n",
    "learned": "base_model: a\nupscale: {preset: lesa, insert: all}\n",
    "merged": TUNED.removeprefix("name: tuned\n"),
    "aligned": "merge_method: slerp\nbase_model: a\nalign: symmetry\nparameters: {t: 0.3}\nmodels: [{model: b}]\n",
    "document": f"{TUNED}---\nbase_model: tuned\nupscale: {{insert: all}}\n",
    "a document's layers at once": f"{TUNED}---\nmerge_method: linear\nparameters: {{weight: 1}}\nslices:\n- sources:\n"
    "  - {model: tuned, layer_range: [0, 2]}\n  - {model: tuned, layer_range: [1, 3]}\n"
    "  - {model: tuned, layer_range: [2, 4]}\n",
    "a learned document": "name: deep\nbase_model: a\nupscale: {preset: lesa, insert: all, parameters: {epochs: 1}}\n"
    "---\nmerge_method: slerp\nparameters: {t: 0.5}\nbase_model: a\nslices:\n- sources:\n"
    "  - {model: a, layer_range: [0, 4]}\n  - {model: deep, layer_range: [3, 7]}\n",
    "a cast document": f"{TUNED}---\nbase_model: tuned\ndtype: bfloat16\nupscale: {{preset: copy_next, insert: all}}\n",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        make_model(folder / name, layers=4, seed=seed, vocab_size=40_000)  # 5 MB
    return folder


@pytest.fixture
def plan_of(models, monkeypatch, tmp_path):
    monkeypatch.chdir(models)
    return lambda text: api.plan(write_recipe(tmp_path / "recipe.yml", RECIPES.get(text, text)))


@pytest.mark.parametrize("name", RECIPES)
def test_a_block_gets_what_a_limit_leaves(plan_of, name):
    """Under the least limit that is accepted each block has what it needs, and not more than the process may take."""
    plan = plan_of(name)
    computing = [block for block in plan.blocks if block.computes]
    assert plan.minimum_memory <= plan.peak_memory
    if not computing:
        assert plan.peak_memory < 100_000_000  # torch is not imported
        return
    assert plan.peak_memory > 300_000_000
    needed = max(block.workspace(minimum=True) for block in computing)
    reading = max(plan.reading_memory(block, minimum=True) for block in computing)
    for limit in (plan.minimum_memory, plan.minimum_memory + 1_000_000):
        spare = limit - plan.minimum_memory
        assert plan.block_memory(limit) <= needed + spare
        assert plan.block_memory(limit) + reading >= max(
            block.workspace(minimum=True) + plan.reading_memory(block, minimum=True) for block in computing
        )
    assert plan.block_memory(None) is None and plan.block_memory(0) == 0
    for block in computing:
        assert 0 <= block.workspace(minimum=True) <= block.workspace()


def test_finished_blocks_of_documents_are_counted(plan_of):
    """As many as one block of the recipe reads at once, and never less than two: a new layer has two neighbours. Each
    role of a learned layer is one."""
    for name, count in (("document", 2), ("a document's layers at once", 3), ("a learned document", 9)):
        plan = plan_of(name)
        (document,) = plan.documents
        assert document.cached_blocks == count
        largest = sorted(document.plan.blocks[i].nbytes for i in document.runs)[-count:]
        computing = max(block.workspace() + plan.reading_memory(block) for block in plan.blocks)
        assert plan.peak_memory >= 330_000_000 + sum(largest) + computing
        assert max(plan.reading_memory(block) for block in plan.blocks) >= max(
            block.workspace() for block in document.plan.blocks
        )


def test_a_learned_block_of_a_document_is_computed_to_its_end(plan_of):
    """Else what every role has learned would be in memory at once."""
    plan = plan_of("a learned document")
    (result,) = document_results(plan, torch.device("cpu"), 0, limited=False).values()
    result.read("model.layers.1.mlp.up_proj.weight")
    (block,) = result._blocks.values()
    assert block._tensors.keys() == {f"model.layers.{layer}.mlp.up_proj.weight" for layer in (1, 3, 5)}


def test_a_cast_takes_its_stored_and_its_written_bytes(plan_of):
    """And no more than of a slice, however large the tensor is."""
    plan = plan_of("merge_method: passthrough\ndtype: bfloat16\nmodels: [{model: a}]\n")
    block = plan.blocks[0]
    assert {output.action for output in block.outputs} == {Action.CAST}
    stored = block.outputs[0].stored.nbytes
    assert 1.5 * stored <= block.workspace() <= 3 * CAST_BYTES
    mixed = (
        "merge_method: linear\ndtype: bfloat16\nmodels:\n"
        "- {model: a, parameters: {weight: [{filter: norm, value: 0.5}, {value: 1}]}}\n"
        "- {model: b, parameters: {weight: [{filter: norm, value: 0.5}, {value: 0}]}}\n"
    )
    head = plan_of(mixed).blocks[-1]  # the norm is merged, the head only cast
    assert {output.action for output in head.outputs} == {Action.CAST, Action.COMPUTE}
    assert head.workspace() >= 1.5 * stored


def test_alignment_takes_memory_of_its_own(plan_of):
    aligned = plan_of("aligned").blocks[1]
    plain = plan_of(RECIPES["aligned"].replace("align: symmetry\n", "")).blocks[1]
    for minimum in (False, True):
        assert aligned.workspace(minimum) > plain.workspace(minimum)


def test_a_large_cast_is_bounded(tmp_path):
    base = make_model(tmp_path / "base", layers=1, vocab_size=1_500_000, hidden_size=16, tied=True,
                      intermediate_size=16, num_attention_heads=2, dtype=torch.float32)  # fmt: skip
    plan = api.plan(api.upscale_recipe(base, preset="stack", dtype="bfloat16"))
    assert plan.blocks[0].nbytes < plan.blocks[0].outputs[0].stored.nbytes
    assert plan.blocks[0].workspace() <= 3 * CAST_BYTES < 3 * plan.blocks[0].outputs[0].stored.nbytes
