"""Everything that can be known to go wrong with a run, before a byte is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .. import __version__
from ..checkpoint.output_folder import OutputFolder
from ..checkpoint.reader import TensorSource
from ..checkpoint.shards import ShardWriter
from ..checkpoint.system import existing
from ..core.errors import PlanError
from ..core.text import plural
from ..core.units import format_size
from ..plan.types import Plan
from ..report.manifest import Manifest
from .complete import is_complete
from .device import check_alike, check_device_name, choose_device, default_threads, machine_identity, set_threads
from .engines.finished_pieces import FinishedPieces
from .limits import allow_open_files, memory

if TYPE_CHECKING:
    import torch

CLUSTER = "ray://"  # before the address of a Ray cluster
_SLACK = 1 << 18  # bytes of disk for model card, recipe, journal and folders
_RECORD_BYTES = 2 << 10  # bytes of manifest, index and journal a tensor
_MORE_FILES = 16  # inodes for all files but weights and copied files


@dataclass(frozen=True)
class RunOptions:
    """How to run a plan.

    Attributes:
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        max_memory: Bytes the run may take: plans then work in row blocks; too few are refused.
        resume: Continue an interrupted run.
        overwrite: Replace an existing output, once the new one is complete; one in a bucket is removed first.
        verify: Check the result before it is renamed to OUT.
        seed: For methods that draw random numbers.
        threads: CPU threads for arithmetic, of each process; None to share the processor's cores.
        workers: How many processes make blocks at the same time; with several GPUs each has one of them. Or a Ray
            cluster: ``ray://HOST:PORT``, ``ray://auto`` or ``ray://local``.
        model_card: Write a README.md.
        private_paths: Write absolute paths of this machine into the manifest and the recipes beside the output.
    """

    device: str = "auto"
    max_memory: int | None = None
    resume: bool = False
    overwrite: bool = False
    verify: bool = True
    seed: int = 0
    threads: int | None = None
    workers: int | str = 1
    model_card: bool = True
    private_paths: bool = False


class Calibrator(Protocol):
    """What sets the zeroed outputs of new layers once all blocks of a plan are finished: it passed its own checks.

    Attributes:
        identity: What decides its result besides the plan, by name: JSON values.
        disk: Bytes that it needs next to the output while it runs.
        warnings: Messages for the user.
    """

    @property
    def identity(self) -> Mapping[str, object]: ...
    @property
    def disk(self) -> int: ...
    @property
    def warnings(self) -> tuple[str, ...]: ...

    def run(self, output: OutputFolder, writer: ShardWriter, manifest: Manifest) -> Manifest:
        """Change the tensors of the unfinished folder, and continue where an interrupted run ended.

        Args:
            output: The folder: blocks, and all files but the manifest, are complete.
            writer: Its tensors.
            manifest: As it would be without this.

        Returns:
            The manifest of what the folder holds now; it lacks checksums of the tensors that were changed.
        """
        ...


@dataclass(frozen=True)
class Ready:
    """A run that passed every check.

    Attributes:
        output: Its output folder, not entered yet.
        device: Where it computes; None when it only copies.
        run_record: The options as the manifest records them.
        warnings: Messages about this machine.
        complete: OUT is already what this run would make, and it is a resumed one: nothing is left to do.
    """

    output: OutputFolder
    device: torch.device | None
    run_record: dict[str, object]
    warnings: tuple[str, ...]
    complete: bool

    @property
    def threads(self) -> int:
        """CPU threads of each process."""
        threads = self.run_record["threads"]
        assert isinstance(threads, int)
        return threads


def preflight(
    plan: Plan,
    out: Path,
    options: RunOptions,
    calibrator: Calibrator | None = None,
    made: FinishedPieces | None = None,
) -> Ready:
    """Check everything that can be known to go wrong; nothing on the disk is touched.

    Args:
        plan: The plan.
        out: The output folder.
        options: Device, resume, overwrite.
        calibrator: What calibrates the output, where the plan has a calibration.
        made: The finished pieces of all blocks, where workers have made them.

    Raises:
        PlanError: no room on the disk, too little memory, OUT in the way or in or around a source, another run at work
            or interrupted there, no such device.
        CheckpointError: a source has changed since it was planned with.
    """
    if made is not None and made.run_record["threads"]:  # a calibration rounds as it would in a single run
        options = replace(options, threads=int(str(made.run_record["threads"])))
    device, run_record = computing(plan, options, computes=calibrator is not None)
    warnings = check_memory(plan, options) if made is None else ()
    identity = run_identity(run_record, device) | {"sources": [m.stamp for m in plan.models]}
    if made is not None:
        computed = calibrator is None or made.run_record["device"] != "none"
        run_record, identity = made.run_record if computed else run_record, dict(made.identity)
    if calibrator is not None:
        identity["calibrate"] = dict(calibrator.identity)
        warnings += calibrator.warnings
    output = OutputFolder(
        out, plan_hash=plan.hash, identity=identity, overwrite=options.overwrite, resume=options.resume
    )
    check_apart(output.out, [m.checkpoint for m in plan.models])
    complete = options.resume and not output.area.resumable_blocks and is_complete(plan, output.out, run_record)
    if complete:
        warnings += ("the output is already complete: nothing was left to do",)
    else:
        output.check()
        linked = made is not None and calibrator is None
        _check_disk(plan, output, calibrator.disk if calibrator else 0, with_weights=not linked)
    return Ready(output, device, run_record, warnings, complete)


def computing(
    plan: Plan, options: RunOptions, *, computes: bool = False
) -> tuple[torch.device | None, dict[str, object]]:
    """Where a run computes, and the options that the manifest records.

    Args:
        plan: The plan.
        options: Device, threads, seed.
        computes: Whether it computes something even where no block does.

    Raises:
        PlanError: no such device.
        CheckpointError: a source has changed since it was planned with.
    """
    check_device_name(options.device)
    processes_of(options)
    plan.check_sources()
    if not (computes or any(b.computes for b in plan.blocks)):
        return None, {"device": "none", "threads": 0, "seed": options.seed}
    device = choose_device(options.device)
    check_alike(device, processes_of(options))
    threads = set_threads(options.threads or default_threads(processes_of(options)))
    return device, {"device": device.type, "threads": threads, "seed": options.seed}


def processes_of(options: RunOptions) -> int:
    """How many processes of this machine make blocks at the same time.

    Raises:
        PlanError: none, or another value that ``workers`` cannot have.
    """
    if isinstance(options.workers, str) and options.workers.startswith(CLUSTER):
        return 1
    if not isinstance(options.workers, int) or options.workers < 1:
        expected = f"a number of processes, or {CLUSTER}HOST:PORT"
        raise PlanError("not a number of workers", where="--workers", expected=expected, got=options.workers)
    return options.workers


def run_identity(run_record: Mapping[str, object], device: torch.device | None) -> dict[str, object]:
    """Everything but the plan and its sources that decides the bytes of an output: JSON values by name."""
    return {"deus_merge": __version__, **run_record, **machine_identity(device)}


def check_apart(out: Path, sources: Iterable[TensorSource]) -> None:
    """OUT and the sources must not contain each other, by whatever names: links, bind mounts, upper and lower case.

    Raises:
        PlanError: they do.
    """
    above = set(_folders(out))
    for source in sources:
        for folder in source.folders:
            inner = folder.iterdir() if folder.is_dir() else ()
            files = {f.resolve().parent for f in (*inner, *source.files)}  # links may lead elsewhere
            inside = _identity(folder) in above
            if inside or (os.path.exists(out) and any(_identity(out) in _folders(f) for f in (folder, *files))):
                raise PlanError(
                    "the output and a source must not contain each other",
                    where=out,
                    expected="a folder outside the models",
                    got=f"source {folder.resolve()}",
                )


def _folders(path: Path) -> Iterator[tuple[int, int]]:
    """Identities of a path and of the folders above it, as far as they are there."""
    path = path.resolve()
    return (_identity(folder) for folder in (path, *path.parents) if os.path.exists(folder))


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def check_memory(plan: Plan, options: RunOptions) -> tuple[str, ...]:
    """Check that a plan fits into the memory.

    Returns:
        A warning where it may not.

    Raises:
        PlanError: it cannot.
    """
    workers = processes_of(options)
    minimum, limit = plan.minimum_memory * workers, options.max_memory
    if limit is not None and minimum > limit:
        raise PlanError(
            "the plan needs more memory than allowed",
            where="--max-memory",
            expected=f"at least {format_size(minimum)}",
            got=format_size(limit),
        )
    if (found := memory()) is None:
        return ()
    available, total = found
    if limit is None and minimum > total:
        raise PlanError(
            "the plan needs more memory than there is",
            expected=f"at least {format_size(minimum)}",
            got=f"{format_size(total)}, swap included",
            hint=f"--max-memory {_megabytes(minimum)} tries nevertheless"
            + (f"; fewer than {workers} workers need less" if workers > 1 else ""),
        )
    peak = plan.peak_memory * workers
    peak = peak if limit is None else min(peak, limit)
    if peak <= available:
        return ()
    less = f"; it runs with less: --max-memory {_megabytes(max(minimum, available))}" if minimum < peak else ""
    return (f"about {format_size(peak)} of memory will be needed, {format_size(available)} are available{less}",)


def _megabytes(size: int) -> str:
    return f"{-(-size // 10**6)}MB"


def _check_disk(plan: Plan, output: OutputFolder, more: int, *, with_weights: bool) -> None:
    """Check that there is room for the new folder next to the old one. The leftovers of an interrupted run count as
    room: they are used again or removed."""
    sizes = [s.size for s in plan.shards] if with_weights else []
    sizes += [len(c) if isinstance(c, bytes) else c.stat().st_size for c in plan.files.values()]
    system = os.statvfs(existing(output.out.parent))
    left = [os.lstat(p) for p in output.area.new.rglob("*")]
    needed = sum(-(-size // system.f_frsize) * system.f_frsize for size in sizes)
    needed += more + _SLACK + _RECORD_BYTES * sum(len(b.outputs) for b in plan.blocks)
    free = system.f_bavail * system.f_frsize + sum(s.st_blocks * 512 for s in left)
    if needed > free:
        raise PlanError(
            "too little space on the disk",
            where=output.out,
            expected=format_size(needed),
            got=f"{format_size(free)} free",
            hint="the folder that will be replaced stays until the new one is whole" if output.out.exists() else None,
        )
    files = len(sizes) + _MORE_FILES
    if system.f_files and files > system.f_favail + len(left):
        raise PlanError(
            "too few inodes on the file system",
            where=output.out,
            expected=f"{plural(files, 'file')}",
            got=f"{system.f_favail + len(left)} free",
            hint="a larger --max-shard-size makes fewer files",
        )
    opened = len(plan.shards) + sum(len(m.checkpoint.files) for m in plan.models)
    if not allow_open_files(opened):
        raise PlanError(
            "too many files would be open at once",
            expected=f"a limit of more than {opened} open files (ulimit -n)",
            hint="a larger --max-shard-size makes fewer files",
        )
