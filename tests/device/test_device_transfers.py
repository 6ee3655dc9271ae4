"""What crosses between host and device: inputs once per read, outputs once; and how often the host waits for a number.

Counted on the simulated device, so these tests are skipped on others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from device_recipes import INSERTS, MERGES, SOLVERS, aligned_recipe, insert_recipe, merge_recipe
from device_runs import DEVICE, IS_SIMULATED, Result, solve_points

from deus_merge.align.options import ALIGNMENTS
from deus_merge.methods.registry import methods

pytestmark = pytest.mark.skipif(not IS_SIMULATED, reason="only the simulated device counts transfers")

#: how often the host may wait for the device (a number read, a few numbers read at once, a size that depends on
#: values), for each transport plan of two tiny layers fused by alignment transport_flow; the work around the plan,
#: such as checks for finite values, counts. Tighten these when a solver waits less
WAITS_PER_PLAN = {"assignment": 12, "emd": 14, "progot": 125, "sinkhorn": 55, "unbalanced": 57}
#: the same of presets
WAITS_PER_PLAN_OF_PRESETS = {"opt_deus": 25, "opt_deus_paper": 25, "opt_deus_script": 23}
#: and of merge methods, for each tensor they compute
WAITS_PER_TENSOR = 35

#: solvers that may take their cost to the host
EXACT = ("assignment", "emd")
#: methods that draw random numbers: on the CPU, so that these go to the device
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear", "lesa")
#: bytes of a download or upload that is not worth a thought: a few vectors along the longest axis of the tiny layers
SMALL = 8 * 48
ROWS = (32, 16, 16, 32, 48, 48, 32)  # of q, k, v, o, gate, up, down in the tiny layers


def waits(result: Result) -> int:
    """How often the host waited for the device, for other things than the outputs."""
    downloads = Counter(result.transfers.downloads) - Counter(result.written)
    return result.transfers.scalar_reads + result.transfers.value_sizes + downloads.total()


def check_uploads(result: Result, allowed: int = 0, reads_once: bool = True) -> None:
    """Every stored tensor is read once, and goes to the device once for each read; besides, only uploads of at most
    ``allowed`` bytes."""
    assert not reads_once or result.most_reads == 1
    uploads, reads = Counter(result.transfers.uploads), Counter(result.reads)
    assert not reads - uploads, "was read and did not go to the device"
    more = {nbytes: count for nbytes, count in (uploads - reads).items() if nbytes > allowed}
    assert not more, "went to the device and was not read"


def check_downloads(result: Result, costs: Mapping[int, int] | None = None) -> None:
    """Every output comes back once; besides, only what is small, and at most these costs (bytes -> how many)."""
    downloads, written = Counter(result.transfers.downloads), Counter(result.written)
    assert not {n: count for n, count in (written - downloads).items() if n > 8}, "an output that did not come back"
    more = {n: count for n, count in (downloads - written - Counter(costs or {})).items() if n > SMALL}
    assert not more, "came to the host and is no output"


def costs(itemsize: int, gaps: int = 1) -> Counter[int]:
    """Sizes of the n x n costs of the tiny layers' gaps."""
    return Counter(itemsize * n * n for n in ROWS * gaps)


@pytest.mark.parametrize("name", [name for name in MERGES if name != "passthrough"])
def test_merge_methods(as_on_cpu, models, name):
    result = as_on_cpu(merge_recipe(name, models))
    check_uploads(result, allowed=4 * 128 * 32 if name in RANDOM else 0)
    check_downloads(result)
    assert waits(result) <= WAITS_PER_TENSOR * len(result.written)


@pytest.mark.parametrize("name", [name for name in INSERTS if name != "ot_fuse"])
def test_methods_that_insert_layers(as_on_cpu, models, name):
    result = as_on_cpu(insert_recipe(name, models["base"], 3))
    check_uploads(result, allowed=4 * 256 * 256 if name in RANDOM else 0, reads_once=not methods()[name].learns)
    check_downloads(result)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers(as_on_cpu, models, solver):
    assert solver in WAITS_PER_PLAN, "measure how often this solver waits, and name a bound"
    recipe = insert_recipe("ot_fuse", models["base"], solver=solver, alignment="transport_flow", zero_init=False)
    result = as_on_cpu(recipe)
    assert len(result.plans) == len(ROWS)
    exact = solver in EXACT
    check_uploads(result, allowed=max(costs(8)) if exact else 0)
    check_downloads(result, costs(8 if solver == "emd" else 4) if exact else None)
    assert waits(result) <= WAITS_PER_PLAN[solver] * len(result.plans)


@pytest.mark.parametrize("preset", WAITS_PER_PLAN_OF_PRESETS)
def test_presets(as_on_cpu, models, preset):
    result = as_on_cpu({"base_model": models["base"], "upscale": {"preset": preset, "insert": {"after": [0]}}})
    assert waits(result) <= WAITS_PER_PLAN_OF_PRESETS[preset] * len(result.plans)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_alignments(as_on_cpu, models, alignment):
    """Of the matching of heads, only the table of their scores comes to the host."""
    recipe = insert_recipe("ot_fuse", models["base"], solver="sinkhorn", alignment=alignment, zero_init=False)
    result = as_on_cpu(recipe)
    check_uploads(result, allowed=SMALL)
    check_downloads(result)


def test_aligned_sources(as_on_cpu, models):
    """The target is read for the alignment and again for the merge."""
    result = as_on_cpu(aligned_recipe("slerp", models, "transport_flow"))
    assert result.most_reads == 2
    check_uploads(result, allowed=SMALL, reads_once=False)
    check_downloads(result)


def test_a_large_assignment_brings_only_edges_to_the_host(device_process):
    """Beyond SciPy's sizes the cost stays on the device."""
    n = 1100
    ours, cost, transfers = device_process.call(solve_points, "assignment", n, 16, DEVICE)
    expected, cost_on_cpu, _ = solve_points("assignment", n, 16, "cpu")
    assert ours == expected and cost == cost_on_cpu
    assert transfers.downloads and max(transfers.downloads) < 100 * 8 * n < 4 * n * n


@pytest.mark.parametrize("solver", SOLVERS)
def test_points_that_are_many(device_process, solver):
    """Problems of several row blocks."""
    ours, cost, transfers = device_process.call(solve_points, solver, 300, 8, DEVICE)
    assert (ours, cost) == solve_points(solver, 300, 8, "cpu")[:2]
    if solver not in EXACT:
        assert max(transfers.downloads, default=0) <= 8 * 300
