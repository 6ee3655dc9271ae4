"""Pure functions that reduce, extend and unite parsed tokenizer.json files.

The union keeps the first tokenizer's ids. The tokens that only other sources have follow: first the tokens of their
models, then their added tokens, source by source in the order of their ids. This is mergekit's order. In mergekit every
new token matches its spelling anywhere in a text, which splits words of the first tokenizer; here a token of another
source's model is added to the model of the union, and its merges follow all merges of earlier sources. Therefore the
union encodes a text in the same way as the sources if they agree on it, and a source that extends the first one is
reproduced.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from ...core.errors import PlanError
from ..reference import ModelRef
from .files import Json, model_tokens

#: the fields that `tokenizers.AddedToken` gives a plain string
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


@dataclass(frozen=True)
class Named:
    """A parsed tokenizer.json and its model, for messages.

    Attributes:
        model: The recipe's reference to the model.
        data: The parsed file.
    """

    model: ModelRef
    data: Json

    @property
    def tokens(self) -> dict[str, int]:
        """Its tokens with their ids, from `tokens_of`."""
        return tokens_of(self.data)


def tokens_of(data: Json) -> dict[str, int]:
    """Every token of a tokenizer.json -> id, in the order of ids."""
    found = dict(model_tokens(data["model"])) | {t["content"]: t["id"] for t in data["added_tokens"]}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def limited(data: Json, rows: int) -> Json:
    """The tokenizer without tokens whose id is ``rows`` or more; the same object if it has no such token."""
    if max(tokens_of(data).values(), default=0) < rows:
        return data
    model = dict(data["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = model["vocab"][:rows]
    else:
        model["vocab"] = {token: i for token, i in model["vocab"].items() if i < rows}
    if "merges" in model:
        model["merges"] = [m for m in model["merges"] if _within(m, model["vocab"], model)]
    return {**data, "added_tokens": [t for t in data["added_tokens"] if t["id"] < rows], "model": model}


def united(sources: Sequence[Named]) -> Json:
    """The union of tokenizers; the first one's object itself if it has the tokens of all others.

    Raises:
        PlanError: tokens would have to be added from a model of another kind.
    """
    first = sources[0]
    known = first.tokens
    added: dict[str, dict] = {}
    for source in sources:
        for token in source.data["added_tokens"]:
            added.setdefault(token["content"], token)
    fresh: dict[str, float | None] = {}  # token -> its score; only Unigram models have scores
    merges: list = []
    for source in sources[1:]:
        scores = _scores(source.data["model"])
        new = [t for t in source.tokens if t not in known and t not in added and t not in fresh]
        if not new:
            continue
        if kind(source.data) != kind(first.data):
            raise PlanError(
                "tokenizers of different kinds have no union",
                where=source.model,
                expected=f"{kind(first.data)}, as that of {first.model}",
                got=kind(source.data),
                hint="tokenizer_source: base takes only the base model's tokens",
            )
        fresh |= {token: scores.get(token) for token in new}
        merges += source.data["model"].get("merges", ())
    known_added = {t["content"] for t in first.data["added_tokens"]}
    return extended(first.data, fresh, merges, [t for content, t in added.items() if content not in known_added])


def with_tokens(data: Json, tokens: Sequence[str]) -> Json:
    """The tokenizer with these added tokens; the same object if it has them all."""
    known = tokens_of(data)
    return extended(data, {}, (), [{"content": t, **_PLAIN} for t in tokens if t not in known])


def extended(data: Json, fresh: Mapping[str, float | None], merges: Sequence, added: Sequence[Json]) -> Json:
    """A tokenizer with more tokens, which follow the existing ones; the same object if there are none.

    Args:
        data: The tokenizer.
        fresh: New tokens of its model, with scores for Unigram.
        merges: Merges that produce them, where the model is BPE; merges of unknown tokens are left out.
        added: Entries of ``added_tokens``. Their ids are ignored, and known tokens keep their ids.
    """
    if not fresh and not added:
        return data
    known = tokens_of(data)
    free = max(known.values(), default=-1) + 1
    joining = {token: free + i for i, token in enumerate(fresh)}
    free += len(joining)
    entries = list(data["added_tokens"])
    for entry in added:
        at = known.get(entry["content"], free)
        free += at == free
        entries.append({"id": at, **{k: v for k, v in entry.items() if k != "id"}})
    entries.sort(key=lambda entry: entry["id"])
    model = dict(data["model"])
    vocab = model_tokens(model) | joining
    if not _natural(len(vocab), vocab, entries):
        vocab |= {entry["content"]: entry["id"] for entry in entries}
    if isinstance(model["vocab"], list):
        model["vocab"] = _unigram_entries(model["vocab"], vocab, fresh)
    else:
        model["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
    if "merges" in model:
        existing = set(map(_pair, model["merges"]))
        more = [m for m in dict.fromkeys(map(_pair, merges)) if m not in existing and _within(m, vocab, model)]
        model["merges"] = [list(_pair(m)) for m in model["merges"]] + [list(m) for m in more]
    return {**data, "added_tokens": entries, "model": model}


def kind(data: Json) -> str:
    """A description of the properties in which models must agree for tokens to be added."""
    model = data["model"]
    alphabet = "bytes" if _has_part(data.get("pre_tokenizer"), "ByteLevel") else "characters"
    affixes = [f" with {k} {model[k]!r}" for k in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(k)]
    return f"{model['type']} over {alphabet}{''.join(affixes)}"


def _has_part(part: Json | None, name: str) -> bool:
    """Whether a pre-tokenizer is of this type or contains one of this type."""
    if not part:
        return False
    return part.get("type") == name or any(_has_part(p, name) for p in part.get("pretokenizers", ()))


def _natural(size: int, vocab: Mapping[str, int], entries: Sequence[Json]) -> bool:
    """Whether the tokenizers library gives added tokens the intended ids although they are not in the model.

    The library takes the ids of tokens that are in the model, and gives every other token the next free id as it reads
    them.
    """
    highest = -1
    for entry in entries:
        at = vocab.get(entry["content"], highest + 1 if highest >= size else size)
        if at != entry["id"]:
            return False
        highest = max(highest, at)
    return True


def _unigram_entries(entries: list, vocab: Mapping[str, int], scores: Mapping[str, float | None]) -> list:
    """A Unigram model's entries in the order of ids. Added tokens get the lowest score, since they are matched before
    the model is applied."""
    lowest = min(score for _, score in entries)
    ordered = sorted(vocab.items(), key=lambda item: item[1])
    return entries + [[token, scores.get(token, lowest)] for token, at in ordered if at >= len(entries)]


def _scores(model: Json) -> dict[str, float]:
    return dict(model["vocab"]) if isinstance(model["vocab"], list) else {}


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """The two parts of a merge, which files write as ``"a b"`` or ``["a", "b"]``."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _within(merge: str | Sequence[str], vocab: Container[str], model: Json) -> bool:
    """Whether the parts and the result of a merge are tokens of the model."""
    left, right = _pair(merge)
    merged = left + right[len(model.get("continuing_subword_prefix") or "") :]
    return left in vocab and right in vocab and merged in vocab
