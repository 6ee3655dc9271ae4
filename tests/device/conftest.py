"""The process that computes on the device, and the models that recipes of this folder merge."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import device_runs
import pytest
from device_runs import DEVICE, DeviceProcess, Result, differences, run_recipe, tolerance
from support import make_model


def pytest_collection_modifyitems(items):
    """Where the device cannot be had, its tests are skipped."""
    if reason := device_runs.skip_reason():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device_process():
    """A process that computes on the tests' device."""
    with DeviceProcess() as process:
        yield process


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, str]:
    """Three models of one shape, by name."""
    root = tmp_path_factory.mktemp("models")
    return {name: str(make_model(root / name, layers=3, seed=seed)) for seed, name in enumerate(("base", "one", "two"))}


@pytest.fixture(scope="session")
def as_on_cpu(device_process, tmp_path_factory) -> Callable[..., Result]:
    """Run a recipe on the CPU and on the device: every tensor, and all diagnostics, must be the same. Once a recipe."""
    root, results = tmp_path_factory.mktemp("runs"), {}

    def check(recipe: Mapping[str, Any] | list[Mapping[str, Any]], **options: Any) -> Result:
        documents = recipe if isinstance(recipe, list) else [recipe]
        text = "\n---\n".join(map(json.dumps, documents))  # JSON is YAML
        key = text, *sorted(options.items())
        if key in results:
            return results[key]
        folder = root / str(len([*root.iterdir()]))
        folder.mkdir()
        file = folder / "recipe.yml"
        file.write_text(text)
        expected = run_recipe(file, folder / "cpu", "cpu", **options)
        ours = device_process.call(run_recipe, file, folder / "device", DEVICE, **options)
        assert differences(ours.folder, expected.folder, tolerance(text)) == []
        if device_runs.IS_SIMULATED:
            assert ours.diagnostics == expected.diagnostics
            assert ours.transfers.uploads, "nothing was computed on the device"
        results[key] = ours
        return ours

    return check
