"""What an output holds, for comparisons of one run with another."""

from __future__ import annotations

import json
from pathlib import Path


def content(out: Path) -> dict[str, object]:
    """Every file; of the manifest all but times, of the card all but the lines that name the folder."""
    found = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    untimed = lambda d: {k: d[k] for k in d if k not in ("seconds", "sha256", "created", "date")}  # noqa: E731
    return found | {"deus_merge.json": json.loads(found["deus_merge.json"], object_hook=untimed)}
