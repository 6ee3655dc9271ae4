"""The engine for Ray clusters: pieces are tasks, which any node makes that reaches the sources and the output's folder.

Ray starts a task again when its worker or its node is lost; whatever was finished before is found and not made again.
"""

from __future__ import annotations

import pickle
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...core.errors import DeusMergeError, MachineError, PlanError
from ...plan.pieces import Piece, pieces
from ...plan.types import Plan
from ..events import OnEvent, unheard
from ..piece_job import OnBlock, PieceJob, about
from ..preflight import CLUSTER, RunOptions

_RETRIES = 10  # of a piece whose worker or node was lost
_PAUSE = 1.0  # seconds before it is handed out again


def make_pieces(
    plan: Plan,
    out: Path,
    options: RunOptions,
    address: str,
    *,
    mixed_machines: bool = False,
    on_block: OnBlock = lambda block, resumed: None,
    on_event: OnEvent = unheard,
) -> None:
    """Make all pieces of an output, those that are not finished, by tasks of a Ray cluster.

    Args:
        plan: The plan.
        out: The output folder, in a file system that all nodes share.
        options: As for `pieces.make_share`. A task takes ``threads`` CPUs (by default one), and one GPU where the
            device is ``cuda``.
        address: ``ray://HOST:PORT`` of a cluster's client server, ``ray://auto`` for the cluster that this machine
            belongs to, or ``ray://local`` for one of this machine alone.
        mixed_machines: As for `pieces.make_share`.
        on_block: Called after each block with the block and whether it was finished already.
        on_event: Called with what happens to pieces and workers.

    Raises:
        PlanError: Ray is not installed, or there is no such cluster.
        MachineError: a piece was lost with its node again and again.
        DeusMergeError: as `pieces.make_share`.
    """
    options = replace(options, workers=1, threads=options.threads or 1)
    job = PieceJob(plan, out, options, mixed_machines=mixed_machines)  # shows what is wrong before a task is started
    if job.complete:
        return
    with _connection(address) as ray:
        resources: dict[str, Any] = {"num_cpus": options.threads, "max_retries": 0}  # here they can be told of
        if job.device and job.device.startswith("cuda"):
            resources["num_gpus"] = 1
        task = ray.remote(**resources)(_make)
        shared = ray.put(pickle.dumps((plan, str(job.store.out), options, mixed_machines)))
        ordered = sorted(pieces(plan), key=lambda piece: -piece.seconds)  # the last one sets the time
        lost: Counter[str] = Counter()
        running: dict[Any, Piece] = {}

        def hand_out(piece: Piece) -> None:
            running[task.remote(shared, piece.name)] = piece
            on_event(about(piece, "piece handed out"))

        for piece in ordered:
            hand_out(piece)
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            piece = running.pop(done)
            try:
                result = ray.get(done)
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                if not isinstance(error, ray.exceptions.RayTaskError) and lost[piece.name] < _RETRIES:
                    lost[piece.name] += 1
                    on_event(about(piece, "worker lost", how=type(error).__name__))
                    time.sleep(_PAUSE)
                    hand_out(piece)
                    continue
                hint = "the pieces that are finished remain; run the same command again"
                raise MachineError("a piece could not be made", where=piece.title, got=reason, hint=hint) from error
            if isinstance(result, DeusMergeError):
                raise result
            for block in piece.blocks:
                on_block(block, result)
            on_event(about(piece, "piece found" if result else "piece done"))


def _make(shared: bytes, name: str) -> bool | DeusMergeError:
    """A task: make one piece.

    Returns:
        Whether it was finished already; or the error, which another try would meet again.
    """
    plan, out, options, mixed_machines = pickle.loads(shared)
    try:
        job = PieceJob(plan, Path(out), options, mixed_machines=mixed_machines)
        return not job.make(next(piece for piece in pieces(plan) if piece.name == name))
    except DeusMergeError as error:
        return error


@contextmanager
def _connection(address: str):
    """Ray, connected to a cluster for as long as this is open."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise PlanError(
            "Ray is not installed", where="--workers", got=address, hint='pip install "deus-merge[ray]"'
        ) from None
    name = address.removeprefix(CLUSTER)
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address=name if name in ("auto", "local") else address, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError, ImportError) as error:
        raise PlanError(
            "the Ray cluster cannot be reached",
            where="--workers",
            expected="ray://HOST:PORT, ray://auto or ray://local",
            got=f"{address}: {str(error).strip().splitlines()[0]}",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
