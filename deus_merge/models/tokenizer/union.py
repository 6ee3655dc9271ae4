"""tokenizer.json, cut down and added to: pure functions on the parsed file.

The union keeps the first tokenizer's ids. Behind them come the tokens that only others have, first those of their
models, then their added tokens, source by source in the order of their ids. That is mergekit's order. mergekit lets
every new token match its spelling anywhere in a text, though, which cuts words of the first tokenizer apart; here a
token of another's model joins the model of the union, with its merges behind all merges that are there already. So what
all sources encode alike the union encodes in the same way, and a source that extends the first one is reproduced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...core.errors import PlanError
from .files import model_tokens

#: what `tokenizers.AddedToken` makes of a plain string
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


@dataclass(frozen=True)
class Named:
    """A parsed tokenizer.json and the model it belongs to, for messages."""

    model: object
    data: Mapping

    @property
    def tokens(self) -> dict[str, int]:
        """Every token -> id."""
        return tokens_of(self.data)


def tokens_of(data: Mapping) -> dict[str, int]:
    """Every token of a tokenizer.json -> id, in the order of ids."""
    found = dict(model_tokens(data["model"])) | {t["content"]: t["id"] for t in data["added_tokens"]}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def limited(data: Mapping, rows: int) -> Mapping:
    """The tokenizer without tokens whose id is not below ``rows``; the same object where it has none."""
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


def united(sources: Sequence[Named]) -> Mapping:
    """The union of tokenizers; the first one's very object where the others have nothing that it lacks.

    Raises:
        PlanError: tokens of another kind of model would have to join the first one's.
    """
    first = sources[0]
    known = first.tokens
    added: dict[str, dict] = {}
    for source in sources:
        for token in source.data["added_tokens"]:
            added.setdefault(token["content"], token)
    fresh: dict[str, float | None] = {}  # token -> its score, which only Unigram models have
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
                hint="tokenizer_source: base keeps the base model's tokens alone",
            )
        fresh |= {token: scores.get(token) for token in new}
        merges += source.data["model"].get("merges", ())
    known_added = {t["content"] for t in first.data["added_tokens"]}
    return extended(first.data, fresh, merges, [t for content, t in added.items() if content not in known_added])


def with_tokens(data: Mapping, tokens: Sequence[str]) -> Mapping:
    """The tokenizer with these added tokens too; the same object where it has them all."""
    known = tokens_of(data)
    return extended(data, {}, (), [{"content": t, **_PLAIN} for t in tokens if t not in known])


def extended(data: Mapping, fresh: Mapping[str, float | None], merges: Sequence, added: Sequence[Mapping]) -> Mapping:
    """A tokenizer with more tokens, all behind those it has; the same object where there are none.

    Args:
        data: The tokenizer.
        fresh: Tokens that join its model; with scores for Unigram.
        merges: What makes them of others, where the model is BPE; merges of other tokens are left out.
        added: Entries of ``added_tokens``, whose ids are not looked at: known tokens keep theirs.
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
        model["vocab"] = _pieces(model["vocab"], vocab, fresh)
    else:
        model["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
    if "merges" in model:
        there = set(map(_pair, model["merges"]))
        more = [m for m in dict.fromkeys(map(_pair, merges)) if m not in there and _within(m, vocab, model)]
        model["merges"] = [list(_pair(m)) for m in model["merges"]] + [list(m) for m in more]
    return {**data, "added_tokens": entries, "model": model}


def kind(data: Mapping) -> str:
    """What must agree for tokens to join a model, in words."""
    model = data["model"]
    alphabet = "bytes" if _has_part(data.get("pre_tokenizer"), "ByteLevel") else "characters"
    affixes = [f" with {k} {model[k]!r}" for k in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(k)]
    return f"{model['type']} over {alphabet}{''.join(affixes)}"


def _has_part(part: Mapping | None, name: str) -> bool:
    """Whether a pre-tokenizer is, or contains, one of this type."""
    if not part:
        return False
    return part.get("type") == name or any(_has_part(p, name) for p in part.get("pretokenizers", ()))


def _natural(size: int, vocab: Mapping[str, int], entries: Sequence[Mapping]) -> bool:
    """Whether added tokens get the ids they shall have without standing in the model.

    The tokenizers library knows the ids of the model's tokens; to others it gives the next free one as it reads them.
    """
    highest = -1
    for entry in entries:
        at = vocab.get(entry["content"], highest + 1 if highest >= size else size)
        if at != entry["id"]:
            return False
        highest = max(highest, at)
    return True


def _pieces(pieces: list, vocab: Mapping[str, int], scores: Mapping[str, float | None]) -> list:
    """A Unigram model's pieces in the order of ids. Added tokens among them get the lowest score: they are found before
    the model is asked."""
    lowest = min(score for _, score in pieces)
    ordered = sorted(vocab.items(), key=lambda item: item[1])
    return pieces + [[token, scores.get(token, lowest)] for token, at in ordered if at >= len(pieces)]


def _scores(model: Mapping) -> dict[str, float]:
    return dict(model["vocab"]) if isinstance(model["vocab"], list) else {}


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """Both ways a merge is written: ``"a b"`` and ``["a", "b"]``."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _within(merge: str | Sequence[str], vocab: Mapping[str, int], model: Mapping) -> bool:
    """Whether a merge's parts and what it makes are tokens of the model."""
    left, right = _pair(merge)
    made = left + right[len(model.get("continuing_subword_prefix") or "") :]
    return left in vocab and right in vocab and made in vocab
