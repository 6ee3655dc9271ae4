"""Runs numbered cases of a target under guard, and tells what went wrong."""

from __future__ import annotations

import os
import resource
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from .targets import TARGETS
from .workshop import Files, Workshop

SECONDS = 4.0  # of processor time, of all threads: a case takes milliseconds
MEMORY = 400 << 20  # bytes by which a case may lift the process's peak
ADDRESSES = 4 << 30  # bytes of address space beyond what the process has when it starts


class Blowup(BaseException):
    """A case takes too long. No `Exception`, so that nothing takes it for an error of its own."""


@dataclass(frozen=True)
class Finding:
    """A case that went wrong."""

    target: str
    number: object
    problem: str
    files: Files


@contextmanager
def guarded() -> Iterator[None]:
    """A bound on the address space, and a clock that `run_case` sets."""

    def stop(signum, frame):
        raise Blowup(f"more than {SECONDS} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc/self/statm") else None
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESSES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def run_case(workshop: Workshop, target: str, r: Random, number: object = None) -> tuple[bool, Finding | None]:
    """One case: whether nothing was refused, and what went wrong."""
    files = TARGETS[target].make(r, workshop)
    with workshop.changed(files):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            passed = TARGETS[target].run(r, workshop)
        except (Exception, Blowup) as error:
            signal.setitimer(signal.ITIMER_PROF, 0)
            told = "".join(traceback.format_exception(error, limit=-12, chain=False))
            return False, Finding(target, number, told, files)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10
    if grown > MEMORY:
        return passed, Finding(target, number, f"took {grown >> 20} MiB of memory", files)
    return passed, None


@dataclass
class Tally:
    """What a batch came to."""

    cases: int = 0
    passed: int = 0
    seconds: float = 0.0


def run_batch(workshop: Workshop, target: str, numbers: range, tally: Tally) -> Iterator[Finding]:
    """Numbered cases, one after the other; the number is the seed."""
    started = time.process_time()
    for number in numbers:
        passed, finding = run_case(workshop, target, Random(f"{target} {number}"), number)
        tally.cases += 1
        tally.passed += passed
        if finding:
            yield finding
    tally.seconds += time.process_time() - started
