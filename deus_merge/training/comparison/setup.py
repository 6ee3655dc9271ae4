"""What of a model trains in a run, and its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import TrainingError
from ...core.text import plural
from ..freeze import freeze_base, new_parameters
from ..matrices import linear_splits
from ..optimizers import optimizer as new_layers_optimizer
from ..quantized import is_codes
from .candidates import RANDOM, Candidate, Job

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
        if job.candidate.init == RANDOM:
            _draw(model, new_parameters(job.folder), job.seed)
        settings: dict[str, Any] = {"lr": job.lr, "kind": chosen.kind, "betas": _BETAS}
        settings |= {"zeroed_lr": _NORMED_LR} if trainable.normed else {"output_ratio": chosen.output_ratio}
        return model, lambda: new_layers_optimizer(model, job.folder, **settings)
    model = _ungrown(model, job.candidate.init)
    return model, lambda: _plain_optimizer(model, chosen.kind, job.lr)


def _ungrown(model: Any, init: str) -> Any:
    """The base with what trains without growing."""
    kind, _, amount = init.partition(":")
    if kind == "lora":
        import peft

        config = peft.LoraConfig(r=int(amount), lora_alpha=int(amount), target_modules="all-linear")
        return peft.get_peft_model(model, config)
    if kind == "top":
        prefixes = _top_layers(model, int(amount))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(prefixes))
    return model


def check_ungrown(candidates: Sequence[Candidate], folder: Path) -> None:
    """Check that a base can train as it is, on a model without weights.

    Raises:
        TrainingError: it cannot.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for candidate in candidates:
        where = f"--without-growing {candidate.init}"
        config: Any = AutoConfig.from_pretrained(folder)
        quantized = getattr(config, "quantization_config", None) is not None
        if quantized and not candidate.init.startswith("lora"):
            message, hint = "weights that are stored quantised do not train", "--without-growing lora trains an adapter"
            raise TrainingError(message, where=where, hint=hint)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
        try:
            _ungrown(model, candidate.init)
        except ImportError as error:
            hint = 'pip install "deus-merge[train]"'
            raise TrainingError("a package is missing", where=where, got=str(error), hint=hint) from None
        except ValueError as error:
            message = "peft has no adapter for all linear layers of this model"
            raise TrainingError(message, where=where, got=" ".join(str(error).split())) from None


def check_length(length: int, folder: Path) -> None:
    """Check that a window is not longer than a base's positions.

    Raises:
        TrainingError: it is.
    """
    from transformers import AutoConfig

    positions = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < length:
        expected = f"at most {positions}, the positions of the model"
        raise TrainingError("the windows are too long", where="--length", expected=expected, got=length)


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
    if count > len(layers):
        expected = f"at most {plural(len(layers), 'layer')}"
        raise TrainingError("the model has fewer layers", where="--without-growing", expected=expected, got=count)
    return tuple(f"{name}.{index}." for index in range(len(layers) - count, len(layers)))


def main_layers(model: Module) -> tuple[str, Any]:
    """The layers of a model, with the name of their list: outermost, and as many as its configuration says."""
    from torch import nn

    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    config: Any = model.config
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    fitting = [pair for pair in lists if len(pair[1]) == depth]
    return min(fitting or lists, key=lambda pair: (-len(pair[1]), pair[0].count(".")))


def _draw(model: Module, names: Iterable[str], seed: int) -> None:
    """Draw matrices of new layers that are not zero anew, those of experts, too, with the deviation of what they
    replace."""
    import torch

    parameters, matrices = dict(model.named_parameters()), linear_splits(model)
    generator = torch.Generator().manual_seed(1000 + seed)
    for name in names:
        parameter = parameters.get(name)
        if parameter is not None and parameter in matrices and parameter.any():
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
