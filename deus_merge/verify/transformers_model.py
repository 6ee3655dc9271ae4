"""Checks an output in transformers: its tokenizer against the embeddings, and the model without its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..checkpoint.reader import Checkpoint
from ..models.tokenizer.files import TOKENIZER_FILES
from ..models.tokenizer.tokenizer import tokens_digest
from ..models.view import ModelView
from ..report.manifest import Manifest

if TYPE_CHECKING:
    import transformers

_EMBEDDINGS = re.compile(r"embed_tokens|embed_in|tok_embeddings|word_embeddings|wte")


def tokenizer(checkpoint: Checkpoint, view: ModelView, manifest: Manifest) -> tuple[bool | None, str]:
    """Check that every token has a row in the embeddings, and the id that was planned.

    Returns:
        Whether it has (None: not known), and a detail.
    """
    if not any(name in manifest.files for name in TOKENIZER_FILES):
        return True, "the output has no tokenizer"
    if not any((checkpoint.folder / name).exists() for name in TOKENIZER_FILES):
        return None, "the folder has no tokenizer: tokenizer.save_pretrained(folder) puts it there"
    import transformers

    try:
        vocabulary = transformers.AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False).get_vocab()
    except (ImportError, ValueError) as error:  # it may need a package that is not installed
        return None, f"transformers cannot load it here: {' '.join(str(error).split())}"
    planned = manifest.vocabulary
    if planned and tokens_digest(vocabulary) != planned["digest"]:
        return False, f"its {len(vocabulary)} tokens are not the {planned['tokens']} planned, or have other ids"
    name = next((n for n in view.before if _EMBEDDINGS.search(n)), None)
    if name is None:
        return None, "no tensor is named like embeddings"
    rows, (last, token) = checkpoint.tensors[name].shape[0], max((i, token) for token, i in vocabulary.items())
    if last >= rows:
        return False, f"token {token!r} has number {last}, {name} has {rows} rows"
    return True, f"{len(vocabulary)} tokens for {rows} rows of {name}"


def transformers_model(
    checkpoint: Checkpoint, view: ModelView, checksums: Mapping[str, str]
) -> tuple[bool | None, str]:
    """Check that transformers builds this model with exactly these names and shapes, and that tied tensors are equal.

    Args:
        checkpoint: The output.
        view: The output by layer and role.
        checksums: Of its tensors, by name.

    Returns:
        Whether it does (None: not known), and a detail.
    """
    model = build(checkpoint)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: info.shape for name, info in checkpoint.tensors.items()}
    if getattr(model.config, "tie_word_embeddings", False):
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        names = {id(m): f"{name}.weight" for name, m in model.named_modules()}
        head, embeddings = names.get(id(head), ""), names.get(id(embeddings), "")
        if head in found and checksums[head] != checksums.get(embeddings):
            return False, f"config.json ties the embeddings, but {head} is not equal to {embeddings}"
        expected.pop(head, None)
        found.pop(head, None)
    wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    if not wrong:
        return True, f"{type(model).__name__}, {len(expected)} names and shapes"
    if not view.described:
        return None, f"family {view.model_type!r} is not described, and transformers may name its tensors otherwise"
    name = wrong[0]
    return False, f"{len(wrong)} differ, first {name}: {expected.get(name)} expected, {found.get(name)} found"


def build(checkpoint: Checkpoint) -> transformers.PreTrainedModel:
    """The model on the meta device: modules, names and shapes, no weights. For float32."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    with torch.device("meta"):
        try:
            return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        except ValueError:  # no language model alone: one with eyes, or an encoder
            kind = getattr(transformers, next(iter(config.architectures or ()), ""), None)
            if kind is None:
                raise
            return kind(config)
