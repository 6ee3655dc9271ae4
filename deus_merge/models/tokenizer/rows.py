"""The origin of each row of a source's embeddings in the output's order.

The rule is mergekit's. A source keeps its own embedding of a token. A source that lacks the token takes the embedding
that the recipe chooses; else the embedding of the only source that has the token; else the base model's; else the mean
over the sources that have it; else zeros. Rows without a token take the mean of the source's other rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .build import Vocabulary

if TYPE_CHECKING:
    import numpy as np

#: special values in place of a model's index
ZERO, MEAN, PADDING = -1, -2, -3


@dataclass(frozen=True)
class RowMap:
    """The rows of one source's tensors, in the output's order.

    Attributes:
        model: (rows,) index of the model that gives the row, or `ZERO`, `MEAN`, `PADDING`.
        row: (rows,) row in that model; for `MEAN` a row of ``means``.
        means: (k, models) rows to average, -1 for a model that is left out.
    """

    model: np.ndarray
    row: np.ndarray
    means: np.ndarray

    @property
    def rows(self) -> int:
        """Number of rows of the output."""
        return len(self.model)

    def is_identity(self, model: int, stored: int) -> bool:
        """Whether a tensor of this model with ``stored`` rows stays unchanged."""
        import numpy as np

        same = stored == self.rows and bool((self.model == model).all())
        return same and bool((self.row == np.arange(self.rows)).all())

    def describe(self, model: int) -> dict:
        """Counts of rows by origin, and a digest of the map, as JSON data."""
        kinds = {"zero": ZERO, "mean": MEAN, "padding": PADDING}
        counts = {name: int((self.model == kind).sum()) for name, kind in kinds.items()}
        own = int((self.model == model).sum())
        digest = hashlib.sha256()
        for array in (self.model, self.row, self.means):
            digest.update(repr(array.shape).encode() + array.astype("<i8").tobytes())
        taken = self.rows - own - sum(counts.values())
        return {"model": model, "own": own, "taken": taken, **counts, "digest": digest.hexdigest()}


def row_maps(vocabulary: Vocabulary, members: Sequence[int], base: int | None) -> tuple[list[RowMap], list[str]]:
    """A map for each source of a block.

    Args:
        vocabulary: The output's tokens.
        members: The models of the block's sources, as indices into ``vocabulary.own``.
        base: The base model's index in ``members``.

    Returns:
        The maps, in the order of ``members``, and the tokens that no source of the block has an embedding for.
    """
    import numpy as np

    own = vocabulary.own[list(members)]  # (s, rows)
    has = own >= 0  # (s, rows)
    count = has.sum(axis=0)  # (rows,)
    used = np.zeros(vocabulary.rows, dtype=bool)  # (rows,)
    used[list(vocabulary.tokens.values())] = True

    # rows for sources that lack the token
    model = np.where(used, ZERO, PADDING)  # (rows,)
    row = np.zeros(vocabulary.rows, dtype=np.int64)  # (rows,)
    first = has.argmax(axis=0)  # (rows,)
    source = np.where(count == 1, first, base if base is not None else -1)  # (rows,)
    known = (count > 0) & np.take_along_axis(has, source.clip(min=0)[None], axis=0)[0] & (source >= 0)
    model[known] = np.asarray(members)[source[known]]
    row[known] = own[source[known], np.flatnonzero(known)]
    mean = np.flatnonzero((count > 1) & ~known)
    model[mean], row[mean] = MEAN, np.arange(len(mean))
    means = np.full((len(mean), len(vocabulary.own)), -1, dtype=np.int64)  # (k, models)
    means[:, list(members)] = own[:, mean].T

    forced = np.zeros(vocabulary.rows, dtype=bool)  # (rows,)
    for at, chosen in vocabulary.chosen.items():
        model[at] = ZERO if chosen.model is None else chosen.model
        row[at], forced[at] = chosen.row, chosen.force
    maps = [
        RowMap(np.where(keeps, index, model), np.where(keeps, own[i], row), means)
        for i, index in enumerate(members)
        for keeps in [has[i] & ~forced]
    ]
    lost = (count == 0) & used
    lost[list(vocabulary.chosen)] = False
    return maps, [token for token, at in vocabulary.tokens.items() if lost[at]]
