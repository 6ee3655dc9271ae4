"""Runs the jobs of one model, side by side, and keeps their results."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import click

from . import statistics
from .leads import ALL
from .training import Job, Scratch, Setting, run

_FACTOR = 10**0.5  # between learning rates
_MOST_RATES = 7  # of an init


class Bench:
    """Runs jobs of one model in processes of one thread each, and keeps a file of results."""

    def __init__(self, scratch: Path, results: Path, workers: int):
        self.scratch, self.path, self.workers = scratch, results, workers
        text = results.read_text(encoding="utf-8") if results.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a stopped run may have left half a line
        if whole != text:
            results.write_text(whole, encoding="utf-8")
        self.runs = [json.loads(line) for line in whole.splitlines()]

    def of(self, setting: Setting) -> list[dict]:
        """Results of a setting."""
        return [r for r in self.runs if Job(setting, r["init"], r["lr"], r["seed"]).key == {k: r[k] for k in Job.KEYS}]

    def do(self, jobs: Iterable[Job]) -> None:
        """Run what is not there yet, and write each result as it comes."""
        there = [{key: r[key] for key in Job.KEYS} for r in self.runs]
        wanted = [job for job in jobs if job.key not in there]
        for job in wanted:  # what runs share is made before them
            Scratch(self.scratch, job.setting).prepare(job, ALL[job.init])
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.workers, context, _one_thread) as pool:
            running = [pool.submit(_run, job, self.scratch) for job in wanted]
            for count, future in enumerate(as_completed(running), 1):
                result = future.result()
                self.runs.append(result)
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
                click.echo(
                    "{}/{} {model} {insert} {init} lr {lr:.1e} seed {seed}: {initial:.4f} -> {final:.4f},"
                    " {seconds:.0f} s".format(count, len(wanted), **result)
                )

    def sweep(self, setting: Setting, names: Sequence[str]) -> None:
        """Learning rates on seed 0, until the best one lies inside."""
        rates = {name: list(setting.lrs) for name in names}
        while rates:
            self.do(Job(setting, name, lr, 0) for name in rates for lr in rates[name])
            found = statistics.by_init(self.of(setting))
            rates = {name: wider for name in rates if (wider := _wider(found[name]))}

    def seeds(self, setting: Setting, names: Sequence[str], seeds: int, like: Setting | None = None) -> None:
        """Every seed at each init's best learning rate, in this setting or in another one."""
        found = statistics.by_init(self.of(like or setting))
        best = {name: statistics.best_lr(found[name]) for name in names}
        self.do(Job(setting, name, best[name], seed) for seed in range(seeds) for name in names)


def _wider(rates: dict[float, statistics.Runs]) -> list[float]:
    """The learning rate to try next: beyond an end that is the best so far."""
    best, tried = statistics.best_lr(rates), sorted(lr for lr, runs in rates.items() if 0 in runs)
    if len(tried) >= _MOST_RATES or best not in (tried[0], tried[-1]):
        return []
    return [float(f"{best / _FACTOR if best == tried[0] else best * _FACTOR:.1g}")]


def _one_thread() -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


def _run(job: Job, scratch: Path) -> dict:
    return run(job, ALL[job.init], scratch)
