"""``calibrate``: the closed form against autograd on the whole model, and the folder that it writes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from closed_form import Whole, near
from grown import grow
from prose import PROSE, WORDS
from safetensors.torch import load_file, save_file
from support import load, make_model, save_tokenizer, train_tokenizer, weights

from deus_merge import api, training
from deus_merge.checkpoint.reader import Checkpoint
from deus_merge.core.tensors import Action
from deus_merge.models.demo import tiny_model
from deus_merge.models.view import view_model
from deus_merge.report.manifest import read_manifest
from deus_merge.training.calibration import steps
from deus_merge.training.calibration.layer_runner import LayerRunner
from deus_merge.training.calibration.memory import estimate
from deus_merge.training.calibration.options import Windows, read_windows
from deus_merge.training.calibration.passes import Passes
from deus_merge.training.calibration.writers import find_writers

QUICK = api.CalibrationOptions(tokens=640, length=32, batch=5, device="cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(PROSE)
    return path


@pytest.fixture(scope="module")
def deeper(tmp_path_factory) -> Path:
    """The trained tiny model in bfloat16, deeper, with checksums: new layers 1 and 4."""
    out = tmp_path_factory.mktemp("calibrate") / "deeper"
    api.merge(api.upscale_recipe(tiny_model(), preset="opt_deus", insert={"after": [0, 2]}), out)
    return out


@pytest.fixture(scope="module")
def calibrated(deeper, text) -> Path:
    out = deeper.with_name("calibrated")
    api.calibrate(deeper, out, text.read_text(), QUICK)
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def speaking(folder: Path, family: str = "llama", **settings) -> Path:
    return save_tokenizer(make_model(folder, family, **settings), train_tokenizer())


# the closed form -----------------------------------------------------------------------------------------------------


def formula(phi: torch.Tensor, g: torch.Tensor, method: str, damping: float) -> torch.Tensor:
    """W as it is written in the docs, by a general inverse."""
    a, b, s = phi.T @ phi / len(phi), g.T @ phi / len(phi), g.T @ g / len(phi)
    a = a + damping * a.trace() / len(a) * torch.eye(len(a))
    s = s + damping * s.trace() / len(s) * torch.eye(len(s))
    left = torch.linalg.inv(s) if method == "kfac" else torch.eye(len(s)).double()
    return left @ b @ torch.linalg.inv(a)


def phi(folder: Path) -> Path:
    """Attention and MLP side by side, biases, and other names."""
    torch.manual_seed(0)
    config = transformers.PhiConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.PhiForCausalLM(config).save_pretrained(folder)
    return folder


KINDS = {
    "llama": lambda f: make_model(f, "llama", layers=3, tied=True),
    "biases": lambda f: make_model(f, "llama_bias", layers=3, max_shard_size="40kB"),
    "sliding": lambda f: make_model(f, "mistral", layers=3),
    "mixed": lambda f: make_model(
        f, "qwen3", layers=3, use_sliding_window=True, sliding_window=8,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "parallel": phi,
}  # fmt: skip


@pytest.mark.parametrize("method", ["ridge", "kfac"])
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_closed_form_is_that_of_autograd(tmp_path, kind, method, monkeypatch):
    """phi, g, A, B, S and W of the first new layer, and of the second once the first is set; uneven batches."""
    for module in ("fit", "triangle"):
        monkeypatch.setattr(f"deus_merge.training.calibration.{module}.ROWS", 20)
    folder = grow(KINDS[kind](tmp_path / "base"), tmp_path / "out", "opt_deus", {"after": [0, 1]})
    ids = torch.randint(3, 128, (7, 24), generator=torch.Generator().manual_seed(1))
    windows, whole = Windows(ids, 5, ""), Whole(folder)
    manifest = read_manifest(folder)
    with Checkpoint.open(folder) as checkpoint:
        view = view_model(checkpoint.config, tuple(checkpoint.tensors), folder)
        runner = LayerRunner(checkpoint, view, dtype=torch.float64)
        writers = find_writers(manifest, view, checkpoint, runner)
        assert list(writers.layers) == [1, 3]
        passes = Passes(runner, windows, tmp_path / "hidden", batch=3)
        passes.skipped = {1, 3}
        for layer, found in writers.layers.items():
            names = [writer.tensor for writer in found]
            assert len(names) == 2 and all(manifest.tensors[name].action is Action.ZEROS for name in names)
            phi, g = whole.statistics(layer, names, ids[:5])
            passes.advance(layer)
            got = steps.layer_statistics(passes, found, with_gradients=True)
            assert got.tokens == len(phi) == 5 * 24 and g.abs().max() > 1e-3
            assert near(got.a.lower(), (phi.T @ phi).tril()) and near(got.b, g.T @ phi)
            assert near(got.s.lower(), (g.T @ g).tril())
            solved, size = got.solve(method, 0.3, layer)
            wanted = formula(phi, g, method, 0.3)
            written = (phi @ wanted.T).square().sum(1).mean().sqrt()
            assert near(solved, wanted) and near(torch.tensor(size), written)
            # on with the layer set, in both
            alpha, at = 0.1 / float(written), 0
            with runner.layers[layer].held():
                steps.set_weights(runner, found, solved, alpha)
                passes.run_here()
            passes.skipped.discard(layer)
            passes.position = layer + 1
            for writer in found:
                part = (alpha * wanted[:, at : at + writer.columns]).float().double()
                whole.model.get_submodule(writer.tensor.removesuffix(".weight")).weight.copy_(part)
                at += writer.columns


def loss(folder: Path, ids: torch.Tensor) -> float:
    with torch.no_grad():
        logits = load(folder)(ids).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def test_the_folder_has_the_losses_that_were_recorded(run, deeper, text, tmp_path):
    """By transformers, on the windows that were held out; in the dtype of the file. And twice the same bytes."""
    settings = ("--text", text, "--tokens", 640, "--length", 32, "--batch", 5, "--device", "cpu")
    done = run("calibrate", deeper, tmp_path / "new", *settings, "--json").json()
    assert [layer["layer"] for layer in done["layers"]] == [1, 4] and (done["tokens"], done["held_out_tokens"]) == (
        480,
        160,
    )
    assert done["loss_after"] < done["loss_before"] - 0.1
    assert all(layer["loss_after"] < layer["loss_before"] and layer["alpha"] > 0 for layer in done["layers"])
    assert done["layers"][1]["loss_before"] == done["layers"][0]["loss_after"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(deeper)
    ids = torch.tensor(tokenizer(PROSE)["input_ids"])
    ids = ids[: len(ids) // 32 * 32].view(-1, 32)  # spread over all of the text
    ids = ids[[i * len(ids) // 20 for i in range(20)]]
    held_out = torch.randperm(20, generator=torch.Generator().manual_seed(0))[15:].sort().values
    assert loss(deeper, ids[held_out]) == pytest.approx(done["loss_before"], abs=1e-5)
    assert loss(tmp_path / "new", ids[held_out]) == pytest.approx(done["loss_after"], abs=1e-5)
    run("calibrate", deeper, tmp_path / "again", *settings)
    assert content(tmp_path / "new") == content(tmp_path / "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "new"]
    other = run(
        "calibrate", deeper, tmp_path / "other", *settings, "--damping", 3, "--method", "ridge", "--json"
    ).json()
    assert other["damping"] == 3 and other["layers"][0]["alpha"] != done["layers"][0]["alpha"]


def test_only_the_outputs_of_new_layers_change(run, deeper, calibrated):
    before, after = weights(deeper), weights(calibrated)
    changed = {name for name in after if not after[name].equal(before[name])}
    manifest = read_manifest(calibrated)
    zeros = {name for name, t in read_manifest(deeper).tensors.items() if t.action is Action.ZEROS}
    assert changed == zeros == {name for layer in manifest.calibration.layers for name in layer.tensors}
    assert {manifest.tensors[name].action for name in changed} == {Action.COMPUTE} and not manifest.function_preserving
    assert all("zeros" not in layer.actions for layer in manifest.layers)
    assert {f.name for f in calibrated.iterdir()} == {f.name for f in deeper.iterdir()}
    card = (calibrated / "README.md").read_text()
    assert "were set in closed form (kfac) from 480 tokens" in card and "computes exactly" not in card
    page = api.report(calibrated).read_text()
    (calibrated / "report.html").unlink()
    assert "<h2>Calibrated</h2>" in page and f"{manifest.calibration.loss_after:.4f} after" in page


def test_it_is_verified_and_stripped_like_any_output(run, calibrated, tmp_path):
    checks = {c["name"]: c for c in run("verify", calibrated, "--json").json()["checks"]}
    assert all(check["passed"] for check in checks.values())
    assert (
        checks["zeroed tensors"]["detail"] == "0 zero"
        and "equal to their sources" in checks["copied tensors"]["detail"]
    )
    done = api.strip(calibrated, tmp_path / "back")
    assert done.same_files and not done.different
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tiny_model() / "model.safetensors").read_bytes()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name, data in content(calibrated).items():
        (damaged / name).write_bytes(data)
    name = read_manifest(damaged).calibration.layers[0].tensors[0]
    place = Checkpoint.open(damaged)[name]
    with place.file.open("r+b") as file:
        file.seek(place.offset)
        byte = file.read(1)
        file.seek(place.offset)
        file.write(bytes([byte[0] ^ 1]))
    failed = [c for c in run("verify", damaged, "--json", expect=3).json()["checks"] if c["passed"] is False]
    assert [c["name"] for c in failed] == ["checksums"] and name in failed[0]["detail"]


def test_a_ratio_for_zeros_that_are_set_is_not_silent(run, calibrated):
    model = transformers.AutoModelForCausalLM.from_pretrained(calibrated)
    training.freeze_base(model, calibrated)
    words = "output_ratio 3 has no effect, everything trains at lr: calibration has set"
    with pytest.warns(UserWarning, match=words):
        groups = training.optimizer(model, calibrated, lr=1e-3, output_ratio=3.0).param_groups
    assert {group["lr"] for group in groups} == {1e-3}
    text = run("export-training", calibrated, "--for", "axolotl", "--lr", "1e-3", "--output-ratio", 3).out
    assert f"# {words}" in text and "lr_groups" not in text


def test_windows_are_spread_over_a_long_text(deeper):
    """Also over one that is too long to be read as a whole; which are held out depends on the seed."""
    lines = [f"{'rain ' if i < 3000 else 'money '} {WORDS[i % len(WORDS)]} {i}\n" * 4 for i in range(6000)]
    options = replace(QUICK, tokens=128, length=16)
    found = read_windows(deeper, "".join(lines), options, 2048)
    assert found.ids.shape == (8, 16) and found.fitted == 6
    tokenizer = transformers.AutoTokenizer.from_pretrained(deeper)
    texts = [tokenizer.decode(row) for row in found.ids]
    assert [sum(word in text for text in texts) for word in ("rain", "money")] == [4, 4]
    other = read_windows(deeper, "".join(lines), replace(options, seed=1), 2048)
    assert not other.ids.equal(found.ids) and other.ids.sum() == found.ids.sum()


# the step ------------------------------------------------------------------------------------------------------------


def test_a_step_that_does_not_help_is_not_taken(deeper, tmp_path):
    """Prose makes one token again and again less likely; the other way round there is a step that helps."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(deeper)
    prose = torch.tensor(tokenizer(PROSE[:2000])["input_ids"][:128]).view(4, 32)
    rare = [i for i in range(1000, 2048) if i not in prose][:4]
    again = torch.tensor(rare)[:, None].expand(4, 32)
    taken = one_step(deeper, Windows(torch.cat([again, prose]), 4, ""), tmp_path)
    assert taken.layer.alpha > 0 and taken.layer.loss_after < taken.layer.loss_before
    step = one_step(deeper, Windows(torch.cat([prose, again]), 4, ""), tmp_path)
    assert (step.layer.alpha, step.layer.tensors, dict(step.weights)) == (0.0, (), {})
    assert step.layer.loss_after == step.layer.loss_before


def one_step(folder: Path, windows: Windows, place: Path) -> steps.Step:
    """The lowest new layer's step."""
    manifest = read_manifest(folder)
    with Checkpoint.open(folder) as checkpoint:
        view = view_model(checkpoint.config, tuple(checkpoint.tensors), folder)
        runner = LayerRunner(checkpoint, view)
        writers = find_writers(manifest, view, checkpoint, runner)
        passes = Passes(runner, windows, place / "hidden", batch=4)
        passes.skipped = set(manifest.new_layers)
        passes.advance(1)
        return steps.calibrate_layer(passes, writers.layers[1], None, QUICK)


def test_layers_that_stay_zero(run, deeper, tmp_path, monkeypatch):
    """No size of the step lowers the loss: the same bytes, and a manifest that says so."""
    monkeypatch.setattr(steps, "COARSE", (1e4, 1e5))
    monkeypatch.setattr(steps, "FINE", (1.0,))
    done = api.calibrate(deeper, tmp_path / "new", PROSE, QUICK)
    assert done.record.loss_before == done.record.loss_after and not any(x.tensors for x in done.record.layers)
    assert content(tmp_path / "new")["model.safetensors"] == content(deeper)["model.safetensors"]
    checks = {c["name"]: c["detail"] for c in run("verify", tmp_path / "new", "--json").json()["checks"]}
    assert checks["zeroed tensors"] == "4 zero" and read_manifest(tmp_path / "new").function_preserving


# interrupted ---------------------------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys
import torch
torch.set_num_threads(1)  # as in the tests themselves
from pathlib import Path
from deus_merge import api, training
from deus_merge.checkpoint.output_folder import OutputFolder
place, deeper, out, text = sys.argv[1:]
calls = []
def die_in(name, at):
    real = getattr(OutputFolder, name)
    def dying(self, *arguments):
        calls.append(name)
        if calls.count(name) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *arguments)
    setattr(OutputFolder, name, dying)
die_in(*{"first": ("record", 2), "second": ("record", 3), "end": ("finish", 1)}[place])
options = api.CalibrationOptions(tokens=640, length=32, batch=5, device="cpu")
api.calibrate(deeper, out, Path(text).read_text(), options)
"""


@pytest.mark.parametrize("place", ["first", "second", "end"])
def test_killed_and_resumed(run, deeper, calibrated, text, tmp_path, place):
    """Killed when the tensors of a layer are written and its line is not, or before the folder gets its name."""
    command = [sys.executable, "-c", CHILD, place, str(deeper), str(tmp_path / "new"), str(text)]
    ended = subprocess.run(command, capture_output=True, timeout=300)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "new").exists()
    settings = ("--text", text, "--tokens", 640, "--length", 32, "--batch", 5, "--device", "cpu")
    if place != "first":
        assert "--resume" in run("calibrate", deeper, tmp_path / "new", *settings, expect=2).err
        error = run("calibrate", deeper, tmp_path / "new", *settings, "--damping", 2, "--resume", expect=2).err
        assert "other values for: damping" in error
    finished = {"first": 0, "second": 1, "end": 2}[place]
    err = run("calibrate", deeper, tmp_path / "new", *settings, "--resume").err
    assert err.count("finished by the earlier run") == finished
    resumed, whole = content(tmp_path / "new"), content(calibrated)
    manifests = [json.loads(files.pop("deus_merge.json")) for files in (resumed, whole)]
    assert resumed == whole
    # Numbers of another process: libraries of linear algebra may differ in the last digit.
    steps = [[step.pop("alpha") for step in m["calibration"]["layers"]] for m in manifests]
    assert steps[0] == pytest.approx(steps[1], rel=1e-12)
    assert [m | {"sha256": ""} for m in manifests][0] == [m | {"sha256": ""} for m in manifests][1]
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
    assert "complete already" in run("calibrate", deeper, tmp_path / "new", *settings, "--resume").err


# refused -------------------------------------------------------------------------------------------------------------


def edited(folder: Path, out: Path, change) -> Path:
    """A copy of an output whose tensors were changed."""
    out.mkdir()
    for name, data in content(folder).items():
        (out / name).write_bytes(data)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def without(folder: Path, out: Path, *names: str) -> Path:
    found = edited(folder, out, lambda tensors: None)
    for name in names:
        (found / name).unlink()
    return found


def trained(folder: Path, out: Path) -> Path:
    found = edited(folder, out, lambda tensors: None)
    (found / "deus_merge.json").write_bytes(replace(read_manifest(found), trained=True).sealed())
    return found


def poisoned(tensors: dict) -> None:
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = float("nan")


def learned(tensors: dict) -> None:
    tensors["model.layers.4.mlp.down_proj.weight"][3, 5] = 0.01


def norms_behind(folder: Path) -> Path:
    config = transformers.Olmo2Config(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.Olmo2ForCausalLM(config).save_pretrained(folder / "base")
    return grow(save_tokenizer(folder / "base", train_tokenizer()), folder / "out", "copy_next", {"after": [0]})


def transposed(folder: Path) -> Path:
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_head=2, n_layer=2, vocab_size=128))
    gpt2.save_pretrained(folder / "base")
    return grow(save_tokenizer(folder / "base", train_tokenizer()), folder / "out", "copy_next", {"after": [0]})


def experts(folder: Path) -> Path:
    """transformers keeps experts in tensors of other names."""
    config = transformers.MixtralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(folder / "base")
    return grow(save_tokenizer(folder / "base", train_tokenizer()), folder / "out", "copy_next", {"after": [0]})


def small(folder: Path) -> Path:
    """Fewer rows than its tokenizer has tokens."""
    base = save_tokenizer(make_model(folder / "base", vocab_size=40), train_tokenizer())
    return grow(base, folder / "out", "copy_next", {"after": [0]})


REFUSED = {
    "no manifest": (lambda d, t: without(d, t / "m", "deus_merge.json"), (), ["no manifest"]),
    "a manifest that says trained": (lambda d, t: trained(d, t / "m"), (), ["have been trained already"]),
    "trained weights": (lambda d, t: edited(d, t / "m", learned), (), ["not zero any more", "4.mlp.down_proj"]),
    "outputs that are not zero": (
        lambda d, t: grow(tiny_model(), t / "m", "average", {"after": [0]}), (), ["change what the model computes"],
    ),
    "a short text": (lambda d, t: d, ("--tokens", 20_000, "--length", 10_000), ["the text is too short", "tokens"]),
    "tokens without a row": (lambda d, t: small(t), (), ["no row for", "token ids below 40"]),
    "no tokenizer": (
        lambda d, t: without(d, t / "m", "tokenizer.json", "tokenizer_config.json"), (), ["no tokenizer"],
    ),
    "NaN": (lambda d, t: edited(d, t / "m", poisoned), (), ["layer 1", "not finite"]),
    "little memory": (lambda d, t: d, ("--max-memory", "100MB"), ["--max-memory", "more memory than allowed"]),
    "norms behind": (lambda d, t: norms_behind(t), (), ["'olmo2' can be calibrated", "post_attention_layernorm"]),
    "transposed": (lambda d, t: transposed(t), (), ["'gpt2'", "transposed"]),
    "experts": (lambda d, t: experts(t), (), ["'mixtral'", "other names"]),
    "a damaged file": (
        lambda d, t: (lambda m: (m / "tokenizer.json").write_bytes((m / "tokenizer.json").read_bytes() + b" ") and m)(
            edited(d, t / "m", lambda tensors: None)
        ), (), ["tokenizer.json: the file is not as it was written"],
    ),
    "no damping": (lambda d, t: d, ("--damping", 0), ["--damping", "more than 0"]),
    "another method": (lambda d, t: d, ("--method", "newton"), ["ridge or kfac", "newton"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(run, deeper, text, tmp_path, case):
    build, options, reported = REFUSED[case]
    model = build(deeper, tmp_path)
    before = {p.name for p in tmp_path.iterdir()}
    settings = ("--text", text, "--tokens", 320, "--length", 32, "--device", "cpu", *options)
    error = run("calibrate", model, tmp_path / "new", *settings, expect=3 if case == "a damaged file" else 2).err
    assert all(part in error for part in reported), error
    assert {p.name for p in tmp_path.iterdir()} == before


def test_refused_outputs(run, deeper, calibrated, text, tmp_path):
    settings = ("--text", text, "--tokens", 320, "--length", 32)
    assert "calibrated already" in run("calibrate", calibrated, tmp_path / "new", *settings, expect=2).err
    assert "not empty" in run("calibrate", deeper, calibrated, *settings, expect=2).err
    assert "contain each other" in run("calibrate", deeper, deeper, *settings, "--overwrite", expect=2).err
    assert "contain each other" in run("calibrate", deeper, deeper / "in", *settings, expect=2).err


# memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ridge", "kfac"])
def test_an_8b_model_fits_into_6_gb(method):
    """benchmarks/calibration_memory.py measures it."""
    config = transformers.LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    tensors = dict(model.state_dict())
    data = json.loads(config.to_json_string(use_diff=False))
    view = view_model(data, tuple(tensors), "here")
    options = api.CalibrationOptions(method=method)
    needs = estimate(view, tensors, data, options, 4096 + 14_336, (48, 16))
    assert 3.5e9 < needs.memory < 5e9
    assert needs.disk < 20e9
