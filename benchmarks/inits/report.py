"""Tables and plots out of the lines of results."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from . import statistics
from .inits import INITS
from .leads import ALL, LEADS
from .statistics import Interval, Runs

_SETTING = ("model", "base", "texts", "steps", "batch")
_OURS = "opt_deus"
_MANY = 10  # no init needs so many times the tokens and is worth a figure
#: What a plot shows, besides our default and the best peer.
_SHOWN = ("copy_next", "copy_prev", "average_zero", "random_zero", "script", "paper", "opt_deus")


def best_peer(runs: Mapping[str, Runs]) -> str:
    """The lowest mean final loss among inits with the most seeds; not one of ours, where there are others."""
    peers = {name: of for name, of in runs.items() if not ALL[name].ours} or runs
    most = max(map(len, peers.values()))
    means = {name: np.mean([r["final"] for r in of.values()]) for name, of in peers.items() if len(of) == most}
    return min(means, key=means.get)


def write(out: Path, pictures: Path) -> None:
    """RESULTS.md beside the results, and a plot for each model.

    Args:
        out: Folder of the ``.jsonl`` files.
        pictures: Folder for ``inits-MODEL.svg``.
    """
    parts = ["# Inits", "", _HEAD]
    for path in sorted(out.glob("*.jsonl")):
        results = [json.loads(line) for line in path.read_text().splitlines()]
        settings: dict[tuple, list[dict]] = {}
        for result in results:
            if result["init"] in ALL:  # a lead may have been given up
                settings.setdefault(tuple(result[k] for k in _SETTING), []).append(result)
        if not settings:
            continue
        most = max(settings.values(), key=len)  # others: trials, other texts
        usual = [r for r in most if not r["place"]]
        facts = out / f"{path.stem}-base.json"
        told_of = json.loads(facts.read_text()) if facts.exists() else {}
        parts += [*_section(path.stem, usual, told_of), *_against(usual)]
        parts += _places([r for r in most if r["place"]], statistics.best_runs(usual))
        _plot(path.stem, statistics.best_runs(usual), pictures / f"inits-{path.stem}.svg")
    (out / "RESULTS.md").write_text("\n".join(parts) + "\n", encoding="utf-8")


_HEAD = """Written by `python -m benchmarks.inits`; every run is a line of a `.jsonl` file here. Losses in nats a
token on held-out text, means over seeds. *Difference*: of the final loss to the best peer's, seed by seed (the same
windows in the same order), with its 95 % interval. *Tokens*: what the init needs to come to the best peer's final loss,
over what the peer needs: the difference over the slope of the peer's curve (loss against the logarithm of tokens).
*Base's text*: change of the loss on the text that the base model was trained on. Bold inits align layers; those in
italics are ideas of the search that are not in deus_merge."""


def _section(model: str, results: list[dict], base: Mapping[str, object]) -> list[str]:
    runs = statistics.best_runs(results)
    rates = statistics.by_init(results)
    peer, one = best_peer(runs), results[0]
    tokens = one["curve"][-1][0] if one["curve"] else 0
    lines = [
        "",
        f"## {model}",
        "",
        f"Insert {one['insert']}: new layers {', '.join(map(str, runs[peer][0]['new_layers']))};"
        f" {one['steps']} steps of {one['batch']} windows of 256 tokens, {tokens:,} tokens;"
        f" best peer: `{peer}`.",
        *(["", "Base: " + "; ".join(f"{what} {value}" for what, value in base.items()) + "."] if base else []),
        "",
        "| init | what | lr | seeds | initial | final | difference | tokens | base's text | s | TFLOP |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(runs, key=lambda n: statistics.difference(runs[n], runs[peer]).mean):
        of = runs[name]
        mean = {k: float(np.mean([r[k] for r in of.values()])) for k in ("initial", "final", "seconds", "tflop")}
        forgot = statistics.interval([r["base_after"] - r["base_before"] for r in of.values()])
        kind = "**" if name in INITS and INITS[name].ours else "*" if name in LEADS else ""
        lines.append(
            f"| {kind}{name}{kind} | {ALL[name].summary} | {statistics.best_lr(rates[name]):.0e} of {len(rates[name])}"
            f" | {len(of)} | {mean['initial']:.3f} | {mean['final']:.4f}"
            f" | {told(statistics.difference(of, runs[peer]), '+.4f') if name != peer else '0'}"
            f" | {told(statistics.token_ratio(of, runs[peer]), '.2f') if name != peer else '1'}"
            f" | {forgot.mean:+.3f} | {mean['seconds']:.0f} | {mean['tflop']:.1f} |"
        )
    return lines


def _against(results: list[dict]) -> list[str]:
    """Our default against every other init, and how much the learning rate matters."""
    runs, rates = statistics.best_runs(results), statistics.by_init(results)
    if _OURS not in runs:
        return []
    lines = [
        "",
        f"`{_OURS}` against each, seed by seed: difference of final losses, and tokens over those of the other.",
        "Sweep: final losses of seed 0 by learning rate.",
        "",
        f"| init | {_OURS}: difference | tokens | sweep |",
        "|---|---|---|---|",
    ]
    for name, of in runs.items():
        sweep = ", ".join(
            f"{lr:.0e}: {found[0]['final']:.4f}" for lr, found in sorted(rates[name].items()) if 0 in found
        )
        apart, tokens = "", ""
        if name != _OURS:
            apart = told(statistics.difference(runs[_OURS], of), "+.4f")
            tokens = told(statistics.token_ratio(runs[_OURS], of), ".2f")
        lines.append(f"| {name} | {apart} | {tokens} | {sweep} |")
    return lines


def _places(results: list[dict], usual: Mapping[str, Runs]) -> list[str]:
    settings: dict[str, list[dict]] = {}
    for result in results:
        settings.setdefault(result["place"], []).append(result)
    if not settings:
        return []
    lines = [
        "",
        "### Places",
        "",
        "The same inits at other `places.py`, at the same learning rates. *Difference*: of final losses to the above.",
        "",
        "| place | new layers | init | seeds | difference | base's text | TFLOP |",
        "|---|---|---|---|---|---|---|",
    ]
    for place, found in settings.items():
        for name, rates in statistics.by_init(found).items():
            of = max(rates.values(), key=len)
            apart = statistics.difference(of, usual[name])
            forgot = statistics.interval([r["base_after"] - r["base_before"] for r in of.values()])
            first = next(iter(of.values()))
            lines.append(
                f"| {place} | {', '.join(map(str, first['new_layers']))} | {name} | {len(of)}"
                f" | {told(apart, '+.4f')} | {forgot.mean:+.3f} | {first['tflop']:.1f} |"
            )
    return lines


def told(value: Interval, form: str) -> str:
    """A mean with its interval; tokens beyond tenfold are told as such."""
    if value.mean > _MANY:
        return f"over {_MANY}"
    if math.isnan(value.low):
        return format(value.mean, form)
    return f"{value.mean:{form}} [{value.low:{form}}, {value.high:{form}}]"


def _plot(model: str, runs: Mapping[str, Runs], file: Path) -> None:
    """Held-out loss against tokens, and the difference to the best peer with its 95 % band."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "deus_merge", "font.size": 9}
    from matplotlib import pyplot

    peer = best_peer(runs)
    names = [n for n in dict.fromkeys((peer, *_SHOWN)) if n in runs]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in names:
        of = runs[name]
        seeds = sorted(of.keys() & runs[peer].keys())
        tokens = [t for t, _ in of[seeds[0]]["curve"]]
        losses = np.array([[loss for _, loss in of[s]["curve"]] for s in seeds])  # (s, p)
        apart = losses - np.array([[loss for _, loss in runs[peer][s]["curve"]] for s in seeds])
        (line,) = left.plot(tokens, losses.mean(0), label=name)
        apart_by = [statistics.interval(column) for column in apart.T]
        right.plot(tokens, [i.mean for i in apart_by], color=line.get_color())
        ends = [i.low for i in apart_by], [i.high for i in apart_by]  # those of losses are as wide as windows differ
        right.fill_between(tokens, *ends, color=line.get_color(), alpha=0.15, linewidth=0)
    left.set(xlabel="training tokens", ylabel="held-out loss, nats a token", title=f"{model}: only new layers train")
    right.set(xlabel="training tokens", ylabel=f"difference to {peer}", title="the same windows, 95 % bands")
    left.legend(fontsize=8)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
