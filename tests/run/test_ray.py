"""``--workers ray://...``: a cluster of two nodes, of which one is lost. Needs Ray: ``make cluster``."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter

import pytest
from run_content import content
from support import make_model, write_recipe

from deus_merge import api

ray = pytest.importorskip("ray")


@pytest.fixture
def plan(tmp_path):
    base = make_model(tmp_path / "base", layers=8)
    recipe = write_recipe(tmp_path / "r.yml", f"base_model: {base}\nupscale: {{insert: all}}\n")
    return api.plan(recipe, max_shard_size=60_000)


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_node_is_lost(plan, cluster, tmp_path):
    """Its pieces are made elsewhere; the bytes are those of one process."""
    api.merge(plan, tmp_path / "one", api.RunOptions(threads=1))
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    lost = []

    def lose(block, resumed):
        if not lost:
            lost.append(block.index)
            threading.Thread(target=cluster.remove_node, args=(second,), kwargs={"allow_graceful": False}).start()
            time.sleep(0.2)

    finished, events = [], []
    api.merge(
        plan, tmp_path / "many", api.RunOptions(workers="ray://auto"), on_event=events.append,
        on_block=lambda block, resumed: (finished.append(block.index), lose(block, resumed)),
    )  # fmt: skip
    assert lost and sorted(finished) == list(range(len(plan.blocks)))
    assert content(tmp_path / "many") == content(tmp_path / "one")
    told = {what: Counter(e["piece"] for e in events if e["event"] == what) for what in {e["event"] for e in events}}
    every = Counter(piece.name for piece in api.pieces(plan))
    assert told["piece handed out"] == every + told.get("worker lost", Counter())
    assert told["piece done"] + told.get("piece found", Counter()) == every
    assert sorted(os.listdir(tmp_path)) == ["base", "many", "one", "r.yml"]


def test_what_is_wrong_is_said_before_and_after_tasks_start(plan, tmp_path):
    with pytest.raises(api.DeusMergeError, match="cannot be reached"):
        api.merge(plan, tmp_path / "out", api.RunOptions(workers="ray://auto"))
    tmp_path.joinpath("out").mkdir()
    tmp_path.joinpath("out/mine.txt").touch()
    with pytest.raises(api.DeusMergeError, match="not empty"):
        api.merge(plan, tmp_path / "out", api.RunOptions(workers="ray://auto"))
