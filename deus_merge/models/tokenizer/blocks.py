"""Embeddings and head in a plan's blocks: tensors with one row per token, read in the order of the output's tokens."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ...checkpoint.reader import TensorSource
from ..config_json import Config, section
from ..reference import ModelRef
from ..view import ModelView
from .build import Member, Vocabulary, build_vocabulary
from .files import difference, mismatch_warning, quoted
from .permuted import Permuted, PermutedCheckpoint, permute
from .rows import RowMap, row_maps
from .settings import TokenizerSettings
from .special import set_vocabulary

_OTHER = re.compile(r"position|wpe|\.\d+\.")  # position embeddings, other stacks' layers
_HINT = "tokenizer_source: union or base combines vocabularies"


def vocabulary_tensors(checkpoint: TensorSource, view: ModelView) -> tuple[str, ...]:
    """The tensors outside a model's layers that have one row per token."""
    names = [n for n in (*view.before, *view.after) if not _OTHER.search(n)]
    rows = {n: shape[0] for n in names if len(shape := checkpoint.tensors[n].shape) == 2}
    sizes = (
        section(checkpoint.config, view.layers_path).get("vocab_size"),
        *(rows[n] for n in view.before if n in rows),
    )
    size = next((s for s in sizes if s in rows.values()), None)
    tables = [n for n in rows if rows[n] == size]
    return (*tables, *(n for n in names if n.endswith(".bias") and n.removesuffix("bias") + "weight" in tables))


def plan_vocabulary(
    settings: TokenizerSettings | None,
    models: Sequence[tuple[ModelRef, TensorSource, ModelView]],
    cache_dir: Path | None = None,
) -> VocabularyPlan:
    """Plan the output's tokens.

    Args:
        settings: The recipe's settings. With None the donor's tokenizer is copied and all rows stay in their order;
            mismatches that the tokenizers' files show are reported as warnings.
        models: Each model's reference, tensors and view, the donor first.
        cache_dir: The hub's cache; None for huggingface_hub's own.

    Raises:
        RecipeError, PlanError, CheckpointError: tokenizers, settings and embeddings do not fit together.
    """
    members = tuple(Member(model, found, vocabulary_tensors(found, view)) for model, found, view in models)
    if settings is None:
        donor = members[0]
        warning = mismatch_warning(donor.model, donor.checkpoint.side_files, donor.rows) if donor.tensors else None
        return VocabularyPlan(members, None, [warning] if warning else [])
    for member in members:
        if not member.tensors:
            settings.place.fail(f"{member.model} has no known embeddings", expected="a tensor with vocab_size rows")
    vocabulary = build_vocabulary(settings, members, cache_dir)
    return VocabularyPlan(members, vocabulary, list(vocabulary.warnings))


class VocabularyPlan:
    """The rows of every block's sources in the output's order; extended while blocks are planned.

    Attributes:
        vocabulary: The output's tokens; None when all rows stay in their order.
        warnings: The warnings so far.
    """

    def __init__(self, members: Sequence[Member], vocabulary: Vocabulary | None, warnings: list[str]):
        self.vocabulary, self.warnings = vocabulary, warnings
        self._members = members
        self._permuted: list[dict[str, Permuted]] = [{} for _ in members]
        self._maps: dict[str, list[dict]] = {}

    def reordered(
        self, sources: Sequence[int], names: Collection[str], base: int | None, title: str
    ) -> list[TensorSource]:
        """The sources of a block with their rows in the output's order.

        Args:
            sources: The models of the block's sources, as indices.
            names: The tensors of the block.
            base: The base model's index in ``sources``.
            title: The block's title, for messages.

        Returns:
            For each source, the checkpoint to read.

        Raises:
            PlanError: rows cannot be taken from a model.
        """
        models = list(dict.fromkeys(sources))  # a model that is named twice has the same rows both times
        tables = [[n for n in self._members[i].tensors if n in names] for i in models]
        if self.vocabulary is None:
            if any(tables):
                self._compare(models)
        else:
            maps, lost = row_maps(self.vocabulary, models, None if base is None else models.index(sources[base]))
            if lost and any(tables):
                self.warnings.append(f"{title}: no source has an embedding for {quoted(lost)}: rows of zeros")
            for i, own, rows in zip(models, tables, maps, strict=True):
                for name in own:
                    self._permute(name, i, models, rows)
        return [
            PermutedCheckpoint(self._members[i].checkpoint, self._permuted[i])
            if self._permuted[i]
            else self._members[i].checkpoint
            for i in sources
        ]

    def hint(self, sources: Sequence[int]) -> str | None:
        """Advice for embeddings of different shapes, if the numbers of tokens may be the cause."""
        rows = {m.rows for i in sources if (m := self._members[i]).tensors}
        return _HINT if self.vocabulary is None and len(rows) > 1 else None

    def _permute(self, name: str, member: int, sources: Sequence[int], rows: RowMap) -> None:
        permuted = permute(name, member, sources, rows, [m.checkpoint for m in self._members])
        if permuted is not None:
            self._permuted[member][name] = permuted
        self._maps.setdefault(name, []).append(rows.describe(member))

    def _compare(self, sources: Sequence[int]) -> None:
        """Warn of embeddings that are merged row by row although the rows belong to different tokens."""
        found = difference([self._members[i].checkpoint.side_files for i in sources])
        if found is None:
            return
        first, other = (self._members[sources[i]].model for i in (0, found[0]))
        warning = (
            f"embeddings are merged row by row, but at the ids of {quoted(found[1])} {other} has other tokens than"
            f" {first}; {_HINT}"
        )
        if warning not in self.warnings:
            self.warnings.append(warning)

    def config(self, config: Config, path: Sequence[str]) -> Config:
        """The output's config.json with the output's tokens; see `special.set_vocabulary`."""
        if self.vocabulary is None:
            return config
        config, warnings = set_vocabulary(config, path, self.vocabulary)
        self.warnings += warnings
        return config

    def describe(self) -> dict[str, Any] | None:
        """The tokenizer, the sizes, whether all rows stay in their order (``kept``), and the row maps of each tensor;
        JSON data, None without tokenizer settings."""
        found = self.vocabulary
        if found is None:
            return None
        return {
            "tokenizer": found.source,
            "tokens": len(found.tokens),
            "rows": found.rows,
            "digest": found.digest,
            "kept": not any(self._permuted),
            "maps": self._maps,
        }
