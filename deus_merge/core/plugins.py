"""The modules of a package as a read-only mapping by file name, so that adding a plug-in is adding one file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

#: modules of a plug-in package that are not plug-ins; neither are those whose names begin with an underscore
NOT_PLUGINS = ("base", "registry")


@cache
def plugins(package: str, attribute: str) -> Mapping[str, Any]:
    """The object called ``attribute`` of every plug-in module in ``package``, by module name, sorted.

    Args:
        package: Dotted name of a package whose modules are the plug-ins.
        attribute: The name each module must define.

    Raises:
        AttributeError: a module without ``attribute``, which is a bug in the module.
    """
    folder = importlib.import_module(package)
    names = sorted(
        m.name
        for m in pkgutil.iter_modules(folder.__path__)
        if not m.name.startswith("_") and m.name not in NOT_PLUGINS
    )
    return MappingProxyType({n: getattr(importlib.import_module(f"{package}.{n}"), attribute) for n in names})
