"""``python -m tests.fuzz``: cases for as many minutes as one likes, going on where the last run stopped.

::

    python -m tests.fuzz --minutes 10                  # every target in turn
    python -m tests.fuzz --minutes 10 --targets config,recipe
    python -m tests.fuzz --case config 1000042         # one case again; its files are left to look at
    python -m tests.fuzz --minutes 10 --atheris config # guided by coverage, where atheris is installed

What is found goes to ``.fuzz/findings``: the files of the case, and what went wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from random import Random

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
FIRST = 1_000_000  # numbers below are for the test suite
BATCH_SECONDS = 4.0


class FromBytes(Random):
    """Draws from bytes instead of chance: whoever makes the bytes (atheris) decides. Behind their end all is 0."""

    def __new__(cls, data: bytes):
        return super().__new__(cls)

    def __init__(self, data: bytes):
        self.data, self.at = data, 0
        super().__init__()

    def getrandbits(self, k: int) -> int:
        size = (k + 7) // 8
        piece, self.at = self.data[self.at : self.at + size], self.at + size
        return int.from_bytes(piece, "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(53) / (1 << 53)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--targets", help="comma between them; all by default")
    parser.add_argument("--case", nargs=2, metavar=("TARGET", "NUMBER"), help="run one case again")
    parser.add_argument("--atheris", metavar="TARGET", help="let atheris draw the cases of this target")
    parser.add_argument("--state", type=Path, default=Path(".fuzz"), help="where findings and progress are kept")
    options = parser.parse_args()
    state = options.state.absolute()
    (state / "findings").mkdir(parents=True, exist_ok=True)
    if options.atheris:
        import atheris

        with atheris.instrument_imports(include=["deus_merge"]):
            from . import driver
        return _by_coverage(atheris, driver, options.atheris, options.minutes, state)
    from . import driver

    if options.case:
        return _again(driver, options.case[0], int(options.case[1]), state)
    targets = options.targets.split(",") if options.targets else list(driver.TARGETS)
    return _run(driver, targets, options.minutes, state)


def _run(driver, targets: list[str], minutes: float, state: Path) -> int:
    progress = state / "progress.json"
    known = json.loads(progress.read_text()) if progress.exists() else {}
    if lost := known.pop("running", None):
        print(f"the last run ended inside {lost[0]} {lost[1]} to {lost[2]}: look for the case that ends the process")
    tallies = {t: driver.Tally(**known[t]) if t in known else driver.Tally() for t in targets}
    workshop, found = driver.Workshop(), 0
    until = time.monotonic() + 60 * minutes
    os.chdir(workshop.root)
    try:
        with driver.guarded():
            while time.monotonic() < until:
                for target in targets:
                    tally = tallies[target]
                    start = FIRST + tally.cases
                    numbers = range(start, start + int(1000 * BATCH_SECONDS / driver.TARGETS[target].cost))
                    progress.write_text(json.dumps({**known, "running": [target, numbers.start, numbers.stop]}))
                    for finding in driver.run_batch(workshop, target, numbers, tally):
                        found += 1
                        print(
                            f"{target} {finding.number}: {finding.problem.strip().splitlines()[-1][:200]}", flush=True
                        )
                        _keep(state / "findings" / f"{target}-{finding.number}", finding)
                    known[target] = vars(tally)
                    progress.write_text(json.dumps(known))
    except KeyboardInterrupt:
        pass
    finally:
        workshop.close()
    for target in targets:
        tally = tallies[target]
        print(f"{target:>12}: {tally.cases:>9} cases, {tally.passed} not refused, {tally.seconds:.0f} s")
    print(f"{sum(t.cases for t in tallies.values())} cases so far; this run found {found}")
    return 1 if found else 0


def _again(driver, target: str, number: int, state: Path) -> int:
    workshop = driver.Workshop()
    os.chdir(workshop.root)
    with driver.guarded():
        passed, finding = driver.run_case(workshop, target, Random(f"{target} {number}"), number)
    files = finding.files if finding else driver.TARGETS[target].make(Random(f"{target} {number}"), workshop)
    place = state / "findings" / f"{target}-{number}"
    _keep(place, finding or driver.Finding(target, number, "nothing", files))
    workshop.close()
    print(finding.problem if finding else "not refused" if passed else "refused, as it should be")
    print(f"its files: {place}")
    return 1 if finding else 0


def _by_coverage(atheris, driver, target: str, minutes: float, state: Path) -> int:
    workshop = driver.Workshop()
    os.chdir(workshop.root)
    corpus = state / "corpus" / target
    corpus.mkdir(parents=True, exist_ok=True)

    def one(data: bytes) -> None:
        _, finding = driver.run_case(workshop, target, FromBytes(data))
        if finding:
            raise RuntimeError(finding.problem)

    arguments = [
        f"-max_total_time={int(60 * minutes)}",
        f"-artifact_prefix={state}/findings/{target}-",
        "-max_len=400",
        "-len_control=0",
    ]
    atheris.Setup([sys.argv[0], str(corpus), *arguments], one)
    with driver.guarded():
        atheris.Fuzz()
    return 0


def _keep(place: Path, finding) -> None:
    for name, content in finding.files.items():
        file = place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else repr(content).encode())
    (place / "problem.txt").write_text(finding.problem)


if __name__ == "__main__":
    sys.exit(main())
