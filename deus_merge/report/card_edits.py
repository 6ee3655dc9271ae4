"""Model cards of models that were calibrated or trained: the card of the grown model with what is now true."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .card_metadata import join_card, split_card
from .manifest_parts import Calibration
from .model_card import OTHER, SAME, UNTRAINED

#: How the cards begin that trainers write themselves: those of transformers (and axolotl, LLaMA-Factory) and of trl.
_BY_TRAINER = ("This model card has been generated automatically according to the information the Trainer had",
               "It has been trained using [TRL]")  # fmt: skip
_PLACEHOLDER = "[More Information Needed]"  # of the hub's template, which peft and others save unfilled
_OURS = "Written by deus_merge "
_TRAINING_RUN = "## Training run, in the words of the trainer"
#: What a trainer's front matter knows that the grown model's does not.
_OF_TRAINER = ("datasets", "metrics", "model-index")


def _pattern(line: str) -> re.Pattern:
    before, after = line.split("{base}")
    return re.compile(rf"^{re.escape(before)}.*{re.escape(after)}$", re.MULTILINE)


_TRAINED = re.compile(r"^Its new layers [\d, ]+( and all others)? were trained after that.*$", re.MULTILINE)
_SAME, _OTHER, _UNTRAINED = map(_pattern, (SAME, OTHER, UNTRAINED))


def calibrated_card(card: str, record: Calibration) -> str:
    """A model card that says that the outputs of new layers were set, in place of that they add nothing.

    Args:
        card: The card of the model that was calibrated; its user may have edited it.
        record: The calibration.
    """
    set_layers = ", ".join(str(layer.layer) for layer in record.layers if layer.tensors)
    if not set_layers:
        return card
    text = (
        f"The outputs of its new layers {set_layers} were set in closed form ({record.method}) from {record.tokens}"
        f" tokens of a text, which count as training tokens. Loss of {record.held_out_tokens} tokens that were held"
        f" out to choose the step: {record.loss_before:.4f} before, {record.loss_after:.4f} after."
    )
    if _SAME.search(card):
        return _SAME.sub(lambda _: text, card, count=1)
    return f"{card.rstrip()}\n\n{text}\n"


def trained_card(card: str, theirs: str | None, new_layers: Sequence[int], *, base_trained: bool) -> str | None:
    """The card of a trained model; None where the one that is there should stay.

    Args:
        card: The card of the model that was trained.
        theirs: The card in the trained model's folder; None where there is none.
        new_layers: The layers that were added.
        base_trained: Whether the base was trained, too.

    Returns:
        The card. A card that a trainer generated is put below ours; one that somebody wrote stays.
    """
    front, run = split_card(theirs or "")
    generated = any(mark in run for mark in _BY_TRAINER)
    stub = not run.strip() or run.count(_PLACEHOLDER) > 2
    if not (generated or stub or _OURS in run):
        return None
    ours, body = split_card(theirs if theirs and _OURS in run else card)
    text = _trained_text(new_layers, base_trained)
    for pattern in (_SAME, _OTHER, _TRAINED):
        body, found = pattern.subn(lambda _: text, body, count=1)
        if found:
            break
    else:
        title, newline, rest = body.lstrip().partition("\n")
        title, rest = (title, rest) if title.startswith("# ") else ("", f"{title}{newline}{rest}")
        body = f"{title}\n\n{text}\n\n{rest.lstrip()}"
    body = _UNTRAINED.sub("- How well it was trained is not known here.", body)
    more: dict[str, Any] = {key: front[key] for key in _OF_TRAINER if generated and key in front}
    relation = {"base_model_relation": "finetune"} if "base_model" in ours else {}
    if generated:
        body = f"{body.rstrip()}\n\n{_TRAINING_RUN}\n\n{_plain_headings(run)}\n"
    return join_card({**ours, **relation, **more}, body)


def _trained_text(new_layers: Sequence[int], base_trained: bool) -> str:
    layers = ", ".join(map(str, new_layers))
    if base_trained:
        return f"Its new layers {layers} and all others were trained after that."
    return f"Its new layers {layers} were trained after that; all others are as they were."


def _plain_headings(body: str) -> str:
    """A card's text to be put below a heading: without comments and title, headings two levels down."""
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"^# .*$", "", body, count=1, flags=re.MULTILINE)
    return re.sub(r"^(#{1,4}) ", r"##\1 ", body, flags=re.MULTILINE).strip()
