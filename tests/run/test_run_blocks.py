"""`run_blocks` with a writer that takes notes: each byte once and in its place; a block is done when it is written."""

from __future__ import annotations

import os
import re
import threading
import time

import pytest
import torch
from safetensors.torch import save_file
from support import make_model, weights, write_recipe

from deus_merge import api
from deus_merge.core.errors import MachineError
from deus_merge.run.block_runner import is_record
from deus_merge.run.compute import BlockComputer
from deus_merge.run.document_results import document_results
from deus_merge.run.preflight import preflight

RECIPES = {
    "runs of elements": "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 0.3}}\n"
    "- {model: b, parameters: {weight: 0.7}}\n",
    "fused": "base_model: a\nupscale: {preset: average, insert: all, parameters: {layers_per_gap: 2}}\n",
    "cast": "merge_method: passthrough\ndtype: bfloat16\nmodels: [{model: a}]\n",
    "aligned": "merge_method: slerp\nbase_model: a\nalign: symmetry\nparameters: {t: 0.3}\nmodels: [{model: b}]\n",
    "learned": "base_model: a\nupscale: {preset: lesa, insert: {after: [0, 1]}, parameters: {epochs: 1, width: 8}}\n",
    "scaled document": "name: soft\nmerge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n"
    "---\nmerge_method: passthrough\nparameters: {scale: 0.5}\nmodels: [{model: soft}]\n",
    "document": "name: soft\nmerge_method: linear\nmodels:\n- {model: a, parameters: {weight: 0.3}}\n"
    "- {model: b, parameters: {weight: 0.7}}\n---\nbase_model: soft\nupscale: {preset: average, insert: all}\n",
}


class Notes:
    """Takes what is written: the bytes of each tensor, each once, and calls back after each write."""

    def __init__(self, plan, written=lambda name: None):
        self.sizes = {output.name: output.nbytes for _, output in plan.outputs}
        self.bytes = {name: bytearray(size) for name, size in self.sizes.items()}
        self.missing = {name: [(0, size)] for name, size in self.sizes.items()}
        self._written, self._lock = written, threading.Lock()

    def __contains__(self, name):
        return True

    def write(self, name, data, *, at=None):
        time.sleep(0.002)  # a slow disk
        with self._lock:
            begin = 0 if at is None else at
            end = begin + len(data)
            (gap,) = [g for g in self.missing[name] if g[0] <= begin and end <= g[1]]  # nothing is written twice
            self.missing[name].remove(gap)
            self.missing[name] += [part for part in ((gap[0], begin), (end, gap[1])) if part[0] < part[1]]
            self.bytes[name][begin:end] = data
            self._written(name)

    def copy_many(self, pairs):
        for name, stored in pairs:
            with open(stored.file, "rb") as file:
                file.seek(stored.offset)
                self.write(name, file.read(stored.nbytes))

    def zeros(self, name):
        self.write(name, bytes(self.sizes[name]))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        make_model(folder / name, layers=3, seed=seed, vocab_size=9000)  # more than a run of elements
    return folder


@pytest.fixture
def plan_of(models, monkeypatch, tmp_path):
    monkeypatch.chdir(models)
    return lambda name: api.plan(write_recipe(tmp_path / "recipe.yml", RECIPES[name]))


@pytest.mark.parametrize(("name", "threads"), [*((name, 1) for name in RECIPES), ("runs of elements", 2)])
def test_a_block_is_done_when_all_of_it_is_written(plan_of, tmp_path, name, threads):
    """On the disk a run is resumed by what `on_block` recorded."""
    plan = plan_of(name)
    notes, done = Notes(plan), []

    def finished(block, diagnostics):
        assert [o.name for o in block.outputs if notes.missing[o.name]] == []
        done.append(block.index)

    torch.set_num_threads(threads)
    try:
        api.run_blocks(plan, range(len(plan.blocks)), notes, device=torch.device("cpu"), on_block=finished)
        api.merge(plan, tmp_path / "out")
    finally:
        torch.set_num_threads(1)
    assert done == [block.index for block in plan.blocks]
    for tensor, expected in weights(tmp_path / "out").items():
        assert bytes(expected.contiguous().view(-1).view(torch.uint8).numpy()) == notes.bytes[tensor], tensor


@pytest.mark.parametrize("error", [OSError("no space"), MemoryError("too much"), RuntimeError("can't allocate memory")])
@pytest.mark.parametrize("name", ["runs of elements", "fused", "cast", "aligned"])
def test_a_block_whose_last_write_fails_is_not_done(plan_of, name, error):
    plan = plan_of(name)
    block = plan.blocks[2]
    counts, done = {o.name: 0 for o in block.outputs}, []

    def fails(tensor):
        if tensor in counts:
            counts[tensor] += 1
            if all(counts.values()):
                raise error

    expected = OSError if isinstance(error, OSError) else MachineError
    with pytest.raises(expected) as raised:
        api.run_blocks(
            plan, range(len(plan.blocks)), Notes(plan, fails), device=torch.device("cpu"),
            on_block=lambda block, diagnostics: done.append(block.index),
        )  # fmt: skip
    assert done == [0, 1]
    if expected is MachineError:
        assert raised.value.where == block.title and "--max-memory" in raised.value.hint


@pytest.mark.parametrize("name", ["runs of elements", "fused", "cast", "aligned"])
def test_a_block_whose_first_write_fails_is_not_done(plan_of, name):
    """A tensor is written while the next one is computed: its error comes out all the same."""
    plan = plan_of(name)
    names, failed, done = {o.name for o in plan.blocks[2].outputs}, [], []

    def fails(tensor):
        if tensor in names and not failed:
            failed.append(tensor)
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        api.run_blocks(
            plan, range(len(plan.blocks)), Notes(plan, fails), device=torch.device("cpu"),
            on_block=lambda block, diagnostics: done.append(block.index),
        )  # fmt: skip
    assert done == [0, 1]


def test_outputs_that_share_what_they_read_are_not_computed_at_once(plan_of):
    """Aligned layers, fused ones, and sources that keep what they computed between two reads."""
    independent = {}
    for name in RECIPES:
        plan = plan_of(name)
        computer = BlockComputer(plan, torch.device("cpu"), 0, None, document_results(plan, None, 0, limited=False))
        independent[name] = any(computer.independent_outputs(block) for block in plan.blocks)
    assert independent == {name: name == "runs of elements" for name in RECIPES} | {"aligned": True}
    aligned = plan_of("aligned")
    computer = BlockComputer(aligned, torch.device("cpu"), 0, None, {})
    assert [bool(computer.independent_outputs(block)) for block in aligned.blocks] == [True, False, False, False, True]
    scaled = plan_of("scaled document")
    computer = BlockComputer(scaled, torch.device("cpu"), 0, None, document_results(scaled, None, 0, limited=False))
    assert not any(computer.independent_outputs(block) for block in scaled.blocks)


def test_what_is_no_lack_of_memory_stays_what_it_is(plan_of):
    plan = plan_of("fused")

    def fails(tensor):
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        api.run_blocks(plan, [2], Notes(plan, fails), device=torch.device("cpu"))


def test_diagnostics_are_those_of_the_block_and_of_documents_each_once(models, monkeypatch, tmp_path):
    """Of a document's blocks with the one for which they were computed; of aligned sources with the source."""
    monkeypatch.chdir(models)
    text = (
        "name: grown\nbase_model: a\nupscale: {insert: {after: [0]}}\n---\n"
        "merge_method: linear\nbase_model: b\nalign: symmetry\nslices:\n- sources:\n"
        "  - {model: grown, layer_range: [0, 3], parameters: {weight: 0.5}}\n"
        "  - {model: b, layer_range: [0, 3], parameters: {weight: 0.5}}\n"
    )
    plan, found = api.plan(write_recipe(tmp_path / "recipe.yml", text)), {}
    api.run_blocks(
        plan, range(len(plan.blocks)), Notes(plan), device=torch.device("cpu"),
        on_block=lambda block, record: found.update({block.title: record["tensors"]}),
    )  # fmt: skip
    documents = {title: [line for line in lines if "document" in line] for title, lines in found.items()}
    assert [title for title, lines in documents.items() if lines] == ["layer 1"]
    names = [line["tensor"] for line in documents["layer 1"]]
    assert len(names) == len(set(names)) and all(n.startswith("model.layers.1.") for n in names)
    assert {line["document"] for line in documents["layer 1"]} == {"grown"}
    for layer in range(3):
        aligned = [line for line in found[f"layer {layer}"] if "document" not in line]
        assert aligned and {line["source"] for line in aligned} == {0}
        assert all(re.match(rf"model\.layers\.{layer}\.", line["tensor"]) for line in aligned)


def test_what_is_read_of_a_document_is_the_readers_own(plan_of):
    """A method may write into it; the tensor that others read is as before."""
    plan = plan_of("document")
    result = document_results(plan, torch.device("cpu"), 0, limited=False)["soft"]
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        first = result.read(name)
        wanted = first.clone()
        first.zero_()
        part = result.slice(name, 3, 17)
        assert part.equal(wanted[3:17])
        part.zero_()
        assert result.read(name).equal(wanted)


def test_a_source_that_changed_is_refused_before_anything_is_written(tmp_path):
    """By the checks before a run, and by each worker that gets the plan."""
    base = make_model(tmp_path / "base", layers=2)
    plan = api.plan(api.upscale_recipe(base, preset="copy_next"))
    notes = Notes(plan)
    os.utime(base / "model.safetensors", (1, 1))
    with pytest.raises(api.DeusMergeError, match="has changed since the plan was made"):
        api.run_blocks(plan, range(len(plan.blocks)), notes, device=None)
    assert all(notes.missing.values())
    with pytest.raises(api.DeusMergeError, match="has changed since the plan was made"):
        preflight(plan, tmp_path / "out", api.RunOptions())


def test_not_a_number_is_refused_before_it_is_written(models, monkeypatch, tmp_path):
    base = make_model(tmp_path / "base", layers=2)
    tensors = weights(base)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("inf")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    text = f"merge_method: passthrough\nmodels: [{{model: {base}, parameters: {{scale: 0.5}}}}]\n"
    plan = api.plan(write_recipe(tmp_path / "recipe.yml", text))
    notes = Notes(plan)
    with pytest.raises(api.DeusMergeError, match="becomes NaN or infinity"):
        api.run_blocks(plan, range(len(plan.blocks)), notes, device=torch.device("cpu"))
    assert notes.missing["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"seconds": {"read": float("nan"), "computed": 0.0, "wrote": 0.0, "waited": 0.0}},
        {"tensors": [{"role": "up", "tensor": "x", "cost": float("inf")}]},
        {"tensors": [{"tensor": "x"}]},
        {"tensors": None},
    ],
)
def test_records_that_no_manifest_can_hold_count_as_unfinished(wrong):
    seconds = {"read": 0.1, "computed": 0.0, "wrote": 0.0, "waited": 0.0}
    record = {"tensors": [{"role": "up", "tensor": "x", "cost": 0.5}], "seconds": seconds}
    assert is_record(record) and not is_record(record | wrong)
