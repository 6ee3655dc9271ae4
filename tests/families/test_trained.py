"""The whole way on trained models of three unlike families: deeper, verified, trained, merged, and back.

gemma2 has norms behind its blocks and two kinds of attention; gpt_neox has fused tensors and parallel blocks; qwen3_moe
has experts, and one layer without. ``benchmarks/train_tiny.py`` made them; ``trained/`` has their figures.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_contract import align, opened, stack_of, stored_layers
from tiny_models import load

from benchmarks import train_tiny
from deus_merge import training

TRAINED = Path(__file__).parent / "trained"
FAMILIES = sorted(train_tiny.FAMILIES)
PRESETS = {
    "opt_deus": "all",
    "opt_deus_paper": "{count: 3, where: even}",
    "llama_pro": None,
    "average_zero": "top_half",
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory, tiny) -> Path:
    """The trained model with the shipped tokenizer beside it."""
    folder = shutil.copytree(TRAINED / request.param, tmp_path_factory.mktemp("trained") / request.param)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder)
    return folder


@pytest.fixture(scope="module")
def text() -> str:
    """The beginnings of modules that were held out of the training."""
    files = [path for path in train_tiny.modules() if train_tiny.is_held_out(path.name) and path.stat().st_size > 4000]
    return "\n\n".join(path.read_text(encoding="utf-8")[:4000] for path in files[:8])


@pytest.fixture(scope="module")
def windows(text, tiny) -> torch.Tensor:
    """(4, 256) tokens of the text."""
    tokenizer = train_tiny.PreTrainedTokenizerFast.from_pretrained(tiny)
    ids = train_tiny.encode(tokenizer, [text])  # (n,)
    return ids[: 4 * train_tiny.CONTEXT].view(4, train_tiny.CONTEXT)


@pytest.fixture
def text_file(text, tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    return tmp_path / "text.txt"


@torch.no_grad()
def loss(model, windows: torch.Tensor) -> float:
    """Nats per token."""
    return model(windows, labels=windows, use_cache=False).loss.item()


def grown(run, base: Path, out: Path, preset: str, insert: str | None = None, *parameters: str) -> Path:
    places = ["--insert", insert] if insert else []
    run("upscale", base, out, "--preset", preset, *places, *(p for q in parameters for p in ("-p", q)))
    return out


def checked(run, out: Path, text_file: Path) -> dict:
    """What was found about the logits of an output that passes every check."""
    told = run("verify", out, "--logits", text_file, "--strict", "--json").json()
    assert told["passed"] and all(check["passed"] for check in told["checks"]), told
    return next(check for check in told["checks"] if check["name"] == "logits")["facts"]


def bits(folder: Path) -> dict[str, torch.Tensor]:
    """The stored tensors as bytes."""
    return {name: x.view(torch.uint8) for name, x in load_file(folder / "model.safetensors").items()}


def test_the_stored_models_have_learned(base, windows):
    """Far below the entropy of single tokens, as their notes say; small, in bfloat16, without a second tokenizer."""
    folder = TRAINED / base.name
    rows = [line.strip("|").split("|") for line in (folder / "TRAINING.md").read_text(encoding="utf-8").splitlines()]
    facts = {row[0].strip(): row[1].strip() for row in rows if len(row) == 2}
    entropy = float(facts["unigram entropy of the held-out tokens (nats)"])
    assert float(facts["held-out loss, bfloat16 weights (nats per token)"]) < entropy - 2
    assert loss(load(base), windows) < entropy - 2
    tensors = load_file(folder / "model.safetensors")
    assert {x.dtype for x in tensors.values()} == {torch.bfloat16}
    assert sum(x.numel() for x in tensors.values()) == int(facts["parameters"]) <= 500_000
    files = ["TRAINING.md", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == files


@pytest.mark.parametrize("preset", PRESETS)
def test_deeper_is_the_base(run, base, preset, tmp_path, text_file, windows):
    """Bit for bit: logits, the held-out loss, and what it writes with a cache, past the sliding window."""
    out = grown(run, base, tmp_path / "out", preset, PRESETS[preset])
    facts = checked(run, out, text_file)
    assert facts["equal"] and facts["tokens"] == train_tiny.CONTEXT and facts["loss"] == facts["loss_base"]
    deeper, own = load(out), load(base)
    assert len(stack_of(deeper)) > len(stack_of(own)) == 6
    assert loss(deeper, windows) == loss(own, windows)
    settings = {"do_sample": False, "max_new_tokens": 30, "min_new_tokens": 30, "use_cache": True}
    texts = [model.generate(windows[:2, :20], **settings) for model in (deeper, own)]
    assert torch.equal(*texts) and texts[0].shape == (2, 50)


@pytest.mark.parametrize(("preset", "depth"), [("average", 9), ("solar", 10), ("stack", 12)])
def test_repeated_and_averaged_layers_make_sense(run, base, preset, depth, tmp_path, text_file, windows):
    """Nothing is zero, so the function is another, and the loss higher; but not near that of single tokens."""
    out = grown(run, base, tmp_path / "out", preset)
    assert not checked(run, out, text_file)["equal"]
    model, own = load(out), loss(load(base), windows)
    assert len(stack_of(model)) == depth
    assert own < loss(model, windows) < own + 1.5 < train_tiny.unigram_entropy(windows.flatten())


def test_symmetry_brings_neighbours_nearer_and_keeps_the_loss(base, tmp_path, windows):
    """Every layer in the order of the next one of its kind, in float64: the same model, and more like that layer."""
    source = opened(base)
    layers, kinds = stored_layers(source, torch.float64), source.view.kinds
    tensors = {name: x.double() for name, x in load_file(base / "model.safetensors").items()}
    turned = 0
    for i, own in enumerate(layers):
        like = next((j for j in range(i + 1, len(layers)) if kinds[j] == kinds[i]), None)
        if like is None:
            continue
        moved = align(source, i, own, layers[like])
        near, far = (sum((x[r] - layers[like][r]).square().sum().item() for r in own) for x in (moved, own))
        assert near < 0.95 * far
        tensors |= {source.view.layers[i][role]: x.contiguous() for role, x in moved.items()}
        turned += 1
    assert turned >= 4
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(base / "config.json", tmp_path)
    got, want = (loss(load(folder, torch.float64), windows) for folder in (tmp_path, base))
    assert abs(got - want) < 1e-6


def seen_by(model, windows: torch.Tensor) -> list[tuple[torch.Tensor, dict]]:
    """What each layer of a model is called with."""
    calls: list[tuple[torch.Tensor, dict]] = []

    def note(_, arguments, keywords):
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        calls.append((hidden, {name: x for name, x in keywords.items() if name != "hidden_states"}))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in stack_of(model)]
    loss(model, windows)
    for hook in hooks:
        hook.remove()
    return calls


@torch.no_grad()
def written(layer, hidden: torch.Tensor, keywords: dict) -> torch.Tensor:
    """What a layer adds to the residual stream, (windows, tokens, d)."""
    after = layer(hidden, **keywords)
    return (after[0] if isinstance(after, tuple) else after) - hidden


def test_fused_layers_compute_more_of_what_their_parents_do(run, base, tmp_path, windows):
    """Before they are zeroed, beside a mean of weights that were not aligned: what a new layer writes is nearer to the
    mean of what its two parents write at its place, in every gap; and a model with such layers has less loss."""
    calls = seen_by(load(grown(run, base, tmp_path / "zero", "opt_deus", "all")), windows)
    errors, losses = [], []
    for alignment in ("symmetry", "none"):
        out = grown(run, base, tmp_path / alignment, "opt_deus", "all", "zero_init=false", f"alignment={alignment}")
        model, errors_here = load(out), {}
        layers = stack_of(model)
        for entry in json.loads((out / "deus_merge.json").read_text())["layers"]:
            new, parents = entry["layer"], {2 * parent["layer"] for parent in entry["sources"]}
            if entry["new"] and len(parents) == 2:
                hidden = calls[new][0]
                a, b = (written(layers[i], hidden, calls[i][1]) for i in parents)
                got, want = written(layers[new], hidden, calls[new][1]), (a + b) / 2
                errors_here[new] = ((got - want).norm() / want.norm()).item()
        errors.append(errors_here)
        losses.append(loss(model, windows))
    aligned, plain = errors
    assert len(plain) >= 4 and all(aligned[new] < 0.9 * plain[new] for new in plain), errors
    assert losses[0] < losses[1], losses


def test_norms_behind_zeros_make_any_first_step_large(run, base, tmp_path, windows):
    """Why the zeroed tensors of gemma2 need a small learning rate: with a usual one the loss leaps, whatever it is."""
    out = grown(run, base, tmp_path / "out", "opt_deus", "top_half")
    own, after = loss(load(base), windows), []
    for zeroed_lr in (1e-5, 1e-3, 1e-2):
        model = load(out)
        training.freeze_base(model, out)
        groups = training.optimizer_groups(model, out, lr=1e-4, zeroed_lr=zeroed_lr)
        optimizer = torch.optim.AdamW(groups)
        model(windows, labels=windows, use_cache=False).loss.backward()
        optimizer.step()
        after.append(loss(model, windows))
    assert after[0] < own
    if base.name == "gemma2":
        assert min(after[1:]) > own + 0.5 and after[2] - after[1] < 0.1
    else:
        assert after[2] < after[1] < after[0]


def test_new_layers_learn_and_are_taken_out_again(run, base, tmp_path, windows):
    """Only they train, in a few steps below the base's loss; what was saved is verified; stripped it is the base."""
    out = grown(run, base, tmp_path / "out", "opt_deus", "top_half")
    model, own = load(out), loss(load(base), windows)
    trainable = training.freeze_base(model, out)
    assert len(trainable.layers) == 3 and loss(model, windows) == own
    assert trainable.normed == ("zeroed_lr" in str(trainable)) == (base.name == "gemma2")
    zeroed_lr = 1e-5 if trainable.normed else None
    optimizer = torch.optim.AdamW(training.optimizer_groups(model, out, lr=1e-2, zeroed_lr=zeroed_lr))
    watch = training.Watch(model, out)
    model.train()
    losses = []
    for _ in range(6):
        step = model(windows, labels=windows, use_cache=False).loss
        step.backward()
        losses.append(step.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True), losses
    watch.check()
    model.eval().to(torch.bfloat16).save_pretrained(tmp_path / "trained")
    training.carry_manifest(out, tmp_path / "trained")
    assert loss(load(tmp_path / "trained"), windows) < own - 0.2

    before, after, stored = bits(out), bits(tmp_path / "trained"), bits(base)
    new = set(training.new_parameters(out))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and len(before) - len(new) == len(stored)
    assert before.keys() - new <= same and len(new - same) > len(new) / 2
    told = run("verify", tmp_path / "trained", "--json").json()
    assert told["passed"]
    run("strip", tmp_path / "trained", tmp_path / "back")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (base / name).read_bytes(), name


def test_linear_with_a_perturbed_copy(run, base, tmp_path, windows):
    """The mean in float32, rounded once."""
    generator = torch.Generator().manual_seed(0)
    other = shutil.copytree(base, tmp_path / "other")
    stored = load_file(base / "model.safetensors")
    noise = {n: 0.1 * x.float().std() * torch.randn(x.shape, generator=generator) for n, x in stored.items()}
    moved = {n: (x + noise[n].nan_to_num()).to(x.dtype) for n, x in stored.items()}
    save_file(moved, other / "model.safetensors", {"format": "pt"})
    models = [{"model": str(m), "parameters": {"weight": w}} for m, w in ((base, 0.75), (other, 0.25))]
    (tmp_path / "linear.yml").write_text(json.dumps({"merge_method": "linear", "models": models}))
    run("merge", tmp_path / "linear.yml", tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    assert merged.keys() == stored.keys()
    for name, x in merged.items():
        assert torch.equal(x, (0.75 * stored[name].float() + 0.25 * moved[name].float()).to(x.dtype)), name
    own, far, between = (loss(load(folder), windows) for folder in (base, other, tmp_path / "out"))
    assert own < between < far


def test_inspect_and_report(run, base, tmp_path):
    """Every kind of layer has its name and its likeness to the next; alignment found more of it than there was."""
    facts = run("inspect", base, "--similarity", "--json").json()
    kinds = {"gemma2": 2, "gpt_neox": 1, "qwen3_moe": 2}
    assert len(facts["layer_kinds"]) == 6 and len(set(facts["layer_kinds"])) == kinds[base.name]
    for row in facts["similarity"]:
        assert {"q", "k", "v", "o"} <= row["roles"].keys()
        assert all(role["aligned"] > role["plain"] + 0.02 for role in row["roles"].values())
    out = grown(run, base, tmp_path / "out", "opt_deus")
    run("report", out, "--html", tmp_path / "page.html")
    assert base.name in (tmp_path / "page.html").read_text(encoding="utf-8")
