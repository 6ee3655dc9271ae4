"""One run of a comparison: a model is trained on a text, and its held-out loss is measured on the way.

Losses are means over the predictions of a window, in nats a token: without the terms that mixtures of experts add, and
without dropout, which would hide what candidates differ by. The rate rises in the first steps and is constant then, so
that every point of a curve is what a run of that length would reach.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import TrainingError
from ...core.text import some_of
from ...models.silence import no_progress_bars
from .candidates import Job
from .flops import flop_counter
from .prefix import FrozenPrefix, layer_list
from .setup import narrow, prepare
from .text import tokens_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from torch.nn import Parameter

_WARM_UP = 8
_AT_ONCE = 4  # windows of a forward pass where losses are measured
_POINTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)  # of a run: where losses are measured


def run(job: Job, device: str) -> dict[str, Any]:
    """Train once.

    Args:
        job: The run.
        device: Where the arithmetic is done.

    Returns:
        The job's key, ``new_layers``, ``checkpoint`` (the name of its folder), ``initial`` and ``final`` (held-out
        losses), ``curve`` of (tokens, held-out loss), ``online`` (the training loss of every step, before it), with a
        text of the base ``base_before`` and ``base_after`` (losses on it), ``trained`` (parameters), ``memory``
        (bytes), ``tflop``, ``seconds``, ``device``.
    """
    import torch

    fixed, began = job.fixed, time.monotonic()
    torch.manual_seed(job.seed)
    data = Windows(job)
    learner = _Learner(job, device)
    memory, flop = learner.cost(data.training[: fixed.batch])
    learner.replace_prefix(data)
    initial = learner.measured("held_out", data)
    base = [learner.measured("base", data)] if fixed.base_text else []
    offset = fixed.calibration_tokens if job.candidate.calibrated else 0
    steps = fixed.steps - -(-offset // (fixed.batch * fixed.length))  # the last windows are not trained on
    offset = (fixed.steps - steps) * fixed.batch * fixed.length
    points = sorted({max(1, round(steps * point)) for point in _POINTS})
    curve, online = [(offset, initial)], []
    for step in range(steps):
        online.append(round(learner.step(step, data), 5))
        if not math.isfinite(online[-1]):  # it diverged
            curve += [(offset + p * fixed.batch * fixed.length, math.inf) for p in points if p > step]
            break
        if step + 1 in points:
            curve.append((offset + (step + 1) * fixed.batch * fixed.length, learner.measured("held_out", data)))
    base += [learner.measured("base", data)] if fixed.base_text else []
    return {
        **job.key,
        "new_layers": list(job.new_layers),
        "checkpoint": job.folder.name,
        "initial": initial,
        "final": curve[-1][1],
        "curve": curve,
        "online": online,
        **dict(zip(("base_before", "base_after"), base, strict=False)),
        "trained": sum(p.numel() for p in learner.trained),
        "memory": memory,
        "tflop": float(f"{flop * steps / 1e12:.6g}"),
        "seconds": round(time.monotonic() - began, 1),
        "device": learner.device.type,
    }


class Windows:
    """The windows of a seed.

    Attributes:
        training: Token ids, (steps * batch, t).
        held_out: Token ids of the text, (held_out, t).
        base: Token ids of the base's text, (held_out, t), or none.
    """

    def __init__(self, job: Job):
        import torch

        fixed = job.fixed
        draw = torch.Generator().manual_seed(job.seed)
        text = tokens_of(job.work, fixed.model, fixed.text)
        self.training = text.windows("training", fixed.steps * fixed.batch, fixed.length, draw)
        self.held_out = text.windows("held_out", fixed.held_out, fixed.length, draw)
        self.base = torch.empty(0, fixed.length, dtype=torch.int64)
        if fixed.base_text:
            base_text = tokens_of(job.work, fixed.model, fixed.base_text)
            self.base = base_text.windows("held_out", fixed.held_out, fixed.length, draw)
        self.hidden: dict[str, np.ndarray] = {}


class _Learner:
    """A model, what of it trains, and its optimizer."""

    def __init__(self, job: Job, device: str):
        import torch
        from transformers import AutoModelForCausalLM

        self.job, self.device, self.fixed = job, torch.device(device), job.fixed
        try:
            with no_progress_bars():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    job.folder, dtype=torch.float32, output_loading_info=True
                )
            model, info = loaded
        except (ImportError, OSError, ValueError) as error:
            why = " ".join(str(error).split())
            raise TrainingError("transformers cannot load the model", where=job.folder, got=why) from None
        lost = {*info["missing_keys"], *(name for name in info["unexpected_keys"] if "weight_scale" in name)}
        if lost:  # weights that would be drawn at random, or codes that would be taken for weights
            hint = "write the base in floating point (merge_method: passthrough, dtype: bfloat16), and compare it"
            message = "transformers cannot load all weights of the model"
            raise TrainingError(message, where=job.folder, got=some_of(sorted(lost)), hint=hint)
        self.model, make_optimizer = prepare(model, job)
        self.trained: list[Parameter] = [p for p in self.model.parameters() if p.requires_grad]
        if self.fixed.precision == "bfloat16":
            narrow(self.model)
        self.model.to(self.device).eval()
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            if getattr(config, "output_router_logits", False):
                config.output_router_logits = False
        self.optimizer = make_optimizer()
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._prefix: FrozenPrefix | None = None

    def arithmetic(self) -> AbstractContextManager:
        import torch

        narrow = self.fixed.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16) if narrow else nullcontext()

    def loss(self, windows: Tensor) -> Tensor:
        """The mean loss of windows (b, t)."""
        from torch.nn.functional import cross_entropy

        windows = windows.to(self.device)
        with self.arithmetic():
            logits = self.model(input_ids=windows, use_cache=False).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten())

    def _first_loss(self, windows: Tensor) -> Tensor:
        """The loss of windows (b, t), by a model that may not compute so."""
        import torch

        try:
            return self.loss(windows)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            why = str(error).partition("\n")[0]
            hint = "--precision float32" if self.fixed.precision == "bfloat16" else None
            message = f"the model does not compute in {self.fixed.precision} over float32 weights"
            raise TrainingError(message, where=self.job.folder, got=why, hint=hint) from error

    def cost(self, windows: Tensor) -> tuple[int, float]:
        """The memory that training takes, in bytes (weights, gradients, states of the optimizer, what the backward pass
        keeps), and the floating-point operations of a step. Nothing is changed."""
        import torch

        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        counter = flop_counter()
        with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self._first_loss(windows)
            activations = sum(kept.values())
            loss.backward()
        if not any(p.grad is not None and p.grad.any() for p in self.trained):
            hint = "transformers may not compute with these weights: write the base in floating point, and grow that"
            raise TrainingError("nothing would train: all gradients are zero", where=self.job.folder, hint=hint)
        for parameter in self.trained:
            parameter.grad = None
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        muon = {id(p) for g in self.optimizer.param_groups if g.get("algorithm") == "muon" for p in g["params"]}
        states = sum((2 if id(p) in muon else 3) * p.numel() * p.element_size() for p in self.trained)  # and gradients
        return weights + states + activations, float(counter.get_total_flops())

    def replace_prefix(self, data: Windows) -> None:
        """Compute the frozen layers below the lowest one that trains only once for all runs."""
        import torch

        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        found = layer_list(self.model, names)
        if found is None:
            return
        name, layers = found
        count = min(int(n.removeprefix(f"{name}.").partition(".")[0]) for n in names)
        size = data.training.numel() * getattr(self.model.config.get_text_config(), "hidden_size", 0) * 4
        if count == 0 or not 0 < size <= _largest_file(self.job.work):
            return
        prefix = FrozenPrefix(self.model, layers, count, self.arithmetic)
        with torch.no_grad():
            if not prefix.fits(data.held_out[:1].to(self.device), self.loss):
                return
        kind = f"{self.device.type}-{self.fixed.precision}-{prefix.digest()}-{self.job.seed}"
        parts = {"training": data.training, "held_out": data.held_out, "base": data.base}
        for part, windows in parts.items():
            if len(windows):
                file = self.job.work / "hidden" / f"{kind}-{part}.npy"
                at_once = self.fixed.batch if part == "training" else _AT_ONCE  # as they will be used
                data.hidden[part] = prefix.hidden(windows.to(self.device), at_once, file)
        prefix.replace()
        self._prefix = prefix

    def step(self, step: int, data: Windows) -> float:
        """Take one step; the loss before it."""
        import torch

        rows = slice(step * self.fixed.batch, (step + 1) * self.fixed.batch)
        self._use(data, "training", rows)
        for group, lr in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = lr * min(1.0, (step + 1) / _WARM_UP)
        loss = self.loss(data.training[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def measured(self, part: str, data: Windows) -> float:
        """The mean loss of held-out windows, or of those of the base's text; infinite where it is no number."""
        import torch

        windows, total = getattr(data, part), 0.0
        for start in range(0, len(windows), _AT_ONCE):
            rows = slice(start, start + _AT_ONCE)
            self._use(data, part, rows)
            with torch.no_grad():
                total += self.loss(windows[rows]).item() * len(windows[rows])
        return round(total / len(windows), 5) if math.isfinite(total) else math.inf

    def _use(self, data: Windows, part: str, rows: slice) -> None:
        if self._prefix is not None:
            self._prefix.use(data.hidden[part][rows])


def _largest_file(work: Path) -> int:
    """The largest size of a file of hidden states, in bytes: a fifth of the free space."""
    import shutil

    return shutil.disk_usage(work).free // 5
