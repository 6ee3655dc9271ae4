"""Muon on matrices and AdamW on everything else, as one optimizer. Imports torch, and is imported when it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import Parameter

from ..core.errors import TrainingError
from .matrices import Split

#: every update of a matrix has the root mean square of AdamW's, so that one learning rate is right for both
_SCALE = "match_rms_adamw"


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for groups with ``algorithm: muon``, `torch.optim.AdamW` for the others.

    All state is in ``state`` and ``param_groups``: schedulers, ``state_dict`` and gradient scalers see one optimizer.
    A parameter that consists of several matrices (fused projections, experts) has one momentum of its own shape, and
    each of its matrices is orthogonalised by itself.

    Args:
        groups: Parameter groups with ``algorithm``, ``lr`` and ``weight_decay``.
        splits: The matrices of every parameter in Muon's groups.
        lr: The learning rate of groups that have none.
        betas, eps: Of AdamW.
        momentum: Of Muon, by Nesterov's rule.

    Raises:
        TrainingError: this torch has no Muon.

    Reference:
        Jordan, Muon: an optimizer for hidden layers in neural networks, 2024. The scale 0.2 sqrt(max(m, n)) of an
        update (m, n) is that of Liu et al., Muon is scalable for LLM training, arXiv 2502.16982, section 2.2.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        splits: Mapping[Parameter, Split],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
    ):
        if not hasattr(torch.optim, "Muon"):
            raise TrainingError(
                "this torch has no Muon",
                where="torch.optim.Muon",
                expected="torch 2.9 or newer",
                got=f"torch {torch.__version__}",
                hint='kind="adamw" needs no newer one',
            )
        defaults = {"algorithm": "adamw", "lr": lr, "weight_decay": 0.0, "betas": betas, "eps": eps}
        super().__init__(groups, defaults | {"momentum": momentum})
        self.splits = dict(splits)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"splits": self.splits}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Computes the loss and the gradients anew, where the caller has not.

        Returns:
            The closure's loss; None without one.

        Raises:
            TrainingError: a matrix is sharded: its update needs the whole of it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        others = []
        for group in self.param_groups:
            if group["algorithm"] != "muon":
                others.append(group)
                continue
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._muon(parameter, group)
        if others:
            adamw = torch.optim.AdamW(others)  # the same groups, to which it adds the settings that they lack
            adamw.state = self.state
            adamw.step()
        return loss

    def _muon(self, parameter: Parameter, group: Mapping[str, Any]) -> None:
        gradient, split = parameter.grad, self.splits.get(parameter)
        assert gradient is not None
        if split is None or hasattr(parameter, "to_local") or parameter.ndim not in (2, 3):
            raise TrainingError(
                "Muon needs whole matrices, and this one is sharded",
                where=f"a parameter of shape {list(parameter.shape)}",
                expected="one process, or DistributedDataParallel",
                got=type(parameter).__name__,
                hint='kind="adamw" works with FSDP',
            )
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        whole = [split(tensor) for tensor in (parameter.detach(), gradient, state["momentum_buffer"])]
        # (m, n) each: views, except where the rows of a matrix are not evenly spaced in the parameter
        matrices, gradients, momenta = ([view.flatten(0, -2) for view in views] for views in whole)
        for matrix, part in zip(matrices, gradients, strict=True):
            matrix.grad = part
        settings = {name: group[name] for name in ("lr", "weight_decay", "momentum")}
        muon = torch.optim.Muon(matrices, adjust_lr_fn=_SCALE, **settings)
        muon.state.update(
            (matrix, {"momentum_buffer": momentum}) for matrix, momentum in zip(matrices, momenta, strict=True)
        )
        muon.step()
        for views, computed in ((whole[0], matrices), (whole[2], momenta)):
            for view, result in zip(views, computed, strict=True):
                if view.data_ptr() != result.data_ptr():
                    view.copy_(result.view_as(view))
