"""The merge methods' published formulas on whole tensors, in float64, written without the package.

Each takes the base model's tensor (None without one), the tensors of the others, and the recipe's parameters. Elements
are chosen by differences in float32, in which they are stored: in float64 other elements would be at a cut.
"""

from __future__ import annotations

import torch


def linear(base, others, *, weight, normalize=True):
    total = sum(weight) if normalize and abs(sum(weight)) > 1e-8 else 1
    return sum(w * x.double() for w, x in zip(weight, others, strict=True)) / total


def _arc(a, b, t: float, dim):
    """Spherical interpolation between vectors along ``dim``, (..., 1) or all of the tensor."""
    dot, aa, bb = ((x * y).sum(dim, keepdim=dim is not None) for x, y in ((a, b), (a, a), (b, b)))
    theta = torch.arccos(dot / aa.sqrt() / bb.sqrt())
    return (torch.sin((1 - t) * theta) * a + torch.sin(t * theta) * b) / torch.sin(theta)


def slerp(base, others, *, t):
    """The chord where the directions (nearly) coincide."""
    a, b = base.double(), others[0].double()
    cosine = (a * b).sum() / a.norm() / b.norm()
    return (1 - t) * a + t * b if cosine.abs() > 0.9995 else _arc(a, b, t, None)


def nuslerp(base, others, *, weight, nuslerp_flatten=True, nuslerp_row_wise=False):
    t = weight[1] / sum(weight) if abs(sum(weight)) > 1e-6 else 0.5
    start = 0 if base is None else base.double()
    a, b = (x.double() - start for x in others)
    flat = nuslerp_flatten or a.ndim < 2
    return start + _arc(a, b, t, None if flat else 0 if nuslerp_row_wise else -1)


def multislerp(base, others, *, weight):
    start = 0 if base is None else base.double()
    shares = [w / sum(weight) for w in weight]
    vectors = [x.double() - start for x in others]
    mean = sum(s * v / v.norm() for s, v in zip(shares, vectors, strict=True))
    return start + mean / mean.norm() * sum(s * v.norm() for s, v in zip(shares, vectors, strict=True))


def karcher(base, others, *, max_iter, tol):
    """Gradient steps on the sphere itself, in full space."""
    vectors = torch.stack([x.double().flatten() for x in others])  # (s, n)
    units = vectors / vectors.norm(dim=1, keepdim=True)  # (s, n)
    mean = units.mean(0) / units.mean(0).norm()  # (n,)
    for _ in range(max_iter):
        angles = (units @ mean).clamp(-1, 1).arccos()  # (s,)
        logs = (angles / angles.sin())[:, None] * (units - angles.cos()[:, None] * mean)  # (s, n)
        step = logs.mean(0)  # (n,)
        size = step.norm()
        if size < tol:
            break
        mean = size.cos() * mean + size.sin() * step / size
    return (mean * vectors.norm(dim=1).mean()).view_as(others[0])


def model_stock(base, others, *, filter_wise=False):
    start, count = base.double(), len(others)
    deltas = [x.double() - start for x in others]
    dim = -1 if filter_wise else None
    cosines = []
    for i in range(count):
        for j in range(i):
            dot, aa, bb = ((x * y).sum(dim, keepdim=dim is not None) for x, y in (
                (deltas[i], deltas[j]), (deltas[i], deltas[i]), (deltas[j], deltas[j])))  # fmt: skip
            cosines.append(dot / aa.sqrt() / bb.sqrt())
    cosine = sum(cosines) / len(cosines)
    return start + count * cosine / (1 + (count - 1) * cosine) * sum(deltas) / count


def _everything(delta, _):
    return torch.ones_like(delta, dtype=torch.bool)


def _by_rank(delta, first: int, last: int, *, descending: bool):
    """The elements of these ranks of magnitude, among equals in their order."""
    order = delta.abs().flatten().sort(stable=True, descending=descending).indices[first:last]
    return torch.zeros(delta.numel(), dtype=torch.bool).index_fill_(0, order, True).view_as(delta)


def task_arithmetic(base, others, *, weight, density=1.0, normalize=False, rescale=False, consensus=False,
                    keep=_everything, **parameters):  # fmt: skip
    factor = parameters.get("lambda", 1.0)
    sparse = []
    for x in others:
        delta = x - base
        kept = keep(delta, density) * delta.double()
        scale = delta.double().abs().sum() / kept.abs().sum() if rescale else 1.0
        sparse.append(kept * scale)
    terms = [w * s for w, s in zip(weight, sparse, strict=True)]
    if consensus and sum(w != 0 for w in weight) > 1:
        sign = torch.where(sum(terms) >= 0, 1.0, -1.0)
        agree = [(term * sign > 0).double() for term in terms]
        divisor = sum(w * a for w, a in zip(weight, agree, strict=True)) if normalize else 1.0
        terms = [term * a for term, a in zip(terms, agree, strict=True)]
        divisor = torch.where(divisor == 0, 1.0, divisor) if normalize else 1.0
    else:
        divisor = sum(weight) if normalize and sum(weight) != 0 else 1.0
    return base.double() + factor * sum(terms) / divisor


def ties(base, others, **parameters):
    def keep(delta, density):
        return _by_rank(delta, 0, max(1, int(density * delta.numel())), descending=True)

    return task_arithmetic(base, others, keep=keep, consensus=True, **{"normalize": True, **parameters})


def breadcrumbs(base, others, *, gamma, **parameters):
    def keep(delta, density):
        n = delta.numel()
        first = max(0, n - int(density * n) - int(gamma * n))
        return _by_rank(delta, first, first + int(density * n), descending=False)

    return task_arithmetic(base, others, keep=keep, **parameters)


def breadcrumbs_ties(base, others, **parameters):
    return breadcrumbs(base, others, consensus=True, **parameters)


def sce(base, others, *, select_topk):
    deltas = torch.stack([x - base for x in others])  # (s, ...)
    variance = deltas.var(dim=0, unbiased=False)
    chosen = _by_rank(variance, 0, int(int(variance.count_nonzero()) * select_topk), descending=True)
    deltas = deltas.double() * chosen
    squares = deltas.square().flatten(1).mean(1)  # (s,)
    weights = squares / squares.sum()
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agree = (deltas * sign > 0).double()
    shape = (-1, *[1] * base.ndim)
    divisor = (weights.view(shape) * agree).sum(0).clamp(min=1e-6)
    return base.double() + (weights.view(shape) * deltas * agree).sum(0) / divisor


def ram(base, others, *, epsilon, factors=None):
    deltas = torch.stack([x - base for x in others]).double()  # (s, ...)
    changed = (deltas.abs() > epsilon).double()
    count = changed.sum(0)
    factors = torch.tensor(factors or [1.0] * len(others)).double().view(-1, *[1] * base.ndim)
    alone = (deltas * changed * factors).sum(0)
    shared = (deltas * changed).sum(0) / count.clamp(min=1)
    return base.double() + torch.where(count == 1, alone, shared)


def ramplus_tl(base, others, *, epsilon, r, alpha):
    changed = torch.stack([x - base for x in others]).double().abs() > epsilon
    count = changed.sum(0)
    factors = []
    for own in changed:
        shared, unique = int((own & (count > 1)).sum()), int((own & (count == 1)).sum())
        factors.append(1 + r * min(shared / max(unique, epsilon), alpha))
    return ram(base, others, epsilon=epsilon, factors=factors)


def arcee_fusion(base, others):
    (x,) = others
    p, q = (t.double().softmax(-1) + 1e-8 for t in (x, base))
    importance = ((x - base).abs().double() * (p * (p / q).log()).sum(-1, keepdim=True).clamp(min=0)).float()
    ranked = importance.flatten().sort().values
    low, middle, high = (float(ranked[int((len(ranked) - 1) * share)]) for share in (0.25, 0.5, 0.75))
    return torch.where(importance >= middle + 1.5 * (high - low), x, base).double()


def nearswap(base, others, *, t):
    a, b = base.double(), others[0].double()
    weight = (t / (a - b).abs().clamp(min=1e-6)).clamp(0, 1)
    return weight * b + (1 - weight) * a
