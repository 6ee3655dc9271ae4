"""Where new layers go: forms that recipes name, and places chosen by what the base model's layers do."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from deus_merge.report.manifest import read_manifest

from .inits import INITS
from .training import Scratch, Setting, loss_of, mixed

#: A quarter more layers, as arXiv 2604.00489 places them; ``even`` is its interleaved.
QUARTERS = ("even", "sandwich", "top", "middle", "bottom")


def places(setting: Setting, files: Scratch) -> dict[str, object]:
    """Name -> ``insert``: halves and all gaps, then a quarter more layers by name, where neighbours are least alike (by
    the transport cost between their neurons), and below the layers that the model needs most and least."""
    after = needed(setting, files)
    quarter = max(1, (len(after) + 1) // 4)
    costs = transport_costs(setting, files)
    return {
        "all": "all",
        "bottom_half": "bottom_half",
        **{where: {"count": quarter, "where": where} for where in QUARTERS},
        "least_alike": {"after": _highest(costs, quarter)},
        "most_needed": {"after": _highest(after, quarter)},
        "least_needed": {"after": _highest([-x for x in after], quarter)},
    }


def _highest(values: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda i: -values[i])[:count])


@torch.no_grad()
def needed(setting: Setting, files: Scratch) -> list[float]:
    """Held-out loss of the text without layer i+1, for every gap i."""
    model = AutoModelForCausalLM.from_pretrained(setting.folder, dtype=torch.float32)
    ids, layers, losses = files.windows("text", 0)["held_out"], model.model.layers, []
    with mixed():
        h = model.model.embed_tokens(ids)
        for gap in range(len(layers) - 1):
            without = [layer for i, layer in enumerate(layers) if i != gap + 1]
            losses.append(float(loss_of(model, without, h, ids)))
    return losses


def transport_costs(setting: Setting, files: Scratch) -> list[float]:
    """Cost of the transport plan between the neurons of neighbouring layers, for every gap."""
    folder = Scratch(files.root, setting.at("all")).deeper("symmetry", INITS["symmetry"])
    told = [layer.diagnostics for layer in read_manifest(folder).layers if layer.new]
    return [next(d["transport_cost"] for d in of if "transport_cost" in d) for of in told]
