"""The simulated device is as strict as a GPU, and counts right."""

from __future__ import annotations

import pytest
import simulated
import torch
from device_runs import IS_SIMULATED

pytestmark = pytest.mark.skipif(not IS_SIMULATED, reason="about the simulated device")


def refusals() -> dict[str, str]:
    """What happened to operations that CUDA refuses: name -> the error, "" for none."""
    x = torch.ones(3, 4).to(simulated.register())
    operations = {
        "sum": lambda: x + torch.ones(3, 4),
        "in place": lambda: x.add_(torch.ones(4)),
        "product": lambda: torch.ones(2, 3) @ x,
        "into a CPU tensor": lambda: torch.ones(3, 4).add_(x),
        "indices": lambda: x[torch.tensor([0, 1])],
        "concatenation": lambda: torch.cat([x, torch.ones(3, 4)]),
        "numpy": lambda: x.numpy(),
    }
    errors = {}
    for name, operation in operations.items():
        try:
            operation()
        except (RuntimeError, TypeError) as error:
            errors[name] = str(error)
        else:
            errors[name] = ""
    return errors


def counted() -> dict[str, simulated.Transfers]:
    """The transfers of some operations."""
    x = torch.arange(12.0).view(3, 4).to(simulated.register())
    operations = {
        "upload": lambda: torch.ones(5).to(x.device),
        "download": lambda: x.cpu(),
        "download in another dtype": lambda: x.to("cpu", torch.float64),
        "list": lambda: x[0].tolist(),
        "number": lambda: float(x.sum()),
        "number as a tensor": lambda: x.sum().cpu(),
        "comparison": lambda: bool((x > 3).any()),
        "condition": lambda: x.sum() if x[0, 0] > 1 else None,
        "mask": lambda: x[x > 3],
        "assignment by a mask": lambda: x.__setitem__(x > 3, 0.0),
        "nonzero": lambda: x.nonzero(),
        "on the device": lambda: (x @ x.t()).softmax(1).add_(2.5).reshape(-1)[torch.arange(2, device=x.device)],
    }
    found = {}
    for name, operation in operations.items():
        with simulated.recording() as found[name]:
            operation()
    return found


def gradients() -> list[list[float]]:
    """The gradient of a function whose backward pass reads saved results."""
    weight = torch.linspace(-1, 1, 4).view(2, 2)
    results = []
    for device in (torch.device("cpu"), simulated.register()):
        w = weight.to(device).requires_grad_()
        loss = (w @ w).relu_().norm().square()
        results.append(torch.autograd.grad(loss, w)[0].flatten().tolist())
    return results


def test_mixed_devices_are_refused(device_process):
    assert all(device_process.call(refusals).values())


def test_what_is_counted(device_process):
    found = device_process.call(counted)
    seen = {name: (t.uploads, t.downloads, t.scalar_reads, t.value_sizes) for name, t in found.items()}
    assert seen == {
        "upload": ([20], [], 0, 0),
        "download": ([], [48], 0, 0),
        "download in another dtype": ([], [96], 0, 0),
        "list": ([], [16], 0, 0),
        "number": ([], [], 1, 0),
        "number as a tensor": ([], [], 1, 0),
        "comparison": ([], [], 1, 0),
        "condition": ([], [], 1, 0),
        "mask": ([], [], 0, 1),
        "assignment by a mask": ([], [], 0, 1),
        "nonzero": ([], [], 0, 1),
        "on the device": ([], [], 0, 0),
    }


def test_gradients(device_process):
    on_cpu, ours = device_process.call(gradients)
    assert ours == on_cpu and any(on_cpu)


def test_the_device_is_not_in_this_process():
    """The tests' own process must stay as it was: torch.accelerator would change for every other test."""
    assert not simulated._libraries
