"""The blocks of a plan that hold a row for each token: embeddings and head, brought into the output's order."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ...checkpoint.reader import TensorSource
from ..view import ModelView
from .build import Member, Vocabulary, build_vocabulary
from .files import difference, misfit, some
from .permuted import Permuted, PermutedCheckpoint, permute
from .rows import RowMap, row_maps
from .settings import TokenizerSettings
from .special import set_vocabulary

_OTHER = re.compile(r"position|wpe|\.\d+\.")  # position embeddings, other stacks' layers
_BRINGS = "tokenizer_source: union or base brings vocabularies together"


def vocabulary_tensors(checkpoint: TensorSource, view: ModelView) -> tuple[str, ...]:
    """The tensors outside of a model's layers that have a row for each token."""
    names = [n for n in (*view.before, *view.after) if not _OTHER.search(n)]
    rows = {n: shape[0] for n in names if len(shape := checkpoint.tensors[n].shape) == 2}
    section: Mapping = checkpoint.config
    for key in view.layers_path[:-1]:
        section = section[key]
    sizes = (section.get("vocab_size"), *(rows[n] for n in view.before if n in rows))
    size = next((s for s in sizes if s in rows.values()), None)
    tables = [n for n in rows if rows[n] == size]
    return (*tables, *(n for n in names if n.endswith(".bias") and n.removesuffix("bias") + "weight" in tables))


def plan_vocabulary(
    settings: TokenizerSettings | None,
    models: Sequence[tuple[object, TensorSource, ModelView]],
    cache_dir: Path | None = None,
) -> VocabularyPlan:
    """The output's tokens.

    Args:
        settings: What the recipe says of tokenizers. None: the donor's tokenizer is copied, and all rows stay as they
            are; what is wrong with that is told as far as files of tokenizers show it.
        models: Each model's name, tensors and view, the donor first.
        cache_dir: The hub's cache; None for where huggingface_hub keeps it.

    Raises:
        RecipeError, PlanError, CheckpointError: tokenizers, settings and embeddings do not go together.
    """
    members = tuple(Member(model, found, vocabulary_tensors(found, view)) for model, found, view in models)
    if settings is None:
        donor = members[0]
        told = misfit(donor.model, donor.checkpoint.side_files, donor.rows) if donor.tensors else None
        return VocabularyPlan(members, None, [told] if told else [])
    for member in members:
        if not member.tensors:
            settings.place.fail(f"no embeddings are known of {member.model}", expected="a tensor with vocab_size rows")
    vocabulary = build_vocabulary(settings, members, cache_dir)
    return VocabularyPlan(members, vocabulary, list(vocabulary.warnings))


class VocabularyPlan:
    """Which rows every block's sources have in the output's order; grows as blocks are planned.

    Attributes:
        vocabulary: The output's tokens; None when rows stay as they are.
        warnings: What the user should know so far.
    """

    def __init__(self, members: Sequence[Member], vocabulary: Vocabulary | None, warnings: list[str]):
        self.vocabulary, self.warnings = vocabulary, warnings
        self._members = members
        self._permuted: list[dict[str, Permuted]] = [{} for _ in members]
        self._maps: dict[str, list[dict]] = {}

    def reordered(
        self, sources: Sequence[int], names: Collection[str], base: int | None, title: str
    ) -> list[TensorSource]:
        """Bring the sources of a block into the output's order.

        Args:
            sources: The models of the block's sources.
            names: The tensors of the block.
            base: Which of the sources is the base model.
            title: Of the block, for messages.

        Returns:
            For each source the checkpoint to read from then on.

        Raises:
            PlanError: rows cannot be taken from a model.
        """
        tables = [[n for n in self._members[i].tensors if n in names] for i in sources]
        if self.vocabulary is None:
            if any(tables):
                self._compare(sources)
        else:
            maps, lost = row_maps(self.vocabulary, sources, base)
            if lost and any(tables):
                self.warnings.append(f"{title}: no source has an embedding for {some(lost)}: rows of zeros")
            for i, own, rows in zip(sources, tables, maps, strict=True):
                for name in own:
                    self._permute(name, i, sources, rows)
        return [
            PermutedCheckpoint(self._members[i].checkpoint, self._permuted[i])
            if self._permuted[i]
            else self._members[i].checkpoint
            for i in sources
        ]

    def hint(self, sources: Sequence[int]) -> str | None:
        """What to do where embeddings of these models have other shapes, if that may be for their tokens."""
        rows = {m.rows for i in sources if (m := self._members[i]).tensors}
        return _BRINGS if self.vocabulary is None and len(rows) > 1 else None

    def _permute(self, name: str, member: int, sources: Sequence[int], rows: RowMap) -> None:
        made = permute(name, member, sources, rows, [m.checkpoint for m in self._members])
        if made is not None:
            self._permuted[member][name] = made
        self._maps.setdefault(name, []).append(rows.describe(member))

    def _compare(self, sources: Sequence[int]) -> None:
        """Warn of embeddings that are merged row by row, though the rows are other tokens'."""
        found = difference([self._members[i].checkpoint.side_files for i in sources])
        if found is None:
            return
        first, other = (self._members[sources[i]].model for i in (0, found[0]))
        told = (
            f"embeddings are merged row by row, but at the ids of {some(found[1])} {other} has other tokens than"
            f" {first}; {_BRINGS}"
        )
        if told not in self.warnings:
            self.warnings.append(told)

    def config(self, config: Mapping, path: Sequence[str]) -> Mapping:
        """The output's config.json with the output's tokens; see `special.set_vocabulary`."""
        if self.vocabulary is None:
            return config
        config, told = set_vocabulary(config, path, self.vocabulary)
        self.warnings += told
        return config

    def describe(self) -> dict | None:
        """As JSON data: the tokenizer, the sizes, whether all rows are the donor's as they are stored (``kept``), and
        for each tensor where its sources' rows come from."""
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
