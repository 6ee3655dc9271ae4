"""Unions of tokenizers: ids, and how texts are encoded, judged by the tokenizers library."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import TEXT, train_tokenizer

from deus_merge.core.errors import PlanError
from deus_merge.models.tokenizer.union import Named, limited, tokens_of, united, with_tokens

OTHER = "many tokens have rows of their own; whose rows are the tokens of a union, and whose own?\n" * 3
WORDS = st.lists(st.sampled_from((TEXT + OTHER).split()), max_size=6).map(" ".join)
KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")


def data(tokenizer) -> dict:
    return json.loads(tokenizer.to_str())


def union(*sources) -> dict:
    return united([Named(f"model {i}", data(s)) for i, s in enumerate(sources)])


def loaded(combined: dict) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(combined))


def spelled(tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text).tokens


@pytest.fixture(scope="module")
def pair():
    """Two tokenizers of other texts, and their union."""
    two = train_tokenizer(size=130), train_tokenizer(text=OTHER, size=120, special=["</s>", "<s>"], more=["<|x|>"])
    return *two, loaded(union(*two))


@settings(deadline=None, max_examples=50)
@given(text=WORDS | st.text("aeiou rstTm.", max_size=20))
def test_what_all_encode_alike_the_union_encodes_alike(pair, text):
    one, two, both = pair
    assert both.decode(both.encode(text).ids) == text
    assume(spelled(one, text) == spelled(two, text))
    assert spelled(both, text) == spelled(one, text)


@settings(deadline=None, max_examples=50)
@given(text=WORDS)
def test_a_source_that_extends_the_first_is_reproduced(text):
    shorter = data(train_tokenizer(size=100))
    longer = data(train_tokenizer(size=135, more=["<|x|>"]))
    assert longer["model"]["merges"][: len(shorter["model"]["merges"])] == shorter["model"]["merges"]
    both = united([Named("shorter", shorter), Named("longer", longer)])
    assert spelled(loaded(both), f"{text}<|x|>{text}") == spelled(loaded(longer), f"{text}<|x|>{text}")
    assert tokens_of(both).keys() == tokens_of(longer).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_a_union(kind):
    """The first one's tokens keep their ids; then come the tokens of the others' models, then their added tokens."""
    one = train_tokenizer(kind, size=70, more=["<|a|>"])
    two = train_tokenizer(kind, OTHER, 60, special=["</s>", "<s>"], more=["<|b|>", "<|a|>"])
    three = train_tokenizer(kind, OTHER + TEXT, 70, more=["<|c|>"])
    combined = union(one, two, three)
    ids, mine = tokens_of(combined), one.get_vocab()
    assert {token: i for token, i in ids.items() if token in mine} == mine
    assert sorted(ids.values()) == list(range(len(ids)))
    assert ids.keys() == mine.keys() | two.get_vocab().keys() | three.get_vocab().keys()
    new = list(ids)[len(mine) :]
    assert new[-2:] == ["<|b|>", "<|c|>"]
    fresh = [[t for t in tokens_of(data(s)) if t in new[:-2]] for s in (two, three)]
    assert new[:-2] == list(dict.fromkeys(fresh[0] + fresh[1]))
    both = loaded(combined)
    assert both.get_vocab() == ids  # the library gives them the ids that we say
    assert both.encode("<|b|>").ids == [ids["<|b|>"]] and both.encode("<|a|>").ids == [mine["<|a|>"]]
    word = "whose"
    assert "".join(spelled(both, word)).replace("##", "") == word


def test_nothing_new_is_the_very_same():
    one, two = data(train_tokenizer(size=110, more=["<|a|>"])), data(train_tokenizer(size=105))
    assert united([Named("one", one), Named("two", two)]) is one
    assert limited(one, 111) is one and with_tokens(one, ["<|a|>", "<s>"]) is one


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_tokenizer(kind):
    """Tokens beyond the rows go, with the merges that need them."""
    whole = train_tokenizer(kind, size=80, more=["<|a|>", "<|b|>"])
    for rows in (whole.get_vocab_size() - 1, whole.get_vocab_size() - 12):
        part = loaded(limited(data(whole), rows))
        assert part.get_vocab() == {token: i for token, i in whole.get_vocab().items() if i < rows}
        assert all(i < rows for i in part.encode(TEXT).ids)


def test_added_tokens_keep_their_settings():
    """Those of the first model that has them; a token of the first that is an added token elsewhere becomes one."""
    one, two = train_tokenizer(size=130), train_tokenizer(text=OTHER, size=60)
    token = next(t for t in tokens_of(data(one)) if len(t) > 3 and t[0].isascii() and t not in two.get_vocab())
    two.add_tokens([tokenizers.AddedToken("<|x|>", lstrip=True, normalized=False), token])
    combined = union(one, two)
    entry = next(t for t in combined["added_tokens"] if t["content"] == "<|x|>")
    assert entry["lstrip"] and not entry["normalized"] and not entry["special"]
    both = loaded(combined)
    assert both.encode("a   <|x|>").offsets == two.encode("a   <|x|>").offsets == [(0, 1), (1, 9)]
    assert both.token_to_id(token) == one.token_to_id(token)
    assert spelled(both, f"x{token}x") == spelled(two, f"x{token}x") == ["x", token, "x"]


def test_other_kinds_have_no_union():
    one, two = train_tokenizer(size=100), train_tokenizer("WordPiece", OTHER, 60)
    with pytest.raises(PlanError) as caught:
        union(one, two)
    message = str(caught.value)
    assert "model 1: tokenizers of different kinds" in message and "BPE over bytes, as that of model 0" in message
    assert "WordPiece over characters with continuing_subword_prefix '##'" in message
    known = train_tokenizer("WordPiece", "o", 4)  # where it has nothing new, its kind does not matter
    assert union(train_tokenizer("WordLevel", "o", 4), known)["model"]["type"] == "WordLevel"
