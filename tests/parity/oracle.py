"""Runs mergekit on many recipes in one process; started by the parity tests with the oracle environment's Python.

Usage: python oracle.py JOBS, where JOBS is a JSON list of {recipe, out, seed}. What goes wrong with a job is written to
OUT.error, and the next one is begun.
"""

import json
import sys
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def main(jobs: Path) -> None:
    for job in json.loads(jobs.read_text()):
        options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, random_seed=job["seed"])
        try:
            recipe = MergeConfiguration.model_validate(yaml.safe_load(Path(job["recipe"]).read_text()))
            run_merge(recipe, job["out"], options)
        except Exception as error:  # whatever it is, it is the answer to this recipe
            Path(job["out"] + ".error").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
