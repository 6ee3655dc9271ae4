"""Run every benchmark and write ``results.json`` and ``RESULTS.md``: each figure against its peer and its bar."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from common import COLUMNS, Figure

HERE = Path(__file__).parent
SCRIPTS = (
    "startup",
    "smollm2",
    "passthrough",
    "ot_fuse_memory",
    "alignment",
    "solvers",
    "mergekit",
    "afterwards",
    "quantized",
    "training_memory",
    "scale",
)
PACKAGES = ("torch", "transformers", "POT", "numpy", "safetensors")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--scratch", type=Path, default=Path(".bench"))
    options.add_argument("--model", type=Path, help="a converted SmolLM2-135M")
    options.add_argument("--mergekit", type=Path, help="its command, where `make oracle` did not put it")
    options.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    options.add_argument("--small", action="store_true", help="tiny shapes: tries the scripts, measures nothing")
    options.add_argument("--out", type=Path, default=HERE, help="where results.json and RESULTS.md go")
    options = options.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.json"
    told = json.loads(results.read_text()) if results.is_file() and set(options.only) != set(SCRIPTS) else {}
    parts = told.get("benchmarks", {})
    for name in options.only:
        part = options.scratch / f"{name}.json"
        command = [sys.executable, HERE / f"{name}.py", "--scratch", options.scratch, "--json", part]
        if name in ("smollm2", "alignment", "solvers", "afterwards") and options.model:
            command += ["--model", options.model]
        if name == "mergekit" and options.mergekit:
            command += ["--mergekit", options.mergekit]
        if name == "passthrough":
            command.append("--stages")
        if options.small:
            command += ["--small", "--runs", "1"]
        subprocess.run([str(c) for c in command], check=True)
        parts[name] = json.loads(part.read_text())
    machine = machine_facts()
    results.write_text(json.dumps({"machine": machine, "benchmarks": parts}, indent=1) + "\n")
    (options.out / "RESULTS.md").write_text(markdown(machine, [parts[n] for n in SCRIPTS if n in parts]))
    missed = [f["what"] for part in parts.values() for f in part["figures"] if f["met"] is False]
    print(f"\n{len(missed)} bars missed" + "".join(f"\n  {what}" for what in missed))


def machine_facts() -> dict:
    """What the figures depend on; nothing that names the machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": model,
        "memory": f"{memory / 1e9:.0f} GB",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def markdown(machine: dict, parts: list[dict]) -> str:
    """RESULTS.md."""
    fields = Figure.__dataclass_fields__
    rows = [Figure(**{k: v for k, v in f.items() if k in fields}).cells() for part in parts for f in part["figures"]]
    loads = [
        f"`{part['title']}` ran while the machine's load average was {start} at its start and {end} at its end."
        for part in parts
        if (start := part["details"].get("load at the start")) and (end := part["details"].get("load at the end"))
        if max(start, end) > machine["cores"]  # other programs ran beside it
    ]
    lines = [
        "# Benchmarks",
        "",
        "Written by `python benchmarks/run_all.py`. Times are medians, ours and the peer's in turns on one machine;",
        "memory is the peak of anonymous resident memory, the largest of all runs. Every run is in `results.json`.",
        "",
        ", ".join(f"{key} {value}" for key, value in machine.items()),
        "",
        *(line for load in loads for line in (load, "")),
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
