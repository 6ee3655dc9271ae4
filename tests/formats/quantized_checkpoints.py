"""Quantised checkpoints of every format, each made once: fixtures for every folder of tests that imports them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

import makers
import pytest
from tiny_float_models import write_float_model
from variant import Variant

VARIANTS: dict[str, Variant] = {
    name: variant
    for module in pkgutil.iter_modules(makers.__path__)
    for name, variant in importlib.import_module(f"makers.{module.name}").VARIANTS.items()
}


@pytest.fixture(scope="session")
def float_model(tmp_path_factory) -> Callable[[str, int], Path]:
    """A folder with one of the float models, by name and seed."""
    made: dict[tuple[str, int], Path] = {}

    def folder(name: str, seed: int = 0) -> Path:
        if (name, seed) not in made:
            made[name, seed] = tmp_path_factory.mktemp(name) / f"seed{seed}"
            write_float_model(name, made[name, seed], seed)
        return made[name, seed]

    return folder


@pytest.fixture(scope="session")
def quantized(tmp_path_factory, float_model) -> Callable[[str, int], Path]:
    """A folder with a quantised checkpoint, by variant and seed. Not to be changed."""
    made: dict[tuple[str, int], Path] = {}

    def folder(name: str, seed: int = 0) -> Path:
        if (name, seed) not in made:
            made[name, seed] = tmp_path_factory.mktemp("quantised") / f"{name}-{seed}"
            VARIANTS[name].make(float_model(VARIANTS[name].model, seed), made[name, seed])
        return made[name, seed]

    return folder
