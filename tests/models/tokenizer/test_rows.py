"""The origin of rows and how they are read, compared with a few lines that compute the same slowly."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import make_model, weights

from deus_merge.checkpoint.flat import FlatRows
from deus_merge.checkpoint.reader import Checkpoint
from deus_merge.models.tokenizer.build import Chosen
from deus_merge.models.tokenizer.permuted import PermutedCheckpoint, permute
from deus_merge.models.tokenizer.rows import row_maps

EMBEDDINGS = "model.embed_tokens.weight"
STORED = (20, 23, 17)  # rows of the three models


@st.composite
def vocabularies(draw):
    """An output's rows, which of them have a token, where three models keep it, and what the recipe chooses."""
    rows = draw(st.integers(1, 30))
    used = sorted(draw(st.sets(st.integers(0, rows - 1), min_size=1)))
    own = np.full((3, rows), -1, dtype=np.int64)
    for model, count in enumerate(STORED):
        for at in used:
            own[model, at] = draw(st.integers(-1, count - 1))
    chosen = {}
    for at in draw(st.lists(st.sampled_from(used), max_size=3)):
        model = draw(st.sampled_from([None, 0, 1, 2]))
        chosen[at] = Chosen(model, draw(st.integers(0, 16)), draw(st.booleans()))
    tokens = {f"token {at}": at for at in used}
    return SimpleNamespace(rows=rows, tokens=tokens, own=own, chosen=chosen)


def expected(vocabulary, members: list[int], base: int | None, tables: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each member's rows by mergekit's rule, one at a time, in float64."""
    result = []
    for member in members:
        table = torch.zeros(vocabulary.rows, tables[0].shape[1], dtype=torch.float64)
        for at in vocabulary.tokens.values():
            has = [m for m in members if vocabulary.own[m, at] >= 0]
            chosen = vocabulary.chosen.get(at)
            row = {m: tables[m][vocabulary.own[m, at]].double() for m in has}
            if member in has and not (chosen and chosen.force):
                table[at] = row[member]
            elif chosen:
                table[at] = 0 if chosen.model is None else tables[chosen.model][chosen.row].double()
            elif base is not None and members[base] in has and len(has) > 1:
                table[at] = row[members[base]]
            elif has:
                table[at] = torch.stack(list(row.values())).mean(dim=0)
        rest = sorted(set(range(vocabulary.rows)) - set(vocabulary.tokens.values()))
        table[rest] = table[list(vocabulary.tokens.values())].mean(dim=0)
        result.append(table)
    return result


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    root = tmp_path_factory.mktemp("stored")
    folders = [make_model(root / str(i), layers=1, vocab_size=n, seed=i) for i, n in enumerate(STORED)]
    return [Checkpoint.open(f) for f in folders], [weights(f)[EMBEDDINGS] for f in folders]


@settings(deadline=None, max_examples=60)
@given(vocabulary=vocabularies(), data=st.data())
def test_rows_follow_the_rule(stored, vocabulary, data):
    checkpoints, tables = stored
    members = data.draw(st.permutations([0, 1, 2]).map(tuple) | st.sampled_from([(0,), (1, 0), (2, 1)]))
    base = data.draw(st.none() | st.integers(0, len(members) - 1))
    maps, lost = row_maps(vocabulary, members, base)
    wanted = expected(vocabulary, list(members), base, tables)
    for member, rows, want in zip(members, maps, wanted, strict=True):
        permuted = permute(EMBEDDINGS, member, members, rows, checkpoints)
        if permuted is None:
            assert torch.equal(tables[member].double(), want)
            continue
        source = PermutedCheckpoint(checkpoints[member], {EMBEDDINGS: permuted})
        info = source.tensors[EMBEDDINGS]
        whole = source.read(EMBEDDINGS)
        assert info.derived and info.shape == whole.shape == want.shape
        assert torch.allclose(whole.double(), want, atol=1e-7)
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, vocabulary.rows)] * 2)))
        assert torch.equal(source.slice(EMBEDDINGS, start, stop), whole[start:stop])
        flat = FlatRows(partial(source.slice, EMBEDDINGS), info)
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, whole.numel())] * 2)))
        assert torch.equal(flat[start:stop], whole.reshape(-1)[start:stop])
        counts = rows.describe(member)
        assert sum(counts[k] for k in ("own", "taken", "zero", "mean", "padding")) == vocabulary.rows
    has = (vocabulary.own[list(members)] >= 0).any(axis=0)
    assert lost == [t for t, at in vocabulary.tokens.items() if not has[at] and at not in vocabulary.chosen]


def test_means_are_rounded_once(tmp_path):
    """The mean of bfloat16 rows comes in float32; rows that are only moved stay as they are stored."""
    folders = [make_model(tmp_path / str(i), layers=1, seed=i, dtype=torch.bfloat16, vocab_size=8) for i in range(3)]
    own = np.array([[0, -1, 2], [0, 3, 2], [0, 5, 2]])
    vocabulary = SimpleNamespace(rows=3, tokens={"a": 0, "b": 1, "c": 2}, own=own, chosen={})
    maps, _ = row_maps(vocabulary, [0, 1, 2], base=0)
    checkpoints, tables = [Checkpoint.open(f) for f in folders], [weights(f)[EMBEDDINGS] for f in folders]
    permuted = permute(EMBEDDINGS, 0, [0, 1, 2], maps[0], checkpoints)
    source = PermutedCheckpoint(checkpoints[0], {EMBEDDINGS: permuted})
    assert torch.equal(source.read(EMBEDDINGS)[1], (tables[1][3].float() + tables[2][5].float()) / 2)
    assert source.slice(EMBEDDINGS, 2, 3).dtype == torch.bfloat16
    assert source.tensors[EMBEDDINGS].dtype == "BF16"


def test_rows_of_float8(tmp_path):
    from safetensors.torch import save_file

    make_model(tmp_path / "m", layers=1, vocab_size=8)
    stored = weights(tmp_path / "m")
    stored[EMBEDDINGS] = stored[EMBEDDINGS].to(torch.float8_e4m3fn)
    save_file(stored, tmp_path / "m/model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path / "m")
    vocabulary = SimpleNamespace(rows=3, tokens={"a": 0, "b": 1, "c": 2}, own=np.array([[5, 1, 2]]), chosen={})
    maps, _ = row_maps(vocabulary, [0], base=None)
    permuted = permute(EMBEDDINGS, 0, [0], maps[0], [checkpoint])
    rows = PermutedCheckpoint(checkpoint, {EMBEDDINGS: permuted}).read(EMBEDDINGS)
    assert torch.equal(rows.float(), stored[EMBEDDINGS][[5, 1, 2]].float())
