"""``calibrate`` on layers of an 8B model's shape: peak memory against the estimate that is checked before it starts.

Two layers of random weights with Llama 3.1 8B's sizes (d 4096, f 14336, 128 256 tokens), and a new one between them:
memory does not depend on the number of layers. `kfac` takes more than `ridge`. It takes some
minutes, so `run_all.py` leaves it out.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
from pathlib import Path

from common import SMALL, Figure, Shape, at_most, deus_merge, megabytes, parser, random_checkpoint, report, run, spread

LLAMA_8B = Shape(layers=2, hidden=4096, intermediate=14_336, heads=32, kv_heads=8, vocabulary=128_256)
LIMIT = 6000  # MB
WORDS = 1000


def main() -> None:
    options = parser(__doc__, runs=1)
    options.add_argument("--tokens", type=int, default=2048, help="of the text (2048); they cost time, not memory")
    options.add_argument("--threads", type=int, default=2)
    options = options.parse_args()
    shape = Shape(**{**vars(SMALL), "layers": 2}) if options.small else LLAMA_8B
    base = random_checkpoint(options.scratch, shape)
    text = with_tokenizer(base)
    deeper, out = (options.scratch.resolve() / f"{shape.name}-{name}" for name in ("deeper", "calibrated"))
    for folder in (deeper, out):
        shutil.rmtree(folder, ignore_errors=True)
    run(deus_merge("upscale", base, deeper, "--preset", "copy_next", "--insert", "{after: [0]}", "--quiet"))
    settings = ("--text", text, "--tokens", options.tokens, "--device", "cpu", "--threads", options.threads)
    needs = estimated(deeper, options.tokens)
    runs, before = [], resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    for _ in range(options.runs):
        shutil.rmtree(out, ignore_errors=True)
        runs.append(run(deus_merge("calibrate", deeper, out, *settings, "--json")))
        print({key: json.loads(runs[-1].stdout)[key] for key in ("loss_before", "loss_after", "seconds")}, flush=True)
    resident = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peak, estimate = megabytes(runs), max(needs.values()) / 1e6
    figures = [
        at_most("calibrate (kfac), d 4096, f 14336: peak memory", peak, "MB", LIMIT),
        Figure("the same, with mapped files", max(before, resident) * 1024 / 1e6, "MB"),
        Figure("the estimate", estimate, "MB", "peak <= estimate <= 1.35 peak", peak <= estimate <= 1.35 * peak),
    ]
    details = {"calibrate": spread(runs), "estimate": {name: round(size / 1e6) for name, size in needs.items()}}
    report("calibration_memory", figures, options, details)


def with_tokenizer(base: Path) -> Path:
    """Put a tokenizer of single words next to the weights.

    Returns:
        A text for it.
    """
    import tokenizers
    import transformers

    words = [f"w{i}" for i in range(WORDS)]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(base)
    text = base.with_name(f"{base.name}.txt")
    text.write_text(" ".join(random.Random(0).choices(words, k=40_000)))
    return text


def estimated(deeper: Path, tokens: int) -> dict[str, int]:
    """Bytes of memory in each phase, as the command estimates them."""
    from deus_merge.checkpoint.reader import Checkpoint
    from deus_merge.models.view import view_model
    from deus_merge.training.calibration.memory import estimate
    from deus_merge.training.calibration.options import CalibrationOptions

    options = CalibrationOptions(tokens=tokens)
    windows = tokens // options.length
    held_out = max(1, round(options.held_out * windows))
    with Checkpoint.open(deeper) as checkpoint:
        view = view_model(checkpoint.config, tuple(checkpoint.tensors), deeper)
        columns = sum(
            checkpoint.tensors[name].shape[1]
            for role, name in view.layers[1].items()
            if (spec := view.spec(role, 1)) is not None and spec.writes_residual and spec.in_space
        )
        config, tensors = checkpoint.config, checkpoint.tensors
        return dict(estimate(view, tensors, config, options, columns, (windows - held_out, held_out)).phases)


if __name__ == "__main__":
    main()
