"""Learned layers: the streamed decomposition against SVD, the optimiser against torch's, and the method as it runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import FAMILIES, load, logits, make_model, weights, write_recipe

from deus_merge.methods import _predictor
from deus_merge.methods._predictor import Training, learn, predict
from deus_merge.methods._stacked import decompose

COMMAND = [sys.executable, "-m", "deus_merge"]
UP = "mlp.up_proj.weight"


def stacked(matrices: list[torch.Tensor]):
    return decompose(matrices.__getitem__, len(matrices))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 9), st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**32)
)  # fmt: skip
def test_decomposition_is_the_svd_of_the_stacked_matrix(n, m, layers, rank, seed):
    """Also where rows outnumber columns, and where the rank is less than both."""
    random = torch.Generator().manual_seed(seed)
    rank = min(rank, n, layers * m)
    left = torch.linalg.qr(torch.randn(n, rank, generator=random, dtype=torch.float64)).Q  # (n, r)
    right = torch.linalg.qr(torch.randn(layers * m, rank, generator=random, dtype=torch.float64)).Q  # (L m, r)
    values = torch.logspace(0, -3, rank, dtype=torch.float64)  # (r,)
    whole = (left * values) @ right.T  # (n, L m)
    found = stacked(list(whole.split(m, dim=1)))
    oracle = torch.linalg.svd(whole, full_matrices=False)
    assert found.rank == rank
    torch.testing.assert_close(found.s, oracle.S[:rank], rtol=1e-8, atol=0)
    rows = torch.cat(list(found.directions(range(layers), torch.arange(rank))), dim=1)  # (r, L m)
    largest = found.u.gather(0, found.u.abs().argmax(0, keepdim=True))  # (1, r)
    assert (largest > 0).all()  # whatever signs the library chose
    signs = (found.u * oracle.U[:, :rank]).sum(0).sign()  # (r,)
    torch.testing.assert_close(found.u * signs, oracle.U[:, :rank], rtol=0, atol=1e-8)
    torch.testing.assert_close(rows * signs[:, None], oracle.Vh[:rank], rtol=0, atol=1e-8)


def test_a_mean_of_directions_is_the_mean_of_weights():
    """What stands between two layers comes back from their directions exactly as the network says."""
    random = torch.Generator().manual_seed(0)
    matrices = [torch.randn(40, 24, generator=random, dtype=torch.float64) for _ in range(5)]
    made = predict(stacked(matrices), lambda below, above: (below + 3 * above) / 4, 1, 2)
    torch.testing.assert_close(made, (matrices[1] + 3 * matrices[2]) / 4, rtol=0, atol=1e-12)


def test_steps_are_those_of_torch():
    random = torch.Generator().manual_seed(0)
    network = _predictor.Predictor(5, 7, random, torch.zeros(1, dtype=torch.float64))
    twins = [w.clone().requires_grad_() for w in network.weights]
    mine, theirs = _predictor._AdamW(network.weights, 0.01), torch.optim.AdamW(twins, lr=0.01)
    for _ in range(20):
        below, true, above = (torch.randn(6, 5, generator=random, dtype=torch.float64) for _ in range(3))
        told, gradients = _predictor._loss(network, below, true, above, 0.1)
        mine.step(gradients)
        w1, b1, w2, b2, w3, b3 = twins
        out = ((torch.cat((below, above), 1) @ w1 + b1).relu() @ w2 + b2).relu() @ w3 + b3
        mse = torch.nn.functional.mse_loss
        loss = 0.9 * mse(out, true) + 0.1 * mse(out.norm(), true.norm())
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        torch.testing.assert_close(told, loss.detach())
    for ours, twin in zip(network.weights, twins, strict=True):
        torch.testing.assert_close(ours, twin.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("smooth", [True, False])
def test_layers_on_a_path_are_predicted_and_noise_is_not(smooth):
    """V linear in depth: what is learned from the other directions tells the ones held out. Independent layers tell
    nothing of each other."""
    random = torch.Generator().manual_seed(1)
    start, slope = (torch.randn(384, 16, generator=random) for _ in range(2))
    matrices = [start + i / 4 * slope if smooth else torch.randn(384, 16, generator=random) for i in range(12)]
    _, told = learn(stacked(matrices), Training(80, 128, 2e-3, 5e-5), random, hold=True)
    assert told["held_out_error"] < 0.25 if smooth else told["held_out_error"] > 0.8, told
    assert told["held_out_error_of_average"] < 1e-5 if smooth else told["held_out_error_of_average"] > 1.1, told


def diagnostics(out) -> dict[str, dict]:
    record = json.loads((out / "deus_merge.json").read_text())
    return {d["tensor"].split(".", 3)[3]: d for d in record["layers"][record["new_layers"][0]]["diagnostics"]}


@pytest.mark.parametrize(
    "family", [f if f == "llama_bias" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_families(run, tmp_path, family):
    """Weights are predicted; norms, biases and per-head norms are the mean of the neighbours'; the base is kept."""
    base = make_model(tmp_path / "base", family)
    run("upscale", base, tmp_path / "out", "--preset", "lesa", "--insert", "{after: [0, 2]}")
    assert load(tmp_path / "out").config.num_hidden_layers == 6
    assert run("verify", tmp_path / "out", "--json").json()["passed"]
    theirs, ours = weights(base), weights(tmp_path / "out")
    for layer, below in ((1, 0), (4, 2)):
        a, b, made = ({n.split(".", 3)[3]: t for n, t in tensors.items() if n.startswith(f"model.layers.{i}.")}
                      for tensors, i in ((theirs, below), (theirs, below + 1), (ours, layer)))  # fmt: skip
        assert made.keys() == a.keys()
        for name, tensor in made.items():
            if tensor.dim() == 1:
                assert tensor.equal((a[name] + b[name]) / 2), name
            else:
                assert not any(tensor.equal(t) for t in (a[name], b[name])) and 0 < tensor.norm() < 3 * a[name].norm()
    assert set(diagnostics(tmp_path / "out")) == {n for n, t in a.items() if t.dim() == 2}


def test_slices_share_the_networks_of_their_roles(run, tmp_path):
    """A role of all their layers is a block, a mixed recipe keeps its order, and files belong to whole blocks."""
    base = make_model(tmp_path / "base", layers=9)
    recipe = write_recipe(
        tmp_path / "recipe.yml",
        f"""
base_model: {base}
slices:
  - {{merge_method: lesa, sources: [{{model: {base}, layer_range: [0, 3]}}], parameters: {{epochs: 1}}}}
  - {{merge_method: ot_fuse, sources: [{{model: {base}, layer_range: [3, 5]}}]}}
  - {{merge_method: lesa, sources: [{{model: {base}, layer_range: [5, 7]}}], parameters: {{epochs: 1}}}}
  - {{merge_method: lesa, sources: [{{model: {base}, layer_range: [7, 9]}}], parameters: {{epochs: 2}}}}
""",
    )
    plan = run("plan", recipe, "--json").json()
    assert plan["new_layers"] == [1, 3, 6, 9, 12]
    origins = [(entry["method"], [s["layer"] for s in entry["sources"]]) for entry in plan["layers"]]
    assert origins[:5] == [
        ("passthrough", [0]), ("lesa", [0, 1]), ("passthrough", [1]), ("lesa", [1, 2]), ("passthrough", [2])
    ]  # fmt: skip
    assert [s["layer"] for s in plan["layers"][12]["sources"]] == [7, 8]
    run("merge", recipe, tmp_path / "out")
    shown = run("plan", recipe).out
    rows = [line.split("  ")[0] for line in shown.splitlines() if " lesa " in line]
    assert rows == ["3 layers, 1 to 9", "layer 12"] and "A 0 to A 8" in shown  # one for all roles
    record = json.loads((tmp_path / "out/deus_merge.json").read_text())
    data = (tmp_path / "out/model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    stored = sorted(header.keys() - {"__metadata__"}, key=lambda n: header[n]["data_offsets"])
    numbers = [int(n.split(".")[2]) for n in stored if ".layers." in n]
    tensors = numbers.count(0)
    order = [[0] * tensors, [1, 3, 9] * tensors]  # layers that are made together are together in their file, by role
    assert numbers == sum(order + [[layer] * tensors for layer in (2, *range(4, 9), *range(10, 14))], [])
    made = [block["block"] for block in record["blocks"]]
    roles = [title.removeprefix("layer 12, ") for title in made if title.startswith("layer 12, ")]
    first = made.index("layer 0") + 1
    assert made[first : first + tensors] == [f"3 layers, 1 to 9, {role}" for role in roles]
    assert len(roles) == tensors and {"q", "down"} < set(roles)
    assert sorted(stored) == sorted(record["tensors"])
    told = [int(n.split(".")[2]) for n in record["tensors"] if ".layers." in n]
    assert told == sorted(told)  # and in layer order in the manifest
    new = tuple(f"model.layers.{i}." for i in plan["new_layers"])
    assert record["new_parameters"] == [n for n in record["tensors"] if n.startswith(new)]
    assert load(tmp_path / "out").config.num_hidden_layers == 14
    ours = [weights(tmp_path / "out")[f"model.layers.{layer}.{UP}"] for layer in (1, 3, 9)]
    assert not any(ours[i].equal(ours[j]) for i, j in ((0, 1), (0, 2), (1, 2)))  # each from its own neighbours


def test_bytes_depend_on_the_seed_alone(run, tiny, tmp_path):
    command = ("upscale", tiny, "--preset", "lesa", "-p", "epochs=2")
    limit = run(*command[:2], tmp_path / "x", *command[2:], "--dry-run", "--json").json()["minimum_memory_bytes"]
    made = {}
    for name, extra in (("one", ()), ("two", ()), ("small", ("--max-memory", limit)), ("other", ("--seed", 7))):
        run(*command[:2], tmp_path / name, *command[2:], *extra)
        made[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert made["one"] == made["two"] == made["small"] != made["other"]
    said = run(*command[:2], tmp_path / "less", *command[2:], "--max-memory", limit - 1, expect=2).err
    assert "needs more memory than allowed" in said


def test_zeroed_outputs_keep_the_function(run, tiny, tmp_path):
    run("upscale", tiny, tmp_path / "out", "--preset", "lesa", "-p", "zero_init=true")
    assert json.loads((tmp_path / "out/deus_merge.json").read_text())["function_preserving"]
    ids = torch.arange(3, 60).unsqueeze(0)
    assert torch.equal(logits(tiny, ids), logits(tmp_path / "out", ids))
    assert set(diagnostics(tmp_path / "out")) == {
        *(f"self_attn.{r}_proj.weight" for r in "qkv"), "mlp.gate_proj.weight", UP
    }  # fmt: skip


def test_a_role_without_weight_stays_so(run, tmp_path):
    base = make_model(tmp_path / "base")
    tensors = {n: torch.zeros_like(t) if UP in n else t for n, t in weights(base).items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    run("upscale", base, tmp_path / "out", "--preset", "lesa")
    made = weights(tmp_path / "out")
    assert not any(made[n].any() for n in made if UP in n) and UP not in diagnostics(tmp_path / "out")


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_ends_the_same(run, tmp_path):
    base = make_model(tmp_path / "base", layers=6, hidden_size=64, intermediate_size=128)
    command = ("upscale", base, "--preset", "lesa", "--insert", "{after: [2, 4]}", "--threads", "1")
    run(*command[:2], tmp_path / "whole", *command[2:])
    process = subprocess.Popen([*COMMAND, *map(str, (*command[:2], tmp_path / "out", *command[2:]))])
    while not list((tmp_path / ".out.deus-tmp").glob("new/*.safetensors")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "out").exists()
    run(*command[:2], tmp_path / "out", *command[2:], "--resume")
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "whole")]
    assert files[0] == files[1]


def recipe_of(*slices: str, top: str = "") -> str:
    return f"merge_method: lesa\n{top}slices:\n" + "".join(f"  - {s}\n" for s in slices)


@pytest.mark.parametrize(
    ("layers", "text", "told"),
    [
        (2, recipe_of("{{sources: [{{model: {base}}}]}}"), ["needs 3 layers with the same tensors, the model has 2"]),
        (4, recipe_of("{{sources: [{{model: {base}}}, {{model: {base}}}]}}"), ["one source", "2 sources"]),
        (4, recipe_of("{{sources: [{{model: {base}, layer_range: [1, 2]}}]}}"), ["no gap for lesa"]),
        (4, recipe_of("{{sources: [{{model: {base}}}], parameters: {{zero_init: [q]}}}}"), ["'q' does not write"]),
        (4, recipe_of("{{sources: [{{model: {base}}}], parameters: {{epoch: 3}}}}"), ["epoch", "did you mean"]),
        (4, recipe_of("{{sources: [{{model: {base}}}], parameters: {{width: 0}}}}"), ["width", "at least 1"]),
        (4, "base_model: {base}\nupscale: {{preset: lesa, parameters: {{reg: 1}}}}\n", ["lesa has no parameter 'reg'"]),
    ],
)
def test_bad_input(run, tmp_path, layers, text, told):
    base = make_model(tmp_path / "base", layers=layers)
    said = run("plan", write_recipe(tmp_path / "recipe.yml", text.format(base=base)), expect=2).err
    assert all(part in said for part in told), said


def test_an_undescribed_family_is_refused(run, tmp_path):
    base = make_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "nobodys"}))
    said = run("upscale", base, tmp_path / "out", "--preset", "lesa", expect=2).err
    assert "lesa does not know" in said and "llama" in said and "nobodys" in said


def test_not_a_number_is_found(run, tmp_path):
    base = make_model(tmp_path / "base")
    tensors = weights(base)
    tensors[f"model.layers.3.{UP}"][0, 0] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    said = run("upscale", base, tmp_path / "out", "--preset", "lesa", "--insert", "{after: [0]}", expect=2).err
    assert "layer 3 holds NaN" in said and f"model.layers.0.{UP} to model.layers.3.{UP}" in said


_PEAK = """
import sys, threading, torch
from deus_merge.api import merge, upscale_recipe
torch.set_num_threads(1)
def anonymous():
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("RssAnon:")).split()[1]) * 1024
peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
recipe = upscale_recipe(sys.argv[1], preset="lesa", insert={"after": [1]}, parameters={"epochs": 1})
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
merge(recipe, sys.argv[2])
done.set()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_what_the_plan_says(run, tmp_path):
    """Beside what importing torch takes, and the libraries' own buffers."""
    base = make_model(tmp_path / "base", layers=3, hidden_size=64, intermediate_size=1280, dtype=torch.bfloat16)
    plan = run("upscale", base, tmp_path / "x", "--preset", "lesa", "--dry-run", "--json").json()
    told = subprocess.run([sys.executable, "-c", _PEAK, base, tmp_path / "out"], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    estimate = plan["peak_memory_bytes"] - 330_000_000
    assert 0.5 * estimate < int(told.stdout) < estimate + 40_000_000
