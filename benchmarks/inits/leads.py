"""The search for a better init: ideas that are not in deus_merge (yet). A new layer's outputs are zero, so all that
comes before them is free: any features may be chosen, and any basis for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from .inits import INITS, Edit, Init, preset


@torch.no_grad()
def activations(model, new: Sequence[int], windows: torch.Tensor) -> dict[int, dict[str, torch.Tensor]]:
    """What the outputs of the new layers read, on some text: layer -> {o: (n, H h), down: (n, f)}."""
    found: dict[int, dict[str, torch.Tensor]] = {layer: {} for layer in new}
    hooks = []
    for layer in new:
        block = model.model.layers[layer]
        for name, module in (("o", block.self_attn.o_proj), ("down", block.mlp.down_proj)):

            def keep(_, inputs, layer=layer, name=name) -> None:
                found[layer][name] = inputs[0].detach().flatten(0, -2).float()

            hooks.append(module.register_forward_pre_hook(keep))
    with torch.autocast("cpu", torch.bfloat16):
        model.model(input_ids=windows)
    for hook in hooks:
        hook.remove()
    return found


def features(neurons: float = 0.0, values: float = 0.0, gain: float = 1.0, by_weights: bool = False) -> Edit:
    """Make what the outputs will read better conditioned, by rows of up and a basis of each group's values.

    Args:
        neurons: 0 leaves the neurons' sizes as they are, 1 gives all the same root mean square.
        values: 0 leaves the values of a group as they are, 1 makes their covariance the identity.
        gain: Factor of all.
        by_weights: Without a text, as if what the layer reads were white.
    """

    @torch.no_grad()
    def edit(model, new, windows, generator) -> None:
        groups = model.config.num_key_value_heads
        size = model.config.head_dim or model.config.hidden_size // model.config.num_attention_heads
        seen = None if by_weights else activations(model, new, windows)
        for layer in new:
            block = model.model.layers[layer]
            found = _white_neurons(block) if seen is None else seen[layer]["down"].square().mean(0).sqrt()  # (f,)
            block.mlp.up_proj.weight.mul_(gain * _evened(found, neurons)[:, None])
            v = block.self_attn.v_proj.weight.view(groups, size, -1)  # (G, h, d)
            for g in range(groups):
                if seen is None:
                    read = v[g] * block.input_layernorm.weight
                else:
                    heads = seen[layer]["o"].unflatten(1, (groups, -1, size))  # (n, G, H / G, h)
                    read = heads[:, g].flatten(0, 1).T / (len(heads) * heads.shape[2]) ** 0.5  # (h, n H / G)
                covariance = read @ read.T  # (h, h)
                found, vectors = torch.linalg.eigh(covariance)
                factors = gain * _evened(found.clamp_min(0).sqrt(), values)
                v[g] = (vectors * factors) @ (vectors.T @ v[g])

    return edit


def _white_neurons(block) -> torch.Tensor:
    """Root mean square of each neuron (f,) for white inputs: gate and up are Gaussian with the norms and the cosine of
    their rows, so that E[(silu(g) u)^2] is an integral over g alone."""
    nodes, weights = (torch.from_numpy(x).float() for x in np.polynomial.hermite_e.hermegauss(41))
    scale = block.post_attention_layernorm.weight
    gate, up = block.mlp.gate_proj.weight * scale, block.mlp.up_proj.weight * scale  # (f, d)
    sizes = gate.norm(dim=1), up.norm(dim=1)
    cosine = (gate * up).sum(1) / (sizes[0] * sizes[1])
    silu = torch.nn.functional.silu(sizes[0][:, None] * nodes).square() * (weights / weights.sum())  # (f, k)
    return sizes[1] * ((1 - cosine**2) * silu.sum(1) + cosine**2 * (silu * nodes**2).sum(1)).sqrt()


def _evened(sizes: torch.Tensor, power: float) -> torch.Tensor:
    """Factors (n,) that turn sizes into sizes ** (1 - power), at their own root mean square; none grows more than
    tenfold against the median."""
    held = sizes.clamp_min(float(sizes.median()) / 10)
    factors = held**-power
    return factors * (sizes.square().mean() / (sizes * factors).square().mean()).sqrt()


@torch.no_grad()
def by_activations(model, new: Sequence[int], windows: torch.Tensor, generator: torch.Generator) -> None:
    """The neurons of A matched to those of B by what they do on a text (correlation of activations), then the mean of
    both, row norms restored; attention is B's. The new layer is a copy of B to begin with."""
    seen = activations(model, [i for layer in new for i in (layer - 1, layer)], windows)
    for layer in new:
        a, b = (seen[i]["down"] for i in (layer - 1, layer))  # (n, f): A and B on their own inputs
        a, b = ((x - x.mean(0)) / x.std(0).clamp_min(1e-6) for x in (a, b))
        match = linear_sum_assignment((b.T @ a).numpy(), maximize=True)[1]  # B's neuron -> A's
        below, mlp = model.model.layers[layer - 1].mlp, model.model.layers[layer].mlp
        for name in ("gate_proj", "up_proj"):
            wa, wb = getattr(below, name).weight[match].float(), getattr(mlp, name).weight
            mean = (wa + wb) / 2
            goal = (wa.norm(dim=1) + wb.norm(dim=1)) / 2
            wb.copy_(mean * (goal / mean.norm(dim=1))[:, None])


@torch.no_grad()
def value_products(model, new: Sequence[int], windows: torch.Tensor, generator: torch.Generator) -> None:
    """Values that keep the products of outputs and values rather than these: of the mean of A's and B's products over
    the heads of a group, the strongest right singular vectors, at the size of B's values. All else is B's."""
    groups = model.config.num_key_value_heads
    size = model.config.head_dim or model.config.hidden_size // model.config.num_attention_heads
    for layer in new:
        below, above = (model.model.layers[i].self_attn for i in (layer - 1, layer + 1))
        values = model.model.layers[layer].self_attn.v_proj.weight.view(groups, size, -1)  # (G, h, d)
        for g in range(groups):
            products = []
            for block in (below, above):
                o = block.o_proj.weight.float().unflatten(1, (groups, -1, size))[:, g]  # (d, H / G, h)
                v = block.v_proj.weight.float().view(groups, size, -1)[g]  # (h, d)
                products.append((o @ v).flatten(0, 1))  # (d H / G, d)
            _, sizes, right = torch.linalg.svd((products[0] + products[1]) / 2, full_matrices=False)
            made = sizes[:size, None].sqrt() * right[:size]
            values[g] = made * values[g].norm() / made.norm()


def pairs(scale: float) -> Edit:
    """Half of the neurons (and of the heads of each group), each twice, with outputs of both signs: the layer adds
    nothing, yet every weight of it has a gradient. Outputs are those of the layer above, times ``scale``."""

    @torch.no_grad()
    def edit(model, new, windows, generator) -> None:
        config = model.config
        seen = activations(model, new, windows)
        per = config.num_attention_heads // config.num_key_value_heads
        size = config.head_dim or config.hidden_size // config.num_attention_heads
        for layer in new:
            block, above = model.model.layers[layer], model.model.layers[layer + 1]
            down = above.mlp.down_proj.weight  # (d, f)
            weight = seen[layer]["down"].square().mean(0).sqrt() * down.float().norm(dim=0)
            best = weight.sort(descending=True).indices[: down.shape[1] // 2]
            mlp = block.mlp
            mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[best].repeat(2, 1))
            mlp.up_proj.weight.copy_(mlp.up_proj.weight[best].repeat(2, 1))
            out = down[:, best].float() * scale
            mlp.down_proj.weight.copy_(torch.cat([out, -out], 1))
            q = block.self_attn.q_proj.weight.view(config.num_key_value_heads, per, size, -1)
            o = block.self_attn.o_proj.weight.view(-1, config.num_key_value_heads, per, size)
            from_o = above.self_attn.o_proj.weight.float().view_as(o)
            for first in range(0, per - 1, 2):  # where heads are odd, one keeps outputs of zero
                q[:, first + 1] = q[:, first]
                o[:, :, first] = from_o[:, :, first] * scale
                o[:, :, first + 1] = -from_o[:, :, first] * scale

    return edit


_OPT, _NEXT = preset("opt_deus"), preset("copy_next")
_BOTH = features(1, 1)

LEADS: Mapping[str, Init] = {
    "by_activations": Init("neurons matched by activations, mean; attention of B", _NEXT, by_activations, ours=True),
    "value_products": Init("values from the mean of both layers' o v, else B", _NEXT, value_products, ours=True),
    "pairs_1": Init("half of B's neurons and heads twice, outputs of both signs", _NEXT, pairs(1.0), ours=True),
    "pairs_0.3": Init(
        "half of B's neurons and heads twice, outputs of both signs times 0.3", _NEXT, pairs(0.3), ours=True
    ),
    "neurons_1": Init("copy of B, neurons' sizes alike", _NEXT, features(1), ours=True),
    "values_1": Init("copy of B, values white", _NEXT, features(0, 1), ours=True),
    "both_1": Init("copy of B, neurons alike, values white", _NEXT, _BOTH, ours=True),
    "both_weights": Init(
        "copy of B, neurons alike, values white, by weights alone", _NEXT, features(1, 1, by_weights=True), ours=True
    ),
    "both_1_gain_4": Init("copy of B, neurons alike, values white, times 4", _NEXT, features(1, 1, 4), ours=True),
    "both_1_gain_0.3": Init("copy of B, neurons alike, values white, times 0.3", _NEXT, features(1, 1, 0.3), ours=True),
    "gain_2": Init("copy of B, v and up times 2", _NEXT, features(gain=2), ours=True),
    "gain_4": Init("copy of B, v and up times 4", _NEXT, features(gain=4), ours=True),
    "opt_pairs_0.3": Init("opt_deus, pairs with outputs times 0.3", _OPT, pairs(0.3), ours=True),
    "opt_gain_2": Init("opt_deus, v and up times 2", _OPT, features(gain=2), ours=True),
    "opt_both_1": Init("opt_deus, neurons alike, values white", _OPT, _BOTH, ours=True),
}

ALL = INITS | LEADS
