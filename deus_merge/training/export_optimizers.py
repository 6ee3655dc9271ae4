"""What other trainers can express of `optimizers.optimizer`; an error where one cannot, a comment where it differs.

Checked against

- axolotl 0.18.0: ``lr_groups`` gives the weights whose names contain one of its ``modules`` a learning rate of their
  own, biases and norms never (``core/trainers/mixins/optimizer.py``). ``optimizer: muon`` is a factory that ignores
  ``lr_groups`` (``axolotl-contribs-mit`` 0.0.6, ``muon/muon.py``): it scales updates by 0.2 sqrt(max(m, n)), leaves out
  all parameters with one axis, and fails on those with three. With a device mesh (FSDP2) it is another Muon with
  another scale.
- LLaMA-Factory 0.9.5: ``use_muon`` (``train/trainer_utils.py``, ``third_party/muon``) has the same scale, gives
  parameters with two axes to Muon and all others to AdamW, and decays all of them. ``loraplus_lr_ratio`` raises the
  rate of adapters' B and of vectors: there is no setting for the rate of chosen weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.header import parse_json, read_small
from ..core.errors import TrainingError
from ..core.tensors import Action
from ..models.view import view_model
from ..report.manifest import Manifest
from .freeze import new_names
from .optimizers import check_kind, check_rates, without_zeros

_EXPERT = re.compile(r"\.experts\.\d+\.")  # transformers makes one tensor of all


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer that exported settings are to have.

    Attributes:
        kind, lr, output_ratio: As for `optimizers.optimizer`.
    """

    kind: str
    lr: float
    output_ratio: float = 1.0

    @property
    def arguments(self) -> str:
        """The arguments of `optimizers.optimizer`, as Python text."""
        ratio = f", output_ratio={self.output_ratio!r}" if self.output_ratio != 1 else ""
        return f"kind={self.kind!r}, lr={self.lr!r}{ratio}"


def settings_of(kind: str | None, lr: float | None, output_ratio: float) -> OptimizerSettings | None:
    """What was asked for; None where nothing was.

    Raises:
        TrainingError: an unknown optimizer, no learning rate, or one that is not positive.
    """
    if kind is None and lr is None and output_ratio == 1:
        return None
    kind = check_kind(kind or "adamw")
    if lr is None:
        raise TrainingError("an optimizer needs a learning rate", where="lr", hint="training.find_lr suggests one")
    check_rates(lr=lr, output_ratio=output_ratio)
    return OptimizerSettings(kind, lr, output_ratio)


@dataclass(frozen=True)
class Exported:
    """Settings of a trainer, and the lines of comment that say where they differ from `optimizers.optimizer`."""

    settings: Mapping[str, Any]
    comments: tuple[str, ...] = ()


def for_axolotl(wanted: OptimizerSettings, out: Path, manifest: Manifest) -> Exported:
    """The keys of axolotl's YAML.

    Raises:
        TrainingError: they cannot express it.
    """
    new = new_names(manifest)
    experts = next(
        (name for name in new if _EXPERT.search(name) or len(manifest.model_tensors[name].shape or ()) > 2), None
    )
    if wanted.kind == "muon":
        if wanted.output_ratio != 1:
            raise _refused("axolotl", "its Muon ignores lr_groups", f"output_ratio {wanted.output_ratio:g}")
        if experts is not None:
            raise _refused("axolotl", "its Muon takes tensors with two axes only", experts)
        comments = (
            "# this Muon does not train norms and biases; every tensor with two axes is one matrix to it"
            + _fused(out, manifest),
            "# with FSDP2 axolotl has another Muon, whose updates have another size: learning_rate is not for that one",
        )
        return Exported({"optimizer": "muon", "learning_rate": wanted.lr}, comments)
    settings: dict[str, Any] = {"optimizer": "adamw_torch_fused", "learning_rate": wanted.lr}
    if wanted.output_ratio == 1:
        return Exported(settings)
    zeroed = [name for name in new if manifest.model_tensors[name].action is Action.ZEROS]
    if not zeroed:
        return Exported(settings, (f"# {without_zeros(manifest, wanted.output_ratio)}",))
    weights = [name for name in zeroed if len(manifest.model_tensors[name].shape or ()) > 1]
    if numbered := next(filter(_EXPERT.search, weights), None):
        raise _refused("axolotl", "the name of this tensor in a loaded model is not known", numbered)
    if also := next((name for name in new if name not in weights and any(w in name for w in weights)), None):
        raise _refused("axolotl", "lr_groups would also match this tensor", also)
    comments = ()
    if biases := [name for name in zeroed if name not in weights]:
        comments = (f"# lr_groups leaves out biases: {biases[0]} and {len(biases) - 1} more train at learning_rate",)
    rate = _rounded(wanted.lr * wanted.output_ratio)
    return Exported(settings | {"lr_groups": [{"name": "zeroed", "modules": weights, "lr": rate}]}, comments)


def for_llama_factory(wanted: OptimizerSettings, out: Path, manifest: Manifest) -> Exported:
    """The keys of LLaMA-Factory's YAML.

    Raises:
        TrainingError: they cannot express it.
    """
    if wanted.output_ratio != 1:
        has = "it has one learning rate for all; loraplus_lr_ratio is for adapters"
        raise _refused("LLaMA-Factory", has, f"output_ratio {wanted.output_ratio:g}")
    if wanted.kind == "adamw":
        return Exported({"optim": "adamw_torch", "learning_rate": wanted.lr})
    comments = [
        "# every tensor with two axes is one matrix to this Muon" + _fused(out, manifest),
        "# weight_decay, if you set it, is also that of norms and biases",
    ]
    if any(_EXPERT.search(name) or len(manifest.model_tensors[name].shape or ()) > 2 for name in new_names(manifest)):
        comments.append("# experts are tensors with three axes: AdamW trains them")
    return Exported({"use_muon": True, "learning_rate": wanted.lr}, tuple(comments))


def _refused(trainer: str, reason: str, got: str) -> TrainingError:
    hint = "--for trainer can; or leave out --output-ratio, or --optimizer, which then is the trainer's own"
    return TrainingError(f"{trainer} cannot express this optimizer", expected=reason, got=got, hint=hint)


def _fused(out: Path, manifest: Manifest) -> str:
    """The end of a comment: a new tensor that consists of several matrices; nothing where there is none."""
    place = out / "config.json"
    view = view_model(parse_json(read_small(place), place, "config"), tuple(manifest.model_tensors), place)
    new = {*new_names(manifest)}
    for names, specs in zip(view.layers, view.specs, strict=True):
        for role, spec in specs.items():
            shape = manifest.model_tensors[names[role]].shape or ()
            if names[role] in new and len(shape) == 2 and spec.layout and len(spec.layout.specs(shape)) > 1:
                return f", even if it consists of several: {names[role]}"
    return ""


def _rounded(value: float) -> float:
    """Without the digits that a product adds: 3e-4 · 3 is 9e-4."""
    return round(value, 12 - math.floor(math.log10(value)))
