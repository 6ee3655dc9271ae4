"""Outputs in closed form are the same on another device, up to rounding: attention there is other kernels'."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
from device_runs import DEVICE, torch_device
from support import weights

from deus_merge import api
from deus_merge.models.demo import tiny_model
from deus_merge.report.manifest import read_manifest
from deus_merge.training import calibration

TEXT = Path(__file__).parents[2] / "LICENSE"
SETTINGS = {"tokens": 1024, "length": 64}


def calibrated(folder: Path, out: Path, device: str, method: str) -> None:
    """Calibrate a folder on a device that need not be one of the command's."""
    options = calibration.CalibrationOptions(method=method, **SETTINGS)
    with mock.patch("deus_merge.training.calibration.job.choose_device", lambda name: torch_device(device)):
        calibration.calibrate(folder, out, TEXT.read_text(), options)


@pytest.mark.parametrize("method", ["ridge", "kfac"])
def test_calibrated_outputs(device_process, tmp_path, method):
    deeper = tmp_path / "deeper"
    api.merge(api.upscale_recipe(tiny_model(), preset="opt_deus"), deeper, api.RunOptions(verify=False))
    calibrated(deeper, tmp_path / "cpu", "cpu", method)
    device_process.call(calibrated, deeper, tmp_path / "device", DEVICE, method)
    expected, found = (read_manifest(tmp_path / name).calibration for name in ("cpu", "device"))
    assert found.loss_before == pytest.approx(expected.loss_before, rel=1e-4)
    assert found.loss_after == pytest.approx(expected.loss_after, rel=1e-3)
    assert found.loss_after < found.loss_before
    before, ours, want = (weights(tmp_path / name) for name in ("deeper", "device", "cpu"))
    changed = {name for name in want if not want[name].equal(before[name])}
    assert changed == {name for name in ours if not ours[name].equal(before[name])}
    assert len(changed) == 2 * len(expected.layers)
    for name in changed:
        difference = (ours[name].double() - want[name].double()).norm()
        assert difference <= 0.03 * want[name].double().norm(), name
