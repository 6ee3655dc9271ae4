"""What transformers would report on loading a checkpoint, from names and shapes alone: no weight is read.

The tensors of the headers, without memory, go through transformers' own loading: its renamings, its conversions (one
tensor an expert to one for all, for example), its ties, and its lists of names to ignore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..core.errors import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shape = tuple[int, ...]


class CannotReport(Exception):
    """This version of transformers loads in another way; the message says so."""


@dataclass(frozen=True)
class LoadReport:
    """Names that do not load.

    Attributes:
        missing: Parameters that no stored tensor gives values to: they would be random.
        unexpected: Stored tensors, by the names that transformers gives them, that no parameter takes.
        mismatched: Parameters -> shape of their stored tensor, shape wanted.
        failed: Parameters that cannot be made from their stored tensors -> the reason.
    """

    missing: frozenset[str] = frozenset()
    unexpected: frozenset[str] = frozenset()
    mismatched: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether every stored tensor is loaded and every parameter has one."""
        return not (self.missing or self.unexpected or self.mismatched or self.failed)

    @property
    def counts(self) -> str:
        """How many names of each sort, in words."""
        sorts = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.mismatched}
        sorts["not made"] = self.failed
        return ", ".join(f"{len(found)} {sort}" for sort, found in sorts.items() if found)

    def worse_than(self, base: LoadReport, of_base: Callable[[str], Iterable[str] | None]) -> list[str]:
        """What does not load here but does in the base, each in words.

        Args:
            base: The report of the base.
            of_base: A name -> the names in the base any of which excuses it, by not being loaded either; None where it
                needs no excuse.
        """
        ours = {
            **{name: f"{name} is unexpected: no parameter takes it" for name in self.unexpected},
            **{name: f"{name} is missing: it would be random" for name in self.missing},
            **{name: f"{name} has shape {list(a)}, {list(b)} expected" for name, (a, b) in self.mismatched.items()},
            **{name: f"{name} cannot be made from the stored tensors: {why}" for name, why in self.failed.items()},
        }
        known = base.missing | base.unexpected | base.mismatched.keys() | base.failed.keys()
        names = {name: of_base(name) for name in ours}
        found = {n: text for n, text in ours.items() if (of := names[n]) is not None and not known.intersection(of)}
        order = {name: i for i, name in enumerate([*self.failed, *sorted(self.missing), *sorted(self.mismatched)])}
        return [found[name] for name in sorted(found, key=lambda n: (order.get(n, len(order)), n))]


def load_report(model: PreTrainedModel, shapes: Mapping[str, Shape]) -> LoadReport:
    """The report of loading tensors of these names and shapes into a model on the meta device.

    Args:
        model: A built model; its parameters are replaced.
        shapes: Of the stored tensors, by name.

    Raises:
        CannotReport: this version of transformers has no such loading.
    """
    import torch

    empty = {name: torch.empty(shape, dtype=torch.float32, device="meta") for name, shape in shapes.items()}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig

        mapping: Any = get_model_conversion_mapping(model, None, None)
        settings = LoadStateDictConfig(
            device_map={"": torch.device("meta")}, dtype=torch.float32, weight_mapping=mapping, dtype_plan={}
        )
        with _quiet():
            info, _ = type(model)._load_pretrained_model(model, empty, None, settings)
            _tie(model, info)
            model._adjust_missing_and_unexpected_keys(info)
    except (ImportError, AttributeError, TypeError) as error:
        import transformers

        text = printable(f"{type(error).__name__}: {error}")
        raise CannotReport(
            f"transformers {transformers.__version__} does not say what it would load ({text})"
        ) from None
    failed = {name: _last_line(text) for name, text in info.conversion_errors.items()}
    mismatched = {name: (tuple(ours), tuple(wanted)) for name, ours, wanted in info.mismatched_keys}
    missing = frozenset(info.missing_keys) - failed.keys()
    return LoadReport(missing, frozenset(info.unexpected_keys), mismatched, failed)


def _tie(model: PreTrainedModel, info) -> None:
    """Take parameters that are tied to loaded ones from the missing ones."""
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith("Error: ")]
    return printable((telling or lines or ["unknown"])[-1][:200])


@contextmanager
def _quiet():
    """Without progress bars and warnings of transformers."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
