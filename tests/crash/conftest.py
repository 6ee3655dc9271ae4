"""Small models, a warm process, and the kinds of runs that are stopped in it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from stage import Stage, Warm
from support import make_model


@pytest.fixture(scope="session")
def arena(tmp_path_factory) -> Iterator[Path]:
    """A folder in memory, where a sync costs nothing; tests of syncs lose all that was not synced."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path_factory.mktemp("arena")
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix="deus-crash-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture(scope="session")
def base(arena) -> Path:
    """A small model in several files."""
    model = make_model(arena / "base", layers=3, max_shard_size="60KB")
    for file in model.iterdir():
        file.chmod(0o644)
    return model


@pytest.fixture(scope="session")
def warm(arena, base) -> Iterator[Warm]:
    process = Warm()
    process.prime("upscale", base, arena / "prime", "--quiet")
    yield process
    process.close()


@pytest.fixture(scope="session")
def stages(warm, arena, base) -> dict[str, Stage]:
    """Copies alone, computed layers, and an output that is overwritten, with and without an exchange of names."""
    # --private-paths: the same files wherever OUT is
    common = ("upscale", base, "out", "--insert", "all", "--max-shard-size", "30kB", "--private-paths")
    copies, computes = (*common, "--preset", "copy_next"), (*common, "--preset", "opt_deus")
    before = arena / "before"  # more shards, and an index
    before.mkdir()
    assert warm.run(before, "upscale", base, "out", "--preset", "stack", "--max-shard-size", "20kB").code == 0
    kinds = {
        "copies": (copies, True, None),
        "computes": (computes, True, None),
        "overwrite": (copies, True, before / "out"),
        "no exchange": (copies, False, before / "out"),
    }
    stages = {}
    for name, kind in kinds.items():
        (root := arena / name.replace(" ", "-")).mkdir()
        stages[name] = Stage(warm, root, *kind)
    return stages
