"""One run: the new layers of a deeper model learn a text, everything else is frozen.

What lies below the first new layer never changes, so its hidden states are computed once for a seed and mapped from a
file by every run. Losses are means over a window's predictions, in nats a token; arithmetic is bfloat16 with float32
weights for what trains, norms and the residual stream (torch.autocast), in every run alike.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deus_merge import api
from deus_merge.report.manifest import read_manifest

from . import texts
from .inits import Init, new_positions

CONTEXT = 256
_HEAD_ROWS = 1024  # tokens whose logits exist at once
_WARM_UP = 8


@dataclass(frozen=True)
class Setting:
    """What all runs on one model share.

    Attributes:
        name: Of the model.
        folder: The base checkpoint.
        text, base_text: `texts.pieces` sources: what is learned, and what must not be forgotten.
        base, texts: Fingerprints of the weights, and of both texts.
        insert: Where new layers go.
        place: A name for that.
        steps: Of training.
        batch: Windows of 256 tokens in a step.
        held_out: Windows of each text whose loss is measured; every seed has its own.
        points: How often it is measured.
        lrs: Learning rates to begin with.
    """

    name: str
    folder: str
    text: tuple[str, ...]
    base_text: tuple[str, ...]
    base: str
    texts: str
    insert: object = "top_half"
    place: str = ""
    steps: int = 128
    batch: int = 2
    held_out: int = 16
    points: int = 6
    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)

    @property
    def tokens(self) -> int:
        """Tokens of a whole run."""
        return self.steps * self.batch * CONTEXT

    def at(self, insert: object, place: str = "") -> Setting:
        """The same with other places."""
        return replace(self, insert=insert, place=place)


@dataclass(frozen=True)
class Job:
    """One run. Its key tells its result from others."""

    KEYS: ClassVar = ("model", "base", "texts", "insert", "steps", "batch", "init", "lr", "seed")
    setting: Setting
    init: str
    lr: float
    seed: int

    @property
    def key(self) -> dict[str, object]:
        s = self.setting
        values = (s.name, s.base, s.texts, s.insert, s.steps, s.batch, self.init, self.lr, self.seed)
        return dict(zip(self.KEYS, values, strict=True))


class Scratch:
    """Files that runs share: tokens, hidden states of the frozen lower part, deeper checkpoints."""

    def __init__(self, folder: Path, setting: Setting):
        self.root, self.setting = folder, setting
        self.folder = folder / f"{setting.name}-{setting.base}-{setting.texts}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def windows(self, text: str, seed: int) -> dict[str, torch.Tensor]:
        """Windows of a seed, each (w, 256): ``train`` in their order, and ``held_out``, without a window in both.

        Args:
            text: ``text`` or ``base_text``.
            seed: Draws the windows.
        """
        training, held_out = (self._tokens(text, side) for side in ("training", "held_out"))
        s, draw = self.setting, torch.Generator().manual_seed(seed)
        return {
            "train": _drawn(training, s.steps * s.batch if text == "text" else 0, draw),
            "held_out": _drawn(held_out, s.held_out, draw),
        }

    def calibration(self) -> torch.Tensor:
        """Windows of the text for inits that look at it, the same for every seed, (8, 256)."""
        return _drawn(self._tokens("text", "training"), 8, torch.Generator().manual_seed(-1))

    def _tokens(self, text: str, side: str) -> torch.Tensor:
        path = self.folder / f"{text}-{side}.npy"
        if not path.exists():
            tokenizer = AutoTokenizer.from_pretrained(self.setting.folder)
            for name, found in zip(("training", "held_out"), texts.sides(getattr(self.setting, text)), strict=True):
                _save(self.folder / f"{text}-{name}.npy", texts.tokens(tokenizer, found).numpy().astype(np.int32))
        return torch.from_numpy(np.load(path).astype(np.int64))

    @torch.no_grad()
    def hidden(self, below: int, seed: int) -> dict[str, np.ndarray]:
        """Hidden states before layer ``below`` of all windows of a seed, each (w, 256, d) float32, mapped."""
        wanted = {"train": "text", "held_out": "text", "base": "base_text"}
        s = self.setting
        kind = f"hidden-{below}-{seed}-{s.steps}x{s.batch}-{s.held_out}"
        paths = {name: self.folder / f"{kind}-{name}.npy" for name in wanted}
        if not all(path.exists() for path in paths.values()):
            model = AutoModelForCausalLM.from_pretrained(s.folder, dtype=torch.float32)
            for name, text in wanted.items():
                ids = self.windows(text, seed)["held_out" if name == "base" else name]
                parts = []
                for chunk in ids.split(8):
                    with mixed():
                        h = model.model.embed_tokens(chunk)
                        parts.append(through(model, model.model.layers[:below], h).float().numpy())
                _save(paths[name], np.concatenate(parts))
        return {name: np.load(path, mmap_mode="r") for name, path in paths.items()}

    def prepare(self, job: Job, init: Init) -> None:
        """Make what several runs use."""
        self.hidden(min(_new_layers(self.setting, self.deeper(job.init, init), init)), job.seed)

    def deeper(self, name: str, init: Init) -> Path:
        """The deeper checkpoint of an init, made when it is first asked for."""
        plan = api.plan(init.build(self.setting.folder, self.setting.insert))
        out = self.folder / "models" / f"{name}-{plan.hash[:12]}"
        if not out.exists():
            out.parent.mkdir(exist_ok=True)
            api.merge(plan, out)
        return out


def _drawn(ids: torch.Tensor, count: int, draw: torch.Generator) -> torch.Tensor:
    whole = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    if len(whole) < count:
        raise SystemExit(f"the text has {len(whole)} windows of {CONTEXT} tokens, {count} are needed: give more text")
    return whole[torch.randperm(len(whole), generator=draw)[:count]]


def _save(path: Path, values: np.ndarray) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "wb") as file:
        np.save(file, values)
    os.replace(part, path)


def mixed() -> torch.autocast:
    """The arithmetic of every run."""
    return torch.autocast("cpu", torch.bfloat16)


def through(model, layers, h: torch.Tensor) -> torch.Tensor:
    """Hidden states (w, t, d) through some decoder layers of a Llama."""
    places = torch.arange(h.shape[1])[None]
    rotary = model.model.rotary_emb(h, places)
    for layer in layers:
        h = layer(h, attention_mask=None, position_ids=places, position_embeddings=rotary)
    return h


def loss_of(model, layers, h: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean loss of the next token inside each window, (w, t, d) and (w, t) -> ()."""
    h = model.model.norm(through(model, layers, h))[:, :-1].flatten(0, 1)  # (w * (t-1), d)
    goal = ids[:, 1:].flatten()
    total = h.new_zeros((), dtype=torch.float32)
    for rows, targets in zip(h.split(_HEAD_ROWS), goal.split(_HEAD_ROWS), strict=True):
        total = total + torch.nn.functional.cross_entropy(model.lm_head(rows).float(), targets, reduction="sum")
    return total / len(goal)


@torch.no_grad()
def _measured(model, layers, hidden: np.ndarray, ids: torch.Tensor) -> float:
    losses = []
    for start in range(0, len(ids), 4):
        with mixed():
            h = torch.from_numpy(np.array(hidden[start : start + 4]))
            losses.append(loss_of(model, layers, h, ids[start : start + 4]).item() * len(h))
    return sum(losses) / len(ids)


def run(job: Job, init: Init, scratch: Path) -> dict:
    """Train one init once.

    Returns:
        The job's key, ``place``, ``new_layers``, ``initial``, ``final`` (held out), ``curve`` of (tokens, held-out
        loss), ``online`` (training loss of every step, before it), ``base_before`` and ``base_after`` (held-out loss on
        the base's text), ``trained`` (parameters), ``seconds``, ``tflop``.
    """
    s, files = job.setting, Scratch(scratch, job.setting)
    folder = files.deeper(job.init, init)
    new = _new_layers(s, folder, init)
    below = min(new)
    data, base = files.windows("text", job.seed), files.windows("base_text", job.seed)["held_out"]
    hidden = files.hidden(below, job.seed)
    torch.manual_seed(job.seed)
    started = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = model.model.layers[below:]
    trained = _freeze(model, new)
    if init.edit is not None:
        init.edit(model, new, files.calibration(), torch.Generator().manual_seed(1000 + job.seed))
    optimizer = torch.optim.AdamW(trained, lr=job.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    points = [round(s.steps * (i + 1) / s.points) for i in range(s.points)]
    initial = _measured(model, layers, hidden["held_out"], data["held_out"])
    base_before = _measured(model, layers, hidden["base"], base)
    curve, online = [(0, initial)], []
    for step, rows in enumerate(torch.arange(s.steps * s.batch).split(s.batch)):
        for group in optimizer.param_groups:
            group["lr"] = job.lr * min(1.0, (step + 1) / _WARM_UP)
        with mixed():
            h = torch.from_numpy(np.array(hidden["train"][rows[0] : rows[-1] + 1]))
            loss = loss_of(model, layers, h, data["train"][rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        online.append(round(loss.item(), 5))
        if not np.isfinite(online[-1]):  # it diverged
            curve += [(point * s.batch * CONTEXT, np.inf) for point in points if point > step]
            break
        if step + 1 in points:
            tokens = (step + 1) * s.batch * CONTEXT
            curve.append((tokens, round(_measured(model, layers, hidden["held_out"], data["held_out"]), 5)))
    return job.key | {
        "place": s.place,
        "new_layers": list(new),
        "initial": round(initial, 5),
        "final": curve[-1][1],
        "curve": curve,
        "online": online,
        "base_before": round(base_before, 5),
        "base_after": round(_measured(model, layers, hidden["base"], base), 5),
        "trained": sum(p.numel() for p in trained),
        "seconds": round(time.monotonic() - started, 1),
        "tflop": round(_flop(model, below, new) * s.tokens / 1e12, 3),
    }


def _new_layers(setting: Setting, folder: Path, init: Init) -> tuple[int, ...]:
    return read_manifest(folder).new_layers if init.repeats else new_positions(setting.folder, setting.insert)


def _freeze(model, new: Sequence[int]) -> list[torch.nn.Parameter]:
    """Only the new layers train; frozen matrices are kept in the dtype of the arithmetic."""
    trained = {id(p) for layer in new for p in model.model.layers[layer].parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
        if id(parameter) not in trained and parameter.ndim == 2:
            parameter.data = parameter.data.bfloat16()
    return [p for p in model.parameters() if p.requires_grad]


def _flop(model, below: int, new: Sequence[int]) -> float:
    """Multiplications and additions of matrix products for a training token: 2 a weight forward, 2 for the gradient of
    the input, 2 for the gradient of the weight; the lower part is counted forward."""
    sizes = [sum(p.numel() for p in layer.parameters() if p.ndim == 2) for layer in model.model.layers]
    total = 4.0 * model.lm_head.weight.numel()
    for i, size in enumerate(sizes):
        total += size * (2 if i < below else 6 if i in new else 4)
    return total
