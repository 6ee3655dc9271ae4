"""Runs a comparison: grows the candidates, trains them one after another or side by side, and keeps every result."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...checkpoint.system import keep_freed_memory
from ...core.errors import MachineError, TrainingError
from ...core.text import some_of
from ...plan.build import build_plan
from ...plan.types import Plan
from ...report.shareable import shared_name
from ...run.device import choose_device, set_threads, threads_kept
from ...run.preflight import check_apart
from ..reading import load_tokenizer
from .candidates import Candidate, Fixed, Job, recipe_of
from .growing import Checkpoints, Grown, check_calibrations
from .learner import run
from .options import CompareOptions, check_texts
from .result import Comparison
from .search import Search
from .setup import check_length, check_ungrown, lora_rank
from .store import WORK, Results, alone, check_settings
from .text import Tokens, read_tokens, split, tokens_file, tokens_of, write_tokens

#: called after each run, with its result, the number of runs that are left (about), and the seconds that these take
OnRun = Callable[[dict[str, Any], int, float], None]
#: called before something that takes a while
OnStage = Callable[[str], None]


def compare(
    model: str,
    out: Path | str,
    text: Sequence[Path | str],
    options: CompareOptions | None = None,
    *,
    base_text: Sequence[Path | str] = (),
    on_run: OnRun | None = None,
    on_stage: OnStage | None = None,
) -> Comparison:
    """Compare ways to grow a model, and ways to train it, by training on a text.

    Every finished run is a line of ``runs.jsonl`` in the folder. Called again, what is there is not run again, and
    candidates, seeds and budget may be others.

    Args:
        model: A folder or ``org/name[@revision]``.
        out: The folder for results.
        text: Files or folders of text to learn.
        options: What is compared, and how.
        base_text: Text that should not be forgotten; its loss is measured before and after.
        on_run, on_stage: Called on progress.

    Returns:
        The results so far; all of them, unless the budget ended.

    Raises:
        DeusMergeError: a model, a text or an option cannot be used, or the folder has results of other settings.
    """
    options, out = options or CompareOptions(), Path(out)
    options.check()
    sources, base_sources = tuple(map(Path, text)), tuple(map(Path, base_text))
    check_texts(sources, "--text")
    check_texts(base_sources, "--base-text")
    job = _Comparing(model, out, options, on_stage or (lambda stage: None))
    return job.run(sources, base_sources, on_run or (lambda result, left, seconds: None))


class _Comparing:
    """One call of `compare`."""

    def __init__(self, model: str, out: Path, options: CompareOptions, on_stage: OnStage):
        self.model, self.out, self.options, self.on_stage = model, out, options, on_stage
        self.work = out / WORK
        self.device = str(choose_device(options.device))

    def run(self, text: tuple[Path, ...], base_text: tuple[Path, ...], on_run: OnRun) -> Comparison:
        """Do what is left within the budget."""
        plans = {c: build_plan(recipe_of(c, self.model)) for c in self.options.grown()}  # checked before a byte
        for candidate, plan in plans.items():
            if not plan.new_layers:
                raise TrainingError("it adds no layer", where=str(candidate), hint="nothing would train")
            if candidate.calibrated and not plan.function_preserving:
                raise TrainingError("only outputs that begin as zeros are calibrated", where=str(candidate))
        first = next(iter(plans.values()))
        check_apart(self.out, [model.checkpoint for plan in plans.values() for model in plan.models])
        folder = _base_folder(first, needed=bool(self.options.without_growing))
        ungrown = self._ungrown(first)
        check_ungrown(ungrown, folder)
        check_length(self.options.length, folder)
        check_calibrations(plans, text, self.options, self.device)
        candidates = [*plans, *ungrown]
        fixed, fresh = self._fixed(first, folder, text, base_text)
        with alone(self.out):
            results = Results(self.out, fixed)
            if fresh:
                results.begin()
            for candidate, plan in plans.items():
                results.check_recipe(candidate, plan.hash)
            complete = self._train(plans, candidates, folder, text, results, on_run)
        named = {"text": text, "base_text": base_text}
        names = {key: some_of((path.name for path in paths), 3) for key, paths in named.items() if paths}
        names["model"] = shared_name(self.model)
        return Comparison(self.out, tuple(candidates), tuple(results.of(candidates)), vars(fixed), complete, names)

    def _train(
        self,
        plans: Mapping[Candidate, Plan],
        candidates: Sequence[Candidate],
        base: Path,
        text: tuple[Path, ...],
        results: Results,
        on_run: OnRun,
    ) -> bool:
        """Run what is due until the budget ends; whether nothing is left."""
        search = Search(candidates, self.options.seeds, self.options.rates, self.options.rates_per_decade)
        checkpoints = Checkpoints(self.work / "models", results.fixed, text, self.device, self.on_stage)
        began, grown = time.monotonic(), dict[Candidate, Grown]()

        def job(candidate: Candidate, lr: float, seed: int) -> Job:
            if candidate not in grown:
                plan = plans.get(candidate)
                grown[candidate] = checkpoints.grown(candidate, plan) if plan else Grown(base)
            made = grown[candidate]
            return Job(candidate, lr, seed, made.folder, made.new_layers, results.fixed, self.work)

        with _pool(self.options) as submit:
            running: dict[Future, Job] = {}
            while True:
                wanted = self._wanted(search, results, running.values())
                while wanted and len(running) < self.options.workers and self._may_start(results, running, began):
                    due = job(*wanted.pop(0))
                    running[submit(due, self.device)] = due
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    running.pop(future)
                    results.add(_result(future))
                    left = search.left(results.of(candidates))
                    on_run(results.runs[-1], left, left * results.usual_seconds() / self.options.workers)
        return not search.next_jobs(results.of(candidates))

    def _wanted(self, search: Search, results: Results, running: Iterable[Job]) -> list[tuple[Candidate, float, int]]:
        started = {(job.candidate, job.lr, job.seed) for job in running}
        return [due for due in search.next_jobs(results.runs) if due not in started]

    def _may_start(self, results: Results, running: dict, began: float) -> bool:
        """Whether the budget allows for one more run."""
        budget = self.options.budget
        if budget.tokens is not None:
            of_a_run = results.fixed.tokens
            return (len(results.runs) + len(running) + 1) * of_a_run <= budget.tokens
        if budget.seconds is not None:
            return time.monotonic() - began + results.usual_seconds() <= budget.seconds
        return True

    def _ungrown(self, plan: Plan) -> list[Candidate]:
        if not self.options.without_growing:
            return []
        shapes = [
            (output.shape[0], output.shape[1])
            for block, output in plan.outputs
            if block.layers and not block.new and len(output.shape) == 2
        ]
        rank = lora_rank(shapes, plan.shape.new_parameters) if shapes else 1
        return self.options.ungrown(len(plan.new_layers), rank)

    def _fixed(
        self, plan: Plan, folder: Path, text: tuple[Path, ...], base_text: tuple[Path, ...]
    ) -> tuple[Fixed, bool]:
        """The settings of all runs, compared with those of earlier results, and whether there are none.

        Texts are read, and their tokens written.
        """
        import torch

        self.on_stage("reading the texts")
        model = _digest(plan)
        texts = [self._tokens(sources, folder, plan, model) for sources in (text, base_text) if sources]
        o = self.options
        prints = [read.fingerprint for read in texts]
        fixed = Fixed(
            model=model,
            text=prints[0],
            base_text=prints[1] if base_text else "",
            steps=o.steps,
            batch=o.batch,
            length=o.length,
            held_out=o.held_out,
            calibration_tokens=o.tokens_of_calibration,
            precision=o.precision,
        )
        draw = torch.Generator()
        for read, training in zip(texts, (fixed.steps * fixed.batch, 0), strict=False):
            read.windows("training", training, o.length, draw)  # or an error, before anything is written
            read.windows("held_out", o.held_out, o.length, draw)
        fresh = check_settings(self.out, fixed)
        for read in texts:
            write_tokens(self.work, model, read)
        return fixed, fresh

    def _tokens(self, sources: tuple[Path, ...], folder: Path, plan: Plan, model: str) -> Tokens:
        """A text's tokens, which an earlier call may have written."""
        pieces = split(sources)
        if tokens_file(self.work, model, pieces.fingerprint).exists():
            return tokens_of(self.work, model, pieces.fingerprint)
        return read_tokens(load_tokenizer(folder), pieces, plan.shape.vocabulary)


@contextmanager
def _pool(options: CompareOptions) -> Iterator[Callable[[Job, str], Future]]:
    """Yields what starts a run: in this process, or in one of several."""
    if options.workers == 1:

        def here(job: Job, device: str) -> Future:
            future: Future = Future()
            try:
                future.set_result(run(job, device))
            except Exception as error:  # as another process would report it
                future.set_exception(error)
            return future

        with threads_kept():
            set_threads(options.threads)
            yield here
        return
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) // options.workers)
    pool = ProcessPoolExecutor(options.workers, context, _begin, (threads,))
    try:
        yield lambda job, device: pool.submit(run, job, device)
    except BaseException:
        processes = list(getattr(pool, "_processes", {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:  # a run may take an hour
            process.terminate()
        raise
    pool.shutdown()


def _result(future: Future) -> dict[str, Any]:
    """The result of a run.

    Raises:
        MachineError: the memory was too small.
    """
    import torch

    hint = "fewer --workers or a smaller --batch or --length; finished runs are kept, the same command goes on"
    try:
        return future.result()
    except BrokenProcessPool:
        raise MachineError("a worker process was killed", expected="enough memory for all of them", hint=hint) from None
    except (MemoryError, torch.OutOfMemoryError) as error:
        got = str(error).split("\n")[0]
        raise MachineError("the memory is too small for a run", got=got or None, hint=hint) from None


def _begin(threads: int) -> None:
    """Prepare a worker process."""
    import signal

    from transformers.utils import logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    set_threads(threads)
    keep_freed_memory()
    logging.disable_progress_bar()


def _end_with_parent() -> None:
    """End this process as soon as its parent is gone, however that ended: a run may take an hour."""
    import multiprocessing

    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _base_folder(plan: Plan, needed: bool) -> Path:
    """The folder of the base model, which has its tokenizer."""
    folders = plan.donor.checkpoint.folders
    if not folders:
        hint = "download it and name the folder"
        raise TrainingError("a model on another machine is not trained", where=str(plan.donor.ref), hint=hint)
    if not folders[0].is_dir():
        hint = "write it as a folder first (merge_method: passthrough), and compare with that"
        raise TrainingError("transformers does not train a model in one file", where=str(plan.donor.ref), hint=hint)
    if needed and len(folders) != 1:
        raise TrainingError("only a model in one folder is trained without growing", where=str(plan.donor.ref))
    return folders[0]


def _digest(plan: Plan) -> str:
    """Eight hexadecimal digits of the contents of a base's files of weights."""
    import xxhash

    digest = xxhash.xxh3_64()
    for file in plan.donor.checkpoint.files:
        with open(file, "rb") as content:
            while chunk := content.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()[:8]
