"""What the making of blocks took its time for, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .manifest_parts import BlockSeconds, ManifestBlock

#: what bounds a run, by the kind of work that takes most of it
BOUNDS = {"read": "reading", "computed": "computing", "wrote": "writing", "waited": "waiting"}


def total_seconds(blocks: Iterable[ManifestBlock]) -> BlockSeconds:
    """What all blocks took their time for."""
    seconds = [block.seconds for block in blocks]
    read, computed = sum(s["read"] for s in seconds), sum(s["computed"] for s in seconds)
    wrote, waited = sum(s["wrote"] for s in seconds), sum(s["waited"] for s in seconds)
    read, computed, wrote, waited = (round(value, 4) for value in (read, computed, wrote, waited))
    return {"read": read, "computed": computed, "wrote": wrote, "waited": waited}


def percentages(seconds: BlockSeconds) -> dict[str, float]:
    """The share of each kind of work in percent; empty where nothing took time, or the times are none."""
    values: dict[str, float] = {kind: seconds[kind] for kind in BOUNDS}  # a manifest may be written by anybody
    total = sum(values.values())
    if min(values.values()) < 0 or not 0 < total < math.inf:
        return {}
    return {kind: 100 * value / total for kind, value in values.items()}


def bound(shares: dict[str, float]) -> str:
    """What bounds a run, by its percentages: ``computing``."""
    return BOUNDS[max(shares, key=lambda kind: shares[kind])]


def in_words(seconds: BlockSeconds | None) -> str | None:
    """``read 12 %, computed 80 %, wrote 5 %, waited 3 %: computing bounds this run``; None where there are no times."""
    shares = percentages(seconds) if seconds else {}
    if not shares:
        return None
    return f"{', '.join(f'{kind} {share:.0f} %' for kind, share in shares.items())}: {bound(shares)} bounds this run"
