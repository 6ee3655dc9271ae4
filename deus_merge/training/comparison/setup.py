"""What of a model trains in a run, and its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..freeze import freeze_base, new_parameters
from ..matrices import linear_splits
from ..optimizers import optimizer as new_layers_optimizer
from ..quantized import is_codes
from .candidates import RANDOM, Job

if TYPE_CHECKING:
    import torch
    from torch.nn import Module

_BETAS = (0.9, 0.95)
_NORMED_LR = 1e-5  # for zeros with norms behind them: any step makes them as large as others


def prepare(model: Any, job: Job) -> tuple[Any, Callable[[], torch.optim.Optimizer]]:
    """The model with what trains, and what makes its optimizer once it is on its device."""
    chosen = job.candidate.parsed_optimizer
    if job.candidate.grown:
        trainable = freeze_base(model, job.folder)
        if job.candidate.init.endswith(RANDOM):
            _draw(model, new_parameters(job.folder), job.seed)
        settings: dict[str, Any] = {"lr": job.lr, "kind": chosen.kind, "betas": _BETAS}
        settings |= {"zeroed_lr": _NORMED_LR} if trainable.normed else {"output_ratio": chosen.output_ratio}
        return model, lambda: new_layers_optimizer(model, job.folder, **settings)
    kind, _, amount = job.candidate.init.partition(":")
    if kind == "lora":
        import peft

        config = peft.LoraConfig(r=int(amount), lora_alpha=int(amount), target_modules="all-linear")
        model = peft.get_peft_model(model, config)
    elif kind == "top":
        prefixes = _top_layers(model, int(amount))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(prefixes))
    return model, lambda: _plain_optimizer(model, chosen.kind, job.lr)


def _plain_optimizer(model: Module, kind: str, lr: float) -> torch.optim.Optimizer:
    """The optimizer of a model that did not grow."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "adamw":
        return torch.optim.AdamW(trained, lr=lr, betas=_BETAS, weight_decay=0.0)
    from ..muon import MuonAdamW

    splits = linear_splits(model)
    matrices = [p for p in trained if p in splits]
    rest = [p for p in trained if p not in splits]
    groups = [
        {"params": matrices, "algorithm": "muon", "lr": lr, "weight_decay": 0.0},
        {"params": rest, "algorithm": "adamw", "lr": lr, "weight_decay": 0.0},
    ]
    return MuonAdamW([g for g in groups if g["params"]], splits, lr=lr, betas=_BETAS)


def _top_layers(model: Module, count: int) -> tuple[str, ...]:
    """The prefixes of the names of the top layers."""
    name, layers = main_layers(model)
    return tuple(f"{name}.{index}." for index in range(len(layers) - count, len(layers)))


def main_layers(model: Module) -> tuple[str, Any]:
    """The longest list of modules of a model, with its name: its layers."""
    from torch import nn

    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda pair: (len(pair[1]), -len(pair[0])))


def _draw(model: Module, names: Iterable[str], seed: int) -> None:
    """Draw matrices of new layers that are not zero anew, with the deviation of what they replace."""
    import torch

    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(1000 + seed)
    for name in names:
        parameter = parameters.get(name)
        if parameter is not None and parameter.ndim == 2 and parameter.any():
            parameter.data.normal_(0.0, float(parameter.data.std()), generator=generator)


def narrow(model: Any) -> None:
    """Keep frozen matrices in the dtype of the arithmetic, all but the embeddings: the residual stream is float32."""
    import torch

    embeddings = model.get_input_embeddings().weight
    for parameter in model.parameters():
        codes = is_codes(parameter)
        if not parameter.requires_grad and parameter.ndim >= 2 and not codes and parameter is not embeddings:
            parameter.data = parameter.data.to(torch.bfloat16)


def lora_rank(shapes: Sequence[tuple[int, int]], parameters: int) -> int:
    """The rank of adapters of linear layers (m, n) that have about as many parameters as are given, at least 1."""
    return max(1, round(parameters / sum(m + n for m, n in shapes)))
