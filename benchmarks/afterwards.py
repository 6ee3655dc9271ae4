"""After an up-scale: taking the new layers out again, and the logits that ``verify --logits`` compares, beside
transformers with the whole model.

Both sides of the logits are float32 on 256 tokens, and must be equal bit for bit.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

from common import Figure, Run, deus_merge, megabytes, parser, random_checkpoint, report, run, seconds, settle, shape_of
from common import spread as told

_TOKENS = 256


def main() -> None:
    options = parser(__doc__, runs=3)
    options.add_argument("--model", type=Path, help="what is made deeper and stripped; by default SmolLM2-135M")
    options.add_argument("--layers", type=int, help="of the model whose logits are computed")
    options.add_argument(
        "--logits", nargs=2, metavar=("SIDE", "FOLDER"), help="one side of the logits, in this process"
    )
    options = options.parse_args()
    if options.logits:
        print(_logits(*options.logits))
        return
    if options.model is None:
        from deus_merge.models.demo import smollm2, tiny_model

        options.model = tiny_model() if options.small else smollm2(options.scratch.resolve())
    stripped = _strip(options)
    folder = random_checkpoint(options.scratch, shape_of(options))
    sides: dict[str, list[Run]] = {"streamed": [], "whole": []}
    for _ in range(options.runs):
        for side, runs in sides.items():
            settle(folder)
            runs.append(run([sys.executable, Path(__file__), "--logits", side, folder]))
    if len({r.stdout for runs in sides.values() for r in runs}) != 1:
        sys.exit("the logits differ")
    whole, streamed = sides["whole"], sides["streamed"]
    peer = "transformers, whole model"
    figures = [
        Figure("strip: base's weights byte for byte, time", seconds(stripped), "s"),
        Figure("strip: peak anonymous memory", megabytes(stripped), "MB"),
        Figure("logits, the same bits: memory", megabytes(streamed), "MB", "", None, megabytes(whole), peer),
        Figure("logits: time", seconds(streamed), "s", "", None, seconds(whole), peer),
    ]
    details = {"strip": told(stripped)} | {side: told(runs) for side, runs in sides.items()}
    report(Path(__file__).stem, figures, options, details)


def _strip(options) -> list[Run]:
    """Up-scale once, take the layers out several times, compare the weights with the base's."""
    deeper, base = (options.scratch.resolve() / name for name in ("afterwards-deeper", "afterwards-base"))
    runs = []
    try:
        shutil.rmtree(deeper, ignore_errors=True)
        run(deus_merge("upscale", options.model, deeper, "--insert", "top_half", "--quiet"))
        for _ in range(options.runs):
            shutil.rmtree(base, ignore_errors=True)
            settle(deeper)
            runs.append(run(deus_merge("strip", deeper, base)))
            weights = "model.safetensors"
            if (base / weights).read_bytes() != (options.model / weights).read_bytes():
                sys.exit("strip gave other weights than the base's")
    finally:
        for folder in (deeper, base):
            shutil.rmtree(folder, ignore_errors=True)
    return runs


def _logits(side: str, folder: str) -> str:
    """sha256 of the logits, (tokens, vocabulary) float32."""
    import torch

    ids = torch.arange(_TOKENS)[None] % 1000  # (1, tokens)
    if side == "streamed":
        from deus_merge.verify.logits import run as streamed

        logits = streamed(Path(folder), ids)[0]
    else:
        from transformers import AutoModelForCausalLM

        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0]
    return hashlib.sha256(logits.contiguous().numpy()).hexdigest()


if __name__ == "__main__":
    main()
