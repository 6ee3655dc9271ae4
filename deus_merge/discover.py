"""One folder of plug-in files -> a read-only mapping by file name: adding something is adding one file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType


@cache
def plugins(package: str, attribute: str) -> Mapping[str, object]:
    """The object called ``attribute`` of every module in ``package``, by module name, sorted.

    Args:
        package: Dotted name of a package whose modules are the plug-ins.
        attribute: The name each module must define.

    Raises:
        AttributeError: a module without ``attribute``; that is a bug in the module.
    """
    folder = importlib.import_module(package)
    names = sorted(m.name for m in pkgutil.iter_modules(folder.__path__) if not m.name.startswith("_"))
    return MappingProxyType({n: getattr(importlib.import_module(f"{package}.{n}"), attribute) for n in names})
