"""A resumed run must compute with the same instructions, on the same kind of device, in the same torch."""

from __future__ import annotations

import pytest
import torch
from support import make_model, weights

from deus_merge.run import device
from deus_merge.run.compute import BlockComputer


@pytest.fixture
def interrupted(run, monkeypatch, tmp_path):
    """Arguments of a run that was stopped in its last computed block."""
    model = make_model(tmp_path / "model", layers=4)
    arguments = ["upscale", model, tmp_path / "out", "--insert", "all", "--preset", "opt_deus_paper"]
    compute = BlockComputer.compute

    def stops(self, block, *more):
        if block.index == 6:
            raise KeyboardInterrupt
        return compute(self, block, *more)

    with monkeypatch.context() as patch:
        patch.setattr(BlockComputer, "compute", stops)
        run(*arguments, expect=130)
    return arguments


@pytest.mark.parametrize("variable", ["MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"])
def test_other_instructions_are_refused(run, interrupted, monkeypatch, tmp_path, variable):
    with monkeypatch.context() as patch:
        patch.setenv(variable, "SSE4_2")
        refused = run(*interrupted, "--resume", expect=2).err
        assert "instruction_set" in refused and f"{variable}=SSE4_2" in refused
    run(*interrupted, "--resume")
    run(interrupted[0], interrupted[1], tmp_path / "whole", *interrupted[3:])
    resumed, whole = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(tensor.equal(resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(("name", "target"), [("torch", "torch.__version__"), ("device_model", "processor")])
def test_another_torch_or_processor_is_refused(run, interrupted, monkeypatch, name, target):
    if name == "torch":
        monkeypatch.setattr(target, "9.9.9")
    else:
        monkeypatch.setattr(device, target, lambda: "AnotherVendor 9")
    assert name in run(*interrupted, "--resume", expect=2).err


def test_copies_are_the_same_on_every_machine():
    assert device.machine_identity(None) == {}
    identity = device.machine_identity(torch.device("cpu"))
    assert identity["torch"] == torch.__version__
    assert identity["instruction_set"].startswith(torch.backends.cpu.get_cpu_capability())


def test_processor_is_read_from_the_kernel(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nvendor_id\t: SomeVendor\nmodel name\t: CPU 7 @ 2: 4 GHz\n\nflags\t: a b\n")
    assert device.processor(cpuinfo) == "SomeVendor CPU 7 @ 2: 4 GHz"
    assert device.processor(tmp_path / "absent") == ""
