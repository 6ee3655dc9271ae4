"""Models with tied and with untied heads in one merge."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from ..checkpoint.untied import UntiedSource, says_tied, tie
from .config_json import Config
from .source import SourceModel
from .view import view_model

_HEAD = re.compile(r"(?:.+\.)?(?:lm_head|embed_out)\.weight")
_EMBEDDINGS = re.compile(
    r"(?:.+\.)?(?:embed_tokens|embed_in|wte|word_embeddings|tok_embeddings|embeddings|embed|shared)\.weight"
)


def with_heads(models: Sequence[SourceModel]) -> list[SourceModel]:
    """Models whose heads are merged: where some have a head of their own and some are tied to their embeddings, all get
    one; the embeddings of a tied model are its head.

    Args:
        models: The models of one merge.

    Returns:
        The same models, or the tied ones with a head and a config that says so.
    """
    heads = {name: None for m in models for name in (*m.view.before, *m.view.after) if _HEAD.fullmatch(name)}
    if len(heads) != 1:
        return list(models)
    head = next(iter(heads))
    tied = [head not in m.checkpoint.tensors or says_tied(m.checkpoint.config) is True for m in models]
    if all(tied) and len({head in m.checkpoint.tensors for m in models}) == 1:
        return list(models)
    return [_with_head(m, head) if is_tied else m for m, is_tied in zip(models, tied, strict=True)]


def config_of_heads(config: Config, donor: SourceModel, written: Sequence[tuple[str, Sequence[SourceModel]]]) -> Config:
    """The output's config.json with what it must say about the head.

    Args:
        config: The output's config.json.
        donor: The model whose config it is.
        written: Every tensor outside of layers: its name in the output, and the models it is made from.
    """
    sources = [models for name, models in written if _HEAD.fullmatch(name)]
    own = any(says_tied(model.checkpoint.config) is False for models in sources for model in models)
    if own and says_tied(config) is not False:
        return tie(config, False)
    lost = not sources and any(_HEAD.fullmatch(name) for name in donor.checkpoint.tensors)
    if lost and any(_EMBEDDINGS.fullmatch(name) for name, _ in written):
        return tie(config, True)  # the embeddings are those of tied models
    return config


def _with_head(model: SourceModel, head: str) -> SourceModel:
    found = [n for n in model.view.before if _EMBEDDINGS.fullmatch(n)]
    if len(found) != 1:
        return model
    source = UntiedSource(model.checkpoint, head, found[0])
    view = view_model(source.config, tuple(source.tensors), source.where)
    return replace(model, checkpoint=source, view=view)
