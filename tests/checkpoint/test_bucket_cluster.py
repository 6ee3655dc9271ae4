"""``--workers ray://...`` into a bucket: tasks of two nodes upload pieces. Needs Ray: ``make cluster``."""

from __future__ import annotations

import pytest
from bucket_runs import content, files_of, objects
from support import make_model, write_recipe

from deus_merge import api

ray = pytest.importorskip("ray")
pytest.importorskip("obstore.store")


def test_a_cluster_writes_to_a_bucket(moto, tmp_path):
    """A node is lost after the first block; the objects are the files of one process."""
    from ray.cluster_utils import Cluster

    base = make_model(tmp_path / "base", layers=6)
    recipe = write_recipe(tmp_path / "r.yml", f"base_model: {base}\nupscale: {{insert: all}}\n")
    plan = api.plan(recipe, max_shard_size=60_000)
    api.merge(plan, tmp_path / "local", api.RunOptions(threads=1))
    with moto.used():
        moto.make_bucket("cluster")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        ray.init(address=cluster.address, log_to_driver=False)
        second, lost = cluster.add_node(num_cpus=1), []
        try:
            cluster.wait_for_nodes()

            def lose(block, resumed):
                if not lost:
                    lost.append(block.index)
                    cluster.remove_node(second, allow_graceful=False)

            api.merge(plan, "s3://cluster/out", api.RunOptions(workers="ray://auto"), on_block=lose)
        finally:
            ray.shutdown()
            cluster.shutdown()
        assert lost and content(objects("s3://cluster/out")) == content(files_of(tmp_path / "local"))
