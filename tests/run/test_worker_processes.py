"""``--workers N``: the bytes of a single process, whatever happens to the workers and to the process that has them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_content import content
from support import make_model, write_recipe

from deus_merge import api
from deus_merge.core.errors import MachineError, SolverError

SIZE = 60_000  # several files
ONE_THREAD = {"threads": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "base", layers=8)


@pytest.fixture(scope="module")
def recipe(base, tmp_path_factory):
    """Copies, zeros, fused layers, and two documents that are computed when they are read."""
    text = (
        f"name: deep\nbase_model: {base}\nupscale: {{insert: {{count: 3}}}}\n---\n"
        f"merge_method: slerp\nbase_model: deep\nparameters: {{t: 0.25}}\n"
        f"slices:\n- sources: [{{model: deep, layer_range: [0, 6]}}, {{model: deep, layer_range: [5, 11]}}]\n"
    )
    return write_recipe(tmp_path_factory.mktemp("recipe") / "r.yml", text)


@pytest.fixture(scope="module")
def plan(base, tmp_path_factory):
    text = f"base_model: {base}\nupscale: {{insert: all}}\n"
    return api.plan(write_recipe(tmp_path_factory.mktemp("plan") / "r.yml", text), max_shard_size=SIZE)


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    api.merge(plan, out, api.RunOptions(**ONE_THREAD))
    return content(out)


def children(of: int = os.getpid()) -> list[int]:
    """The processes that a process has started, as Linux lists them."""
    listed = (task / "children" for task in Path(f"/proc/{of}/task").iterdir())
    return [int(pid) for path in listed for pid in path.read_text().split() if "worker" in command(int(pid))]


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_the_bytes_are_those_of_one_process(recipe, tmp_path):
    planned = api.plan(recipe, max_shard_size=SIZE)
    api.merge(planned, tmp_path / "one", api.RunOptions(**ONE_THREAD))
    finished = []
    options = api.RunOptions(workers=3, **ONE_THREAD)
    api.merge(planned, tmp_path / "many", options, on_block=lambda block, resumed: finished.append(block.index))
    assert sorted(finished) == list(range(len(planned.blocks)))
    assert content(tmp_path / "many") == content(tmp_path / "one")
    assert not children()


def test_workers_share_the_roles_of_learned_layers(base, tmp_path):
    """Also those that a stopped run has left: it goes on after the last role that it had finished."""
    learned = "{preset: lesa, insert: {after: [1, 3]}, parameters: {epochs: 1}}"
    recipe = write_recipe(tmp_path / "r.yml", f"base_model: {base}\nupscale: {learned}\n")
    planned = api.plan(recipe, max_shard_size=SIZE)
    api.merge(planned, tmp_path / "whole", api.RunOptions(**ONE_THREAD))
    roles = [block for block in planned.blocks if block.new]
    assert [block.layers for block in roles] == [(2, 5)] * 9 and planned.new_layers == (2, 5)
    out, found, shares = tmp_path / "out", [], []

    def stop(block, resumed):
        if block is roles[2]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.merge(planned, out, api.RunOptions(**ONE_THREAD), on_block=stop)
    api.merge(
        planned, out, api.RunOptions(resume=True, workers=2, **ONE_THREAD),
        on_block=lambda block, resumed: found.append(block.index) if resumed else None,
        on_event=lambda event: shares.append(event["blocks"]) if event["event"] == "worker started" else None,
    )  # fmt: skip
    assert found == list(range(roles[2].index + 1))
    assert all({block.title for block in roles} & set(share) for share in shares) and len(shares) == 2
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.slow
def test_workers_are_killed(plan, whole, tmp_path):
    """At random moments; another one takes over what was not finished."""
    choice, kills = random.Random(1), 0

    def kill(block, resumed):
        nonlocal kills
        if kills < 4 and choice.random() < 0.4 and (pids := children()):
            time.sleep(choice.random() / 50)
            os.kill(choice.choice(pids), signal.SIGKILL)
            kills += 1

    result = api.merge(plan, tmp_path / "out", api.RunOptions(workers=2, **ONE_THREAD), on_block=kill)
    assert kills > 1 and result.verification.passed
    assert content(tmp_path / "out") == whole and not children()


def test_events_tell_who_makes_what(plan, whole, tmp_path):
    """One is killed when the other has made its first block; it is replaced, and the other takes over what it can."""
    events, pids, killed = [], {}, []

    def told(event):
        events.append(event)
        if event["event"] == "worker started":
            pids[event["worker"]] = event["pid"]
        elif event["event"] == "block done" and not killed:
            killed.append(3 - event["worker"])
            os.kill(pids[killed[0]], signal.SIGKILL)

    api.merge(plan, tmp_path / "out", api.RunOptions(workers=2, **ONE_THREAD), on_event=told)
    assert content(tmp_path / "out") == whole and json.loads(json.dumps(events)) == events
    of = {event["event"]: [e for e in events if e["event"] == event["event"]] for event in events}
    assert sorted(event["index"] for event in of["block done"]) == list(range(len(plan.blocks)))
    assert all(event["worker"] in (1, 2) and event["seconds"]["wrote"] >= 0 for event in of["block done"])
    (lost,) = of["worker lost"]
    assert lost["worker"] == killed[0] and lost["how"] == "killed by SIGKILL"
    assert [event["worker"] for event in of["worker started"]] == [1, 2, killed[0]]
    assert of["taken over"] and all({event["worker"], event["from"]} == {1, 2} for event in of["taken over"])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_process_that_started_them_dies(plan, whole, base, tmp_path, how):
    """Its workers end at once, and a run with another number of workers goes on from its journal."""
    recipe = f"{{'base_model': {str(base)!r}, 'upscale': {{'insert': 'all'}}}}"
    code = (
        f"from deus_merge import api; plan = api.plan({recipe}, max_shard_size={SIZE}); "
        "api.merge(plan, 'out', api.RunOptions(workers=2, threads=1), on_block=lambda *block: print(block, flush=True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout and process.stdout.readline()  # a block is finished
    workers = children(process.pid)
    process.send_signal(how)
    process.wait()
    process.stdout.close()
    assert 0 < len(workers) <= 2 and not (tmp_path / "out").exists()
    deadline = time.monotonic() + 20
    while any(command(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers go on without the process that started them"
        time.sleep(0.05)
    api.merge(plan, tmp_path / "out", api.RunOptions(resume=True, **ONE_THREAD))
    assert content(tmp_path / "out") == whole and os.listdir(tmp_path) == ["out"]


def test_an_error_in_a_worker_is_the_error_of_the_run(base, tmp_path):
    """Not a dead worker, and what was finished can be resumed."""
    import torch
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in base.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.6.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    recipe = write_recipe(tmp_path / "r.yml", f"base_model: {broken}\nupscale: {{insert: {{count: 2}}}}\n")
    planned = api.plan(recipe, max_shard_size=SIZE)
    errors = []
    for workers in (1, 2):
        with pytest.raises(api.DeusMergeError) as raised:
            api.merge(planned, tmp_path / f"out{workers}", api.RunOptions(workers=workers, **ONE_THREAD))
        errors.append((type(raised.value), raised.value.message, raised.value.expected))
    assert errors[0] == errors[1] and errors[0][0] is not MachineError
    assert issubclass(errors[0][0], SolverError) or "nan" in errors[0][1].lower()
    assert not children()


BEFORE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); sys.exit(3)"
WHILE = (
    "import json, os, sys; sys.path[:] = json.loads(sys.argv[1]); import deus_merge.run.engines.worker as worker; "
    "worker.run_blocks = lambda *args, **more: os.kill(os.getpid(), 9); worker.main()"
)


@pytest.mark.parametrize(
    ("start", "words"),
    [(BEFORE, ("before they can begin", "exit code 3", "--workers 1")), (WHILE, ("SIGKILL", "memory", "estimated at"))],
)
def test_workers_that_always_die(plan, monkeypatch, tmp_path, start, words):
    monkeypatch.setattr("deus_merge.run.engines.children._START", start)
    with pytest.raises(MachineError) as raised:
        api.merge(plan, tmp_path / "out", api.RunOptions(workers=2, **ONE_THREAD))
    assert all(word in str(raised.value) for word in words) and raised.value.exit_code == 1
    assert os.listdir(tmp_path) == [] and not children()


def test_memory_is_shared_among_workers(plan, tmp_path):
    """What is enough for one is too little for two."""
    limit = plan.minimum_memory * 2
    with pytest.raises(api.DeusMergeError, match="more memory than allowed"):
        api.preflight(plan, tmp_path / "out", api.RunOptions(workers=2, max_memory=limit - 1))
    assert api.preflight(plan, tmp_path / "out", api.RunOptions(workers=1, max_memory=limit - 1)) is not None
    api.preflight(plan, tmp_path / "out", api.RunOptions(workers=2, max_memory=limit))
    with pytest.raises(api.DeusMergeError, match="not a number of workers"):
        api.preflight(plan, tmp_path / "two", api.RunOptions(workers=0))
