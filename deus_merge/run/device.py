"""The device of a run, and everything about the machine that decides a result's bytes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import PlanError

if TYPE_CHECKING:
    import torch

#: environment variables by which numerical libraries are limited to older instructions
_INSTRUCTION_LIMITS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA")


def check_device_name(name: str) -> None:
    """Raise a PlanError unless it is ``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise PlanError("unknown device", where="--device", expected="auto, cpu, cuda or cuda:N", got=name)


def choose_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is CUDA where there is one.

    Raises:
        PlanError: an unknown name, or there is no such CUDA device.
    """
    import torch

    check_device_name(name)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise _no_device(name, torch.cuda.device_count())
    if device.type == "cuda":  # plans need all of float32's digits
        torch.backends.cuda.matmul.allow_tf32 = False
    return device


def torch_build() -> str:
    """What torch is built for: ``for CUDA 12.8``, ``for ROCm 6.3`` or ``without CUDA``."""
    import torch

    if torch.version.cuda:
        return f"for CUDA {torch.version.cuda}"
    return f"for ROCm {torch.version.hip}" if torch.version.hip else "without CUDA"


def _no_device(name: str, count: int) -> PlanError:
    """The error of a CUDA device that is not there."""
    if count:
        known = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        return PlanError("no such CUDA device", where="--device", expected=f"cpu, or {known}", got=name)
    build = torch_build()
    hint = "a driver and CUDA_VISIBLE_DEVICES decide what it finds" if "for" in build else "install one for your GPU"
    return PlanError(
        "torch finds no CUDA device",
        where="--device",
        expected="auto or cpu",
        got=name,
        hint=f"torch is built {build}; {hint}",
    )


def check_alike(device: torch.device, workers: int) -> None:
    """Check that the GPUs which several workers use are of one model: others round differently.

    Raises:
        PlanError: they are not.
    """
    import torch

    if device.type != "cuda" or device.index is not None or workers == 1:
        return
    models = {torch.cuda.get_device_name(i) for i in range(min(workers, torch.cuda.device_count()))}
    if len(models) > 1:
        hint = "fewer --workers, or --device cuda:N for all of them"
        got = ", ".join(sorted(models))
        raise PlanError("the GPUs are not alike", where="--workers", expected="one model", got=got, hint=hint)


def set_threads(threads: int | None) -> int:
    """Set the CPU threads for arithmetic; None leaves torch's own choice.

    Returns:
        How many there are.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


@contextmanager
def threads_kept() -> Iterator[None]:
    """What is done within leaves torch with as many CPU threads as it had, whatever `set_threads` sets."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    try:
        yield
    finally:
        if before is not None:
            sys.modules["torch"].set_num_threads(before)


def default_threads(workers: int) -> int | None:
    """CPU threads of each of several processes: they share the cores. None: torch chooses, for a single one."""
    if workers == 1:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers)


def machine_identity(device: torch.device | None) -> dict[str, str]:
    """What the bytes of computed tensors depend on besides the plan: a resumed run needs the same.

    Numerical libraries choose their kernels by instruction set and vendor, and kernels round differently: MKL limited
    to SSE4.2 changes some elements of a product in the last digit.

    Args:
        device: Where the arithmetic is done; None when nothing is computed: copies are the same everywhere.
    """
    if device is None:
        return {}
    import torch

    limits = [f"{name}={os.environ[name]}" for name in _INSTRUCTION_LIMITS if os.environ.get(name)]
    instructions = " ".join([torch.backends.cpu.get_cpu_capability(), *limits])
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {"torch": torch.__version__, "instruction_set": instructions, "device_model": model}


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Vendor and model of the processor, as Linux reports them; empty where it does not."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return ""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return " ".join(fields[key] for key in ("vendor_id", "model name") if key in fields)
