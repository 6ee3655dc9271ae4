"""Time to start: ``--help``, and ``plan`` of a small recipe, beside what one ``import torch`` costs."""

from __future__ import annotations

import sys
from pathlib import Path

from common import SMALL, Figure, Run, deus_merge, parser, random_checkpoint, report, run, seconds, spread


def main() -> None:
    options = parser(__doc__, runs=9).parse_args()
    base = random_checkpoint(options.scratch, SMALL)
    recipe = options.scratch.resolve() / "startup.yml"
    recipe.write_text(f"base_model: {str(base)!r}\nupscale: {{preset: opt_deus, insert: top_half}}\n")
    arms = {
        "help": deus_merge("--help"),
        "plan": deus_merge("plan", recipe),
        "import torch": [sys.executable, "-c", "import torch"],
        "python": [sys.executable, "-c", "pass"],
    }
    runs: dict[str, list[Run]] = {name: [] for name in arms}
    for turn in range(options.runs + 1):
        for name, command in arms.items():
            result = run(command, sample=False)
            if turn:  # the first only fills the caches
                runs[name].append(result)
    torch, helped = seconds(runs["import torch"]), seconds(runs["help"])
    figures = [
        Figure("deus-merge --help", helped, "s", "< 0.5 s", helped < 0.5, torch, "import torch"),
        Figure("deus-merge plan, small recipe", seconds(runs["plan"]), "s", "", None, torch, "import torch"),
        Figure("an empty Python program", seconds(runs["python"]), "s", "", None, torch, "import torch"),
    ]
    report(Path(__file__).stem, figures, options, {name: spread(r) for name, r in runs.items()})


if __name__ == "__main__":
    main()
