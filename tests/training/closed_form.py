"""The oracle of the closed form: the whole model in float64, and autograd."""

from __future__ import annotations

from pathlib import Path

import torch
from support import load


class Whole:
    """The oracle: the whole model in float64, and autograd."""

    def __init__(self, folder: Path):
        self.model = load(folder).double()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    def statistics(self, layer: int, names: list[str], ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the writers read (n, m) and the negative gradient behind the layer (n, d)."""
        read, behind = {}, []

        def keep(module, arguments, output):
            hidden = output[0] if isinstance(output, tuple) else output
            behind.append(hidden.detach().requires_grad_())
            return (behind[0], *output[1:]) if isinstance(output, tuple) else behind[0]

        hooks = [self.layers[layer].register_forward_hook(keep)]
        for name in names:
            module = self.model.get_submodule(name.removesuffix(".weight"))
            hooks.append(module.register_forward_pre_hook(lambda m, a, n=name: read.__setitem__(n, a[0])))
        logits = self.model(ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, behind[0])
        for hook in hooks:
            hook.remove()
        phi = torch.cat([read[name].flatten(0, 1) for name in names], dim=1)
        return phi.detach(), -gradient.flatten(0, 1)

    @property
    def layers(self):
        return self.model.base_model.layers


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for the norms, which transformers computes in float32."""
    return bool((one - other).abs().max() < 2e-5 * other.abs().max())
