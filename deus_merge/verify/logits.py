"""Base and output over one text, with one block of weights in memory at a time.

transformers builds the model without weights and runs its own forward pass, with its own masks and rotary embeddings.
Each decoder layer, the embeddings, the norm and the head get their weights from the file just before they run and give
them back right after, so what comes out is bit for bit what the whole model computes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.reader import Checkpoint
from ..models.tokenizer.files import TOKENIZER_FILES
from ..models.view import ModelView, prefix_of, view_model
from .transformers_model import build

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_TOKENS = 256


def compare(base_folder: Path, folder: Path, text: str, *, equal: bool) -> tuple[bool | None, str, dict]:
    """Logits and loss of base and output over a text, both in float32.

    Args:
        base_folder: The base.
        folder: The output; its tokenizer reads the text.
        text: The first 256 tokens of it count.
        equal: Whether they must be equal bit for bit.

    Returns:
        Whether the output is as it should be, in words, and as numbers.
    """
    import torch
    import transformers

    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None, "the folder has no tokenizer to read the text with", {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=_TOKENS)["input_ids"]  # (1, tokens)
    if ids.numel() < 2:
        return False, "the text has fewer than two tokens: nothing was compared", {}
    notes, both, losses = [], [], []
    for name, place in (("base", base_folder), ("output", folder)):
        logits, note = run(place, ids)  # (tokens, vocabulary)
        notes += [f"{name} loaded whole: {note}"] if note else []
        if int(ids.max()) >= logits.shape[1]:
            return None, f"the text has tokens that the {name} has no row for", {}
        both.append(logits)
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).item())
    width = min(logits.shape[1] for logits in both)
    same, largest = torch.equal(*both), (both[0][:, :width] - both[1][:, :width]).abs().max().item()
    numbers = {"tokens": ids.numel(), "loss_base": losses[0], "loss": losses[1], "largest_difference": largest}
    facts = {"equal": same} | {name: n if math.isfinite(n) else None for name, n in numbers.items()}
    verdict = "equal bit for bit" if same else f"largest difference {largest:.3g}"
    told = f"{verdict} on {ids.numel()} tokens, loss {losses[0]:.4f} (base) and {losses[1]:.4f}"
    finite = bool(torch.isfinite(both[1]).all())
    return finite and (same or not equal), "; ".join([told, *notes]), facts


def run(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, str | None]:
    """A model's logits in float32.

    Args:
        folder: The checkpoint.
        ids: (1, tokens).

    Returns:
        (tokens, vocabulary); and why the model had to be loaded whole, None if it had not.
    """
    import torch
    import transformers

    with Checkpoint.open(folder) as checkpoint, torch.no_grad():
        view = view_model(checkpoint.config, tuple(checkpoint.tensors), folder)
        model = build(checkpoint).eval()
        problem = _stream(model, view, checkpoint)
        if problem:
            load = transformers.AutoModelForCausalLM.from_pretrained
            model = load(folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True).eval()
        return model(ids, use_cache=False).logits[0], problem


def _stream(model: PreTrainedModel, view: ModelView, checkpoint: Checkpoint) -> str | None:
    """Let each part of a model without weights fetch them when it is called. Returns why that cannot be done."""
    stored = _stored_names(model, checkpoint)
    if view.family is None:
        return f"family {view.model_type!r} is not described"
    if model.state_dict().keys() != stored.keys():
        return "transformers names its tensors otherwise"
    if not _make_buffers(model):
        return "transformers does not make its buffers anew"
    layers = {prefix_of(i, view.layer_prefix).rstrip(".") for i in range(view.num_layers)}
    for name, module in model.named_modules():
        if name in layers:
            _fetch_when_called(module, dict(module.named_modules(prefix=name)), stored, checkpoint)
        elif not any(name.startswith(f"{layer}.") for layer in layers):
            _fetch_when_called(module, {name: module}, stored, checkpoint)
    return None


def _stored_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Each parameter's tensor in the checkpoint: its own, or that of the one it is tied to."""
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    stored = {}
    for names in tied.values():
        there = [name for name in names if name in checkpoint.tensors]
        stored |= {name: name if name in there else there[0] for name in names if there}
    return stored


def _make_buffers(model: PreTrainedModel) -> bool:
    """What a checkpoint does not hold (rotary frequencies), made as transformers makes it when it loads a model.

    Returns:
        Whether all of it was made.
    """
    import torch

    made = []
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers[name]) is not None:
                if not buffer.is_floating_point():
                    return False
                module._buffers[name] = torch.full_like(buffer, torch.nan, device="cpu")
                made.append(module._buffers[name])
    model.initialize_weights()  # of parameters, which have no memory, this makes nothing
    return not any(bool(buffer.isnan().any()) for buffer in made)


def _fetch_when_called(
    module: torch.nn.Module, owners: dict[str, torch.nn.Module], stored: dict[str, str], checkpoint: Checkpoint
) -> None:
    """Hooks that put the weights of modules, by name, in their place before one of them runs, and away after."""
    import torch

    weights = [
        (owner, key, stored[f"{name}.{key}" if name else key])
        for name, owner in owners.items()
        for key, parameter in owner._parameters.items()
        if parameter is not None
    ]
    empty = [owner._parameters[key] for owner, key, _ in weights]

    def fetch(*_) -> None:
        for owner, key, tensor in weights:
            # A copy in memory of its own, as aligned as the whole model's would be.
            value = checkpoint.read(tensor).to(torch.float32, copy=True)
            owner._parameters[key] = torch.nn.Parameter(value, requires_grad=False)

    def drop(*_) -> None:
        for (owner, key, _), parameter in zip(weights, empty, strict=True):
            owner._parameters[key] = parameter

    module.register_forward_pre_hook(fetch)
    module.register_forward_hook(drop)
