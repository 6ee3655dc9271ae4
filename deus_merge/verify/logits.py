"""Compares the logits of base and output on a text, with one block of weights in memory at a time.

transformers builds the model without weights and runs its own forward pass, with its own masks and rotary embeddings.
Each decoder layer, the embeddings, the norm and the head load their weights from the file just before they run and drop
them right after, so the logits are bit for bit those of the whole model.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.reader import Checkpoint
from ..models.tokenizer.files import TOKENIZER_FILES
from ..models.view import ModelView, prefix_of, view_model
from .transformers_model import build_language_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_TOKENS = 256


def compare(base_folder: Path, folder: Path, text: str, *, equal: bool) -> tuple[bool | None, str, dict]:
    """Compare logits and loss of base and output on a text, both in float32.

    Args:
        base_folder: The base.
        folder: The output; its tokenizer is used for the text.
        text: The text; its first 256 tokens are used.
        equal: Whether the logits must be equal bit for bit.

    Returns:
        Whether the output passes (None: it cannot be checked), a detail in words, and the measured numbers.
    """
    import torch
    import transformers

    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None, "the folder has no tokenizer to read the text with", {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=_TOKENS)["input_ids"]  # (1, tokens)
    if ids.numel() < 2:
        return False, "the text has fewer than two tokens: nothing was compared", {}
    notes: list[str] = []
    both: list[torch.Tensor] = []  # (tokens, vocabulary) each
    losses: list[float] = []
    for name, place in (("base", base_folder), ("output", folder)):
        logits, note = run(place, ids)  # (tokens, vocabulary)
        notes += [f"{name} loaded whole: {note}"] if note else []
        if int(ids.max()) >= logits.shape[1]:
            return None, f"the text has tokens that the {name} has no row for", {}
        both.append(logits)
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).item())
    width = min(logits.shape[1] for logits in both)
    same = torch.equal(both[0], both[1])
    largest = (both[0][:, :width] - both[1][:, :width]).abs().max().item()
    numbers = {"tokens": ids.numel(), "loss_base": losses[0], "loss": losses[1], "largest_difference": largest}
    facts = {"equal": same} | {name: n if math.isfinite(n) else None for name, n in numbers.items()}
    verdict = "equal bit for bit" if same else f"largest difference {largest:.3g}"
    summary = f"{verdict} on {ids.numel()} tokens, loss {losses[0]:.4f} (base) and {losses[1]:.4f}"
    finite = bool(torch.isfinite(both[1]).all())
    return finite and (same or not equal), "; ".join([summary, *notes]), facts


def run(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, str | None]:
    """Compute a model's logits in float32.

    Args:
        folder: The checkpoint.
        ids: Token ids, (1, tokens).

    Returns:
        The logits, (tokens, vocabulary); and the reason why the model was loaded whole, None if it was streamed.
    """
    import torch
    import transformers

    with Checkpoint.open(folder) as checkpoint, torch.no_grad():
        view = view_model(checkpoint.config, tuple(checkpoint.tensors), folder)
        model = build_language_model(checkpoint)
        reason = _stream(model, view, checkpoint)
        if reason:
            load = transformers.AutoModelForCausalLM.from_pretrained
            model = load(folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True).eval()
        return model(ids, use_cache=False).logits[0], reason


def _stream(model: PreTrainedModel, view: ModelView, checkpoint: Checkpoint) -> str | None:
    """Make each part of a model without weights load them when it is called.

    Returns:
        None, or the reason why that is not possible.
    """
    stored = _stored_names(model, checkpoint)
    if view.family is None:
        return f"family {view.model_type!r} is not described"
    if model.state_dict().keys() != stored.keys():
        return "transformers gives its tensors other names"
    if not _initialise_buffers(model):
        return "transformers does not initialise its buffers"
    layers = {prefix_of(i, view.layer_prefix).rstrip(".") for i in range(view.num_layers)}
    for name, module in model.named_modules():
        if name in layers:
            _fetch_when_called(module, dict(module.named_modules(prefix=name)), stored, checkpoint)
        elif not any(name.startswith(f"{layer}.") for layer in layers):
            _fetch_when_called(module, {name: module}, stored, checkpoint)
    return None


def _stored_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """The checkpoint's tensor for each parameter: its own, or that of a parameter that it is tied to."""
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    stored = {}
    for names in tied.values():
        present = [name for name in names if name in checkpoint.tensors]
        stored |= {name: name if name in present else present[0] for name in names if present}
    return stored


def _initialise_buffers(model: PreTrainedModel) -> bool:
    """Initialise the buffers that a checkpoint does not hold (rotary frequencies), as transformers does at loading.

    Returns:
        Whether all were initialised.
    """
    import torch

    buffers = []
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers[name]) is not None:
                if not buffer.is_floating_point():
                    return False
                module._buffers[name] = torch.full_like(buffer, torch.nan, device="cpu")
                buffers.append(module._buffers[name])
    model.initialize_weights()  # has no effect on parameters, which have no memory
    return not any(bool(buffer.isnan().any()) for buffer in buffers)


def _fetch_when_called(
    module: torch.nn.Module, owners: dict[str, torch.nn.Module], stored: dict[str, str], checkpoint: Checkpoint
) -> None:
    """Add hooks that load the weights of modules, by name, before one of them runs, and drop them afterwards."""
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
            # A copy with its own memory, aligned as in the whole model.
            value = checkpoint.read(tensor).to(torch.float32, copy=True)
            owner._parameters[key] = torch.nn.Parameter(value, requires_grad=False)

    def drop(*_) -> None:
        for (owner, key, _), parameter in zip(weights, empty, strict=True):
            owner._parameters[key] = parameter

    module.register_forward_pre_hook(fetch)
    module.register_forward_hook(drop)
