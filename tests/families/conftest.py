"""The contract runs in full with the slow tests. Among the others every model type takes a part of it, in turn."""

from __future__ import annotations

import pytest

#: tests of the contract that every model type always takes
ALWAYS = ("test_roles_cover_the_tensors_of_every_layer", "test_symmetry_keeps_the_function_and_is_undone")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    contract = (i for i in items if isinstance(i, pytest.Function) and i.path.name == "test_contract.py")
    kinds: dict[str, list[pytest.Item]] = {}
    for item in contract:
        if item.originalname not in ALWAYS:
            kinds.setdefault(item.callspec.params["kind"], []).append(item)
    for turn, kind in enumerate(sorted(kinds)):
        for place, item in enumerate(kinds[kind]):
            if place != turn % len(kinds[kind]):
                item.add_marker(pytest.mark.slow)
