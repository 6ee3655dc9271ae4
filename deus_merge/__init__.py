"""Deeper language models by optimal transport: merge, fuse and up-scale checkpoints from YAML recipes.

::

    import deus_merge as dm

    dm.upscale("HuggingFaceTB/SmolLM2-135M-Instruct", "deeper", insert="even")
    dm.verify("deeper")

The functions are those of `deus_merge.api`, which is imported when one of them is first used. Four of them have the
names of folders of this package: ``dm.plan``, ``dm.verify``, ``dm.report`` and ``dm.methods`` are these folders, and
can be called.
"""

from __future__ import annotations

import importlib
import inspect as _inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import api, training
    from .api import (
        Budget,
        Calibrated,
        CalibrationOptions,
        Catalog,
        CompareOptions,
        Comparison,
        DeusMergeError,
        Fit,
        GapScore,
        Inspection,
        LoadOptions,
        MergeResult,
        Piece,
        Plan,
        Progress,
        Recipe,
        RunOptions,
        ShardWriter,
        Share,
        Stripped,
        TrainingSettings,
        Verification,
        calibrate,
        compare,
        export_training,
        finish,
        fit,
        inspect,
        make_share,
        merge,
        methods,
        pieces,
        plan,
        preflight,
        report,
        run_blocks,
        score_gaps,
        strip,
        upscale,
        upscale_recipe,
        verify,
    )

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "api",
    "Budget",
    "Calibrated",
    "CalibrationOptions",
    "Catalog",
    "CompareOptions",
    "Comparison",
    "DeusMergeError",
    "Fit",
    "GapScore",
    "Inspection",
    "LoadOptions",
    "MergeResult",
    "Piece",
    "Plan",
    "Progress",
    "Recipe",
    "RunOptions",
    "Share",
    "ShardWriter",
    "Stripped",
    "TrainingSettings",
    "Verification",
    "calibrate",
    "compare",
    "export_training",
    "finish",
    "fit",
    "inspect",
    "make_share",
    "merge",
    "methods",
    "pieces",
    "plan",
    "preflight",
    "report",
    "run_blocks",
    "score_gaps",
    "strip",
    "training",
    "upscale",
    "upscale_recipe",
    "verify",
]

_MODULES = ("api", "training")
#: folders of this package and functions of `api` at once
_BOTH = ("methods", "plan", "report", "verify")


class _Callable(ModuleType):
    """A folder of the package that is called as the function of `api` of its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    @property
    def _function(self) -> Any:
        return getattr(importlib.import_module("deus_merge.api"), self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> _inspect.Signature:
        return _inspect.signature(self._function)


class _Package(ModuleType):
    """This package. Whoever imports one of its folders sets it as an attribute here."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _BOTH and isinstance(value, ModuleType):
            value.__class__ = _Callable
        super().__setattr__(name, value)


if not TYPE_CHECKING:  # a type checker knows the names from the imports above

    def __getattr__(name: str) -> Any:
        if name in _MODULES or name in _BOTH:
            return importlib.import_module(f"{__name__}.{name}")
        if name in __all__:
            value = getattr(importlib.import_module(f"{__name__}.api"), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
