"""Repeating layers, 22 -> 30, of a 1.1B-shaped checkpoint, against ``cp`` of as many bytes.

Sources are in the page cache and nothing waits for the disk when a run starts. We flush our output, compare it with
its source and take checksums before it gets its name; cp does neither, so cp followed by sync and ours without the
check stand in the table as well.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from common import (
    Figure,
    Run,
    at_most,
    deus_merge,
    megabytes,
    parser,
    random_checkpoint,
    report,
    run,
    seconds,
    settle,
    shape_of,
    spread,
)

_STAGES = """
import json, sys, threading, time
from deus_merge.run import executor as execute
from deus_merge.checkpoint import shards, output_folder as writer
from deus_merge.cli import main
spent = {}
def watch(owner, name, stage):
    inner = getattr(owner, name)
    def timed(*args, **kwargs):
        start = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            spent[stage] = spent.get(stage, 0.0) + time.perf_counter() - start
    setattr(owner, name, timed)
watch(shards.ShardWriter, "__init__", "allocate")
watch(shards.ShardWriter, "copy_many", "copy")
watch(shards.ShardWriter, "sync", "flush (beside the copying)")
watch(writer.OutputFolder, "finish", "flush and rename at the end")
watch(execute, "verify", "verify")
start = time.perf_counter()
try:
    main(sys.argv[1:])
finally:
    spent["whole"] = time.perf_counter() - start
    print(json.dumps(spent))
"""


def main() -> None:
    options = parser(__doc__, runs=5)
    options.add_argument("--layers", type=int, help="of the base (22)")
    options.add_argument("--stages", action="store_true", help="one more run that says where our time goes")
    options = options.parse_args()
    shape = shape_of(options)
    base = random_checkpoint(options.scratch, shape)
    keep = (shape.layers * 15 + 21) // 22  # 22 -> 15 + 15
    recipe = options.scratch.resolve() / "passthrough.yml"
    recipe.write_text(
        "merge_method: passthrough\nslices:\n"
        + "".join(
            f"  - sources: [{{model: {json.dumps(str(base))}, layer_range: [{start}, {end}]}}]\n"
            for start, end in ((0, keep), (shape.layers - keep, shape.layers))
        )
    )
    out, copy, source = (options.scratch.resolve() / f"passthrough-{name}" for name in ("out", "copy", "source"))
    for folder in (out, copy, source):
        shutil.rmtree(folder, ignore_errors=True)
    run(deus_merge("merge", recipe, out, "--quiet"))  # what cp copies: as many bytes, in as many files
    out.rename(source)
    arms = {
        "ours": deus_merge("merge", recipe, out, "--quiet"),
        "cp": ["cp", "-r", source, copy],
        "ours, --no-verify": deus_merge("merge", recipe, out, "--quiet", "--no-verify"),
        "cp + sync": ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', source, copy],
    }
    runs: dict[str, list[Run]] = {name: [] for name in arms}
    try:
        for _ in range(options.runs):
            for name, command in arms.items():
                settle(base, source)
                runs[name].append(run(command))
                shutil.rmtree(copy if name.startswith("cp") else out)
        details = {name: spread(r) for name, r in runs.items()}
        if options.stages:
            settle(base, source)
            told = run([sys.executable, "-c", _STAGES, "merge", recipe, out, "--quiet"]).stdout
            details["stages"] = {stage: round(s, 3) for stage, s in json.loads(told.splitlines()[-1]).items()}
            print("stages of one run, s:", details["stages"])
        details["bytes"] = sum(f.stat().st_size for f in source.iterdir())
    finally:
        for folder in (out, copy, source):
            shutil.rmtree(folder, ignore_errors=True)
    ours, cp = seconds(runs["ours"]), seconds(runs["cp"])
    limit = 1.5 * cp + 3
    what = f"passthrough {shape.layers} -> {2 * keep} layers, {details['bytes'] / 1e9:.1f} GB"
    figures = [
        Figure(f"{what}: time", ours, "s", f"<= 1.5 x cp + 3 s = {limit:.1f} s", ours <= limit, cp, "cp"),
        Figure("the same against a flushed copy", ours, "s", peer=seconds(runs["cp + sync"]), peer_name="cp + sync"),
        Figure("without the check of the output", seconds(runs["ours, --no-verify"]), "s", peer=cp, peer_name="cp"),
        at_most(f"{what}: peak anonymous memory", megabytes(runs["ours"]), "MB", 450),
    ]
    report(Path(__file__).stem, figures, options, details)


if __name__ == "__main__":
    main()
