"""Compares the logits of base and output on a text, with one block of weights in memory at a time.

Each decoder layer, the embeddings, the norm and the head load their weights from the file just before they run and drop
them right after (`models.streamed`), so the logits are bit for bit those of the whole model.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.reader import Checkpoint
from ..models.streamed import CannotStream, StreamedModel
from ..models.tokenizer.files import TOKENIZER_FILES
from ..models.view import view_model
from .transformers_model import build_language_model

if TYPE_CHECKING:
    import torch

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
        model, reason = build_language_model(checkpoint), None
        try:
            streamed = StreamedModel(model, view, checkpoint)
            streamed.load_when_called((*streamed.layers, *streamed.others))
        except CannotStream as error:
            reason = str(error)
            load = transformers.AutoModelForCausalLM.from_pretrained
            model = load(folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True).eval()
        return model(ids, use_cache=False).logits[0], reason
