"""What a bug report needs to know of this machine: versions, processor, devices, limits; no names and no paths."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from typing import Any

from .. import __version__
from .device import machine_identity, processor, torch_build
from .limits import memory, open_files

_NEEDED = (
    "torch", "transformers", "safetensors", "huggingface_hub", "tokenizers", "numpy", "scipy", "POT", "xxhash",
    "PyYAML", "click", "rich", "Jinja2",
)  # fmt: skip
_OPTIONAL = ("accelerate", "peft", "datasets", "trl", "bitsandbytes", "compressed-tensors", "gguf", "matplotlib")
#: environment variables that decide how a run goes, with the values that may be shown; another value is only "set"
_VARIABLES = {
    "CUDA_VISIBLE_DEVICES": r"[\d,]*", "OMP_NUM_THREADS": r"\d+", "MKL_NUM_THREADS": r"\d+",
    "ATEN_CPU_CAPABILITY": r"\w+", "MKL_ENABLE_INSTRUCTIONS": r"\w+", "MKL_CBWR": r"[\w,]+",
    "ONEDNN_MAX_CPU_ISA": r"\w+", "PYTORCH_CUDA_ALLOC_CONF": r"[\w:,.]+", "HF_HUB_OFFLINE": r"\w+",
    "HF_ENDPOINT": "", "HF_HOME": "", "HF_HUB_CACHE": "", "TMPDIR": "",
}  # fmt: skip


def environment() -> dict[str, Any]:
    """The facts as JSON data: strings and numbers by name; sizes in bytes."""
    import torch

    limits = memory()
    devices = [_cuda_device(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())]
    return {
        "deus_merge": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": _platform(),
        "processor": processor() or platform.machine(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_set": machine_identity(torch.device("cpu"))["instruction_set"],
        "threads": torch.get_num_threads(),
        "memory": {"available_bytes": limits[0], "total_with_swap_bytes": limits[1]} if limits else None,
        "open_files": dict(zip(("limit", "highest"), open_files(), strict=True)),
        "torch_built_for": torch_build(),
        "devices": devices,
        "packages": {name: _version(name) for name in _NEEDED},
        "optional_packages": {name: version for name in _OPTIONAL if (version := _version(name))},
        "variables": {name: _shown(os.environ[name], form) for name, form in _VARIABLES.items() if name in os.environ},
    }


def _version(package: str) -> str | None:
    """The installed version of a package; None where it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _platform() -> str:
    """System, its version without names that somebody gave a kernel, the machine, and the C library."""
    release = re.match(r"[\d.]*", platform.release())
    parts = [platform.system(), release[0] if release else "", platform.machine(), *platform.libc_ver()]
    return " ".join(part for part in parts if part)


def _cuda_device(properties: Any) -> dict[str, Any]:
    """The facts about a device of CUDA."""
    capability = f"{properties.major}.{properties.minor}"
    return {"name": properties.name, "memory_bytes": properties.total_memory, "capability": capability}


def _shown(value: str, form: str) -> str:
    """A value, if it can hold no name and no path."""
    return value if form and re.fullmatch(form, value) else "(set)"
