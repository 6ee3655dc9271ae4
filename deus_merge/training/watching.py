"""Checks that frozen weights stay frozen, and measures how new layers grow, in any training loop."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import TrainingError
from ..core.tensors import Action
from .freeze import new_layers, new_names, read_training, unsaved
from .names import parameters_of
from .quantized import is_codes, stored_tensors

if TYPE_CHECKING:
    import torch
    from torch.nn import Module, Parameter

_CHUNK = 16 << 20  # bytes of a tensor that are hashed at a time


class Watch:
    """Stores the sha256 of every frozen weight, that of a quantised one with its scales; memory does not grow with the
    model.

    Args:
        model: As `freeze_base` left it, with or without adapters, wrapped or not.
        path: The output folder, or its manifest.
        generation: As given to `freeze_base`.

    Raises:
        CheckpointError, TrainingError: as `freeze_base`; or a weight of the base would train, or no new one.

    Attributes:
        unsaved: As in `Trainable`.
    """

    def __init__(self, model: Module, path: Path | str, generation: int = -1):
        manifest = read_training(path)
        parameters = parameters_of(model, manifest)
        base = parameters.base
        new = base.keys() & new_names(manifest, generation)
        for name, parameter in base.items():
            if parameter.requires_grad and name not in new:
                raise TrainingError(
                    "a weight of the base would train", where=name, hint="call freeze_base on the model"
                )
            if hasattr(parameter, "ds_tensor"):
                raise TrainingError(
                    "weights that DeepSpeed's ZeRO-3 has split up cannot be watched",
                    where=name,
                    hint="train without it, and let `deus-merge verify` compare the trained folder with the base",
                )
        if not any(base[name].requires_grad for name in new):
            raise TrainingError(
                "no new layer trains",
                where=type(model).__name__,
                hint="call freeze_base on the model; if peft wraps it (trl's peft_config does), call it afterwards:"
                " peft freezes all other parameters",
            )
        self.unsaved = unsaved(parameters, new)
        self._frozen = {name: parameter for name, parameter in base.items() if not parameter.requires_grad}
        quantized = {id(parameter) for parameter in self._frozen.values() if is_codes(parameter)}
        self._owners = {
            id(p): module for module in model.modules() for p in module.parameters(recurse=False) if id(p) in quantized
        }
        self._sums = self._checksums()
        self._layers: dict[int, dict[str, Parameter]] = {}
        for layer in new_layers(manifest, generation):
            prefix = manifest.prefix_of(layer)
            self._layers[layer] = {name: p for name, p in base.items() if name.startswith(prefix)}
        self._zeroed = [name for name in new if manifest.model_tensors[name].action is Action.ZEROS]

    def check(self) -> int:
        """Compare every frozen weight with its value at the start.

        Returns:
            The number of frozen weights.

        Raises:
            TrainingError: one has changed.
        """
        for name, digest in self._checksums().items():
            if digest != self._sums[name]:
                raise TrainingError(
                    "a frozen weight has changed",
                    where=name,
                    expected="the value it had when the training began",
                    hint="find what writes to it: an optimizer created before freeze_base, or a merged adapter",
                )
        return len(self._sums)

    def _checksums(self) -> dict[str, bytes]:
        def checksum(parameter: Parameter) -> bytes:
            owner = self._owners.get(id(parameter))
            return _checksum({"": parameter} if owner is None else stored_tensors(owner))

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashing lets go of the interpreter's lock
            return dict(zip(self._frozen, pool.map(checksum, self._frozen.values()), strict=True))

    def norms(self, per_layer: bool = False) -> dict[str, torch.Tensor]:
        """Norms of the new weights, and of those that began as zeros.

        Args:
            per_layer: Also for each new layer.

        Returns:
            ``new_layers/norm``, ``new_layers/zeroed_norm``; with ``per_layer`` also ``new_layers/17/norm`` ...
        """
        found = self._by_layer("norm", lambda parameter: parameter, per_layer)
        weights = {name: p for layer in self._layers.values() for name, p in layer.items()}
        return found | {"new_layers/zeroed_norm": _norm(weights[name] for name in self._zeroed)}

    def gradient_norms(self, per_layer: bool = False) -> dict[str, torch.Tensor]:
        """Norms of the new weights' gradients; without an entry where there are none (DeepSpeed stores them elsewhere).

        Args:
            per_layer: Also for each new layer.

        Returns:
            ``new_layers/grad_norm``; with ``per_layer`` also ``new_layers/17/grad_norm`` ...
        """
        return self._by_layer("grad_norm", lambda parameter: parameter.grad, per_layer)

    def _by_layer(
        self, quantity: str, value: Callable[[Parameter], torch.Tensor | None], per_layer: bool
    ) -> dict[str, torch.Tensor]:
        found = {}
        values = {
            layer: [v for p in part.values() if (v := value(p)) is not None] for layer, part in self._layers.items()
        }
        if any(values.values()):
            found[f"new_layers/{quantity}"] = _norm(v for part in values.values() for v in part)
        if per_layer:
            found |= {f"new_layers/{layer}/{quantity}": _norm(part) for layer, part in values.items() if part}
        return found


def _norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The norm of all tensors together, (), in float32: of the whole tensors where they are sharded."""
    import torch

    squares = [torch.linalg.vector_norm(t.detach(), dtype=torch.float32) ** 2 for t in tensors]
    squares = [s.full_tensor() if hasattr(s, "full_tensor") else s for s in squares]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


def _checksum(tensors: Mapping[str, Any]) -> bytes:
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        shard = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # the part that is on this process
        flat = shard.reshape(-1).view(torch.uint8)  # (nbytes,)
        digest.update(f"{name} {len(flat)} ".encode())
        for chunk in flat.split(_CHUNK):
            digest.update(memoryview(chunk.cpu().numpy()))
    return digest.digest()
