"""One folder of plug-in files -> a read-only mapping by file name: adding something is adding one file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

#: modules of a plug-in folder that are no plug-ins; so are those whose names begin with an underscore
NOT_PLUGINS = ("base", "registry")


@cache
def plugins(package: str, attribute: str) -> Mapping[str, object]:
    """The object called ``attribute`` of every plug-in module in ``package``, by module name, sorted.

    Args:
        package: Dotted name of a package whose modules are the plug-ins.
        attribute: The name each module must define.

    Raises:
        AttributeError: a module without ``attribute``; that is a bug in the module.
    """
    folder = importlib.import_module(package)
    names = sorted(
        m.name
        for m in pkgutil.iter_modules(folder.__path__)
        if not m.name.startswith("_") and m.name not in NOT_PLUGINS
    )
    return MappingProxyType({n: getattr(importlib.import_module(f"{package}.{n}"), attribute) for n in names})
