"""Which tensors of a layer write to the residual stream, found and proved on a small model of the same class.

A layer whose writers are zero returns its input, bit for bit. The writers of a family that nobody described are found
in a small model with random weights: all weights that could write are set to zero, then those are given back, the
earliest first, without which the layer still returns its input. What stays zero is the last projection of each path.
Then every zeroed weight must have a gradient, and nothing else of such a layer may reach the rest of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .built import CannotBuild, build, reason, resolved_config
from .small_model import Misbehaviour, SmallModel, pattern_of
from .tiny_config import narrow_configs, short_config, structures, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


_LARGEST = 60_000_000  # parameters of a small model


@dataclass(frozen=True)
class KindOfLayer:
    """The layers of one kind, and their writers.

    Attributes:
        layers: Their numbers.
        zeroed: The names of the tensors under a layer's prefix that must be zero for the layer to be the identity;
            experts are ``*``. Names of stored tensors and those of transformers' modules, where they differ.
        kept: The names of all others.
        reason: Why zeros do not make such a layer the identity; None where they do.
    """

    layers: tuple[int, ...]
    zeroed: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()
    reason: str | None = None


@dataclass(frozen=True)
class Discovery:
    """What was found about the layers of a model.

    Attributes:
        model_type: Of the text stack.
        kinds: The kinds of layers, each with its writers or a reason; none where there is a reason for all.
        reason: Why nothing could be found out; None where something was.
    """

    model_type: str
    kinds: tuple[KindOfLayer, ...] = ()
    reason: str | None = None

    def kind_of(self, layer: int) -> KindOfLayer | None:
        """The kind of a layer; None where nothing was found out."""
        return next((kind for kind in self.kinds if layer in kind.layers), None)

    def must_be_zero(self, layer: int, name: str) -> bool | None:
        """Whether a tensor must be zero for its layer to be the identity.

        Args:
            layer: The layer.
            name: The tensor's name under the layer's prefix, stored or transformers'.

        Returns:
            None where it is not known: the tensor is not one that transformers saves, or there is a reason. A layer
            with such a tensor must not be taken for one that zeros make the identity.
        """
        kind, name = self.kind_of(layer), pattern_of(name)
        if kind is None or kind.reason is not None or name not in kind.zeroed | kind.kept:
            return None
        return name in kind.zeroed


def find_writers(config: Mapping[str, Any], layer_prefix: str = "") -> Discovery:
    """Find the tensors that write to the residual stream, in every kind of layer. Needs no weights.

    Args:
        config: The model's config.json.
        layer_prefix: The prefix of a layer's tensor names with ``{layer}``, which says which stack is meant of a model
            with an encoder and a decoder; without one, the text stack.

    Returns:
        The writers of each kind of layer, or the reason why they were not found.
    """
    model_type = str(config.get("model_type"))
    try:
        with _offline():
            whole = text_config(resolved_config(config))
            return _found(whole, layer_prefix)
    except CannotBuild as error:
        return Discovery(model_type, reason=str(error))


def _found(config: PreTrainedConfig, layer_prefix: str) -> Discovery:
    model_type = config.model_type
    real = structures(config, layer_prefix)
    problem = "no small config could be made"
    for narrow in narrow_configs(config, len(real)):
        try:
            wide = structures(narrow, layer_prefix)
            if len(wide) != len(real) or not _refines(wide, real):
                problem = "a small model has other kinds of layers"
                continue
            short = short_config(narrow, layer_prefix)
            if (count := sum(p.numel() for p in build(short, language_model=True).parameters())) > _LARGEST:
                problem = f"the smallest has {count} parameters"
                continue
            model = SmallModel(short, layer_prefix)
        except (CannotBuild, Misbehaviour) as error:
            problem = str(error)
            continue
        return _proved(model_type, model, wide, structures(short, layer_prefix))
    return Discovery(model_type, reason=f"a small model of this family could not be run: {problem}")


def _refines(small: tuple[tuple, ...], real: tuple[tuple, ...]) -> bool:
    """Whether layers that are alike in a small model have the same modules and tensors in the real one."""
    modules = {}
    return all(
        modules.setdefault(one, names) == names
        for one, names in ((s, tuple(k for k, _ in r)) for s, r in zip(small, real, strict=True))
    )


def _proved(model_type: str, model: SmallModel, wide: tuple[tuple, ...], short: tuple[tuple, ...]) -> Discovery:
    kinds = []
    numbers: dict[tuple, list[int]] = {}
    for layer, structure in enumerate(wide):
        numbers.setdefault(structure, []).append(layer)
    for structure, layers in numbers.items():
        own = tuple(i for i, other in enumerate(short) if other == structure)
        try:
            zeroed, kept = model.writers(own)
            kinds.append(
                KindOfLayer(tuple(layers), frozenset(map(pattern_of, zeroed)), frozenset(map(pattern_of, kept)))
            )
        except Misbehaviour as error:
            kinds.append(KindOfLayer(tuple(layers), reason=str(error)))
    good = [kind for kind in kinds if kind.reason is None]
    for one in good:
        for other in good:
            if one.zeroed & other.kept:
                name = min(one.zeroed & other.kept)
                return Discovery(
                    model_type, reason=f"{name} writes to the residual stream in some layers, not in others"
                )
    mixed = [name for kind in good for name in kind.zeroed & kind.kept]
    if mixed:
        return Discovery(
            model_type, reason=f"{min(mixed)} writes to the residual stream for some experts, not for others"
        )
    return Discovery(model_type, tuple(kinds))


@contextmanager
def _offline():
    """Without the network, random numbers of others, warnings and progress bars."""
    import torch
    from huggingface_hub import constants
    from transformers.utils import logging

    level, offline = logging.get_verbosity(), constants.HF_HUB_OFFLINE
    logging.set_verbosity_error()
    constants.HF_HUB_OFFLINE = True
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    except CannotBuild:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, ImportError) as error:
        raise CannotBuild(f"a small model of this family does not run: {reason(error)}") from error
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(level)
