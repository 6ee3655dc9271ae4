"""A 1.1B-shaped model in FP8 blocks, packed INT4 and NF4 beside the same model in bfloat16: up-scaled, merged, cast.

New layers and merges are computed from values and written in bfloat16, so the work is that of the bfloat16 model and
dequantising; fewer bytes are copied. The bfloat16 model is cast to float16, so that both casts write as much. Both
sides start with their sources in the page cache and nothing waiting for the disk.

The quantised models are made from the bfloat16 one: FP8 and INT4 by our own formats, NF4 by this file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    Figure,
    Run,
    Shape,
    at_most,
    deus_merge,
    fine_tuned,
    median,
    megabytes,
    parser,
    random_checkpoint,
    ratio_at_most,
    report,
    run,
    seconds,
    settle,
    shape_of,
    spread,
)

if TYPE_CHECKING:
    import torch

LIMIT = 1.5  # of ratios
IMPORT, MEMORY = 3, 450  # s and MB that torch may take where the bfloat16 model is copied without it
NEW = 3  # layers
BLOCK, GROUP, RUN = 128, 128, 64  # side of an FP8 block; INT4 and NF4 codes that share a scale
NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
SECTIONS: dict[str, dict[str, Any]] = {
    "fp8": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
    },
    "int4": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP,
        }}},
    },
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is done with a model.

    Attributes:
        what: In words.
        preset: For an up-scale.
        recipe: For a merge; ``{dtype}`` is another dtype than the model's.
        formats: Of the quantised models.
        in_torch: Whether the bfloat16 model needs torch, too.
    """

    what: str
    preset: str = ""
    recipe: str = ""
    formats: tuple[str, ...] = tuple(SECTIONS)
    in_torch: bool = True

    def command(self, models: tuple[Path, Path], out: Path, dtype: str) -> list[str]:
        """The command line.

        Args:
            models: The model, and another one for merges.
            out: The output folder.
            dtype: The dtype of a cast.
        """
        if self.preset:
            where = f"{{count: {NEW}, where: top}}"
            return deus_merge("upscale", models[0], out, "--preset", self.preset, "--insert", where, "--quiet")
        file = out.with_suffix(".yml")
        first, second = (json.dumps(str(model)) for model in models)
        file.write_text(self.recipe.format(first=first, second=second, dtype=dtype))
        return deus_merge("merge", file, out, "--quiet")


CASES = {
    "opt_deus": Case(f"opt_deus, {NEW} new layers", preset="opt_deus", formats=("fp8",)),
    "llama_pro": Case(f"llama_pro, {NEW} new layers", preset="llama_pro", in_torch=False),
    "linear": Case(
        "linear of two models",
        recipe="merge_method: linear\nparameters: {{weight: 0.5}}\nmodels: [{{model: {first}}}, {{model: {second}}}]\n",
    ),
    "cast": Case(
        "cast to another dtype", recipe="merge_method: passthrough\ndtype: {dtype}\nmodels: [{{model: {first}}}]\n"
    ),
}


def main() -> None:
    options = parser(__doc__, runs=3)
    options.add_argument("--layers", type=int, help="of the model (22)")
    options.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options.add_argument("--formats", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    options = options.parse_args()
    shape = shape_of(options)
    base = random_checkpoint(options.scratch, shape)
    pair = (base, fine_tuned(base, shape, 1) if "linear" in options.cases else base)
    models = {"bf16": pair}
    for name in options.formats:
        models[name] = (_quantized(pair[0], shape, name), _quantized(pair[1], shape, name))
    out = options.scratch.resolve() / "quantized-out"
    shutil.rmtree(out, ignore_errors=True)
    figures: list[Figure] = []
    details: dict[str, Any] = {"load at the start": round(os.getloadavg()[0], 1)}
    for case in (CASES[name] for name in options.cases):
        names = [name for name in models if name == "bf16" or name in case.formats]
        runs: dict[str, list[Run]] = {name: [] for name in names}
        try:
            for _ in range(options.runs):
                for name in names:
                    settle(*dict.fromkeys(models[name]))
                    dtype = "float16" if name == "bf16" else "bfloat16"
                    runs[name].append(run(case.command(models[name], out, dtype)))
                    shutil.rmtree(out)
        finally:
            shutil.rmtree(out, ignore_errors=True)
        for name in names:
            details[f"{case.what}, {name}"] = spread(runs[name])
            if name != "bf16":
                figures += _figures(case, name, runs[name], runs["bf16"])
    details["load at the end"] = round(os.getloadavg()[0], 1)
    report(Path(__file__).stem, figures, options, details)


def _figures(case: Case, name: str, ours: list[Run], peer: list[Run]) -> list[Figure]:
    """Times and memory of one format beside bfloat16."""
    pairs = [a.seconds / b.seconds for a, b in zip(ours, peer, strict=True)]
    cpu, peer_cpu = (median([r.cpu for r in runs]) for runs in (ours, peer))
    what, time, peer_time = f"{name.upper()}, {case.what}", seconds(ours), seconds(peer)
    figures = [Figure(f"{what}: processor time", cpu, "s", "", None, peer_cpu, "bfloat16")]
    memory = f"{what}: peak anonymous memory"
    if case.in_torch:
        bar, met = f"median of pairs <= {LIMIT}", median(pairs) <= LIMIT
        figures.append(ratio_at_most(memory, megabytes(ours), megabytes(peer), "MB", "bfloat16", LIMIT))
    else:
        limit = LIMIT * peer_time + IMPORT
        bar, met = f"<= {LIMIT} x bfloat16 + {IMPORT} s = {limit:.1f} s", time <= limit
        figures.append(at_most(memory, megabytes(ours), "MB", MEMORY))
    return [Figure(f"{what}: time", time, "s", bar, met, peer_time, "bfloat16"), *figures]


def _quantized(model: Path, shape: Shape, name: str) -> Path:
    """The model with the matrices of its layers quantised, made once, a tensor at a time."""
    folder = model.with_name(f"{model.name}-{name}")
    if folder.is_dir():
        return folder
    import torch

    from deus_merge.checkpoint.layout import TensorEntry, plan_shards
    from deus_merge.checkpoint.reader import Checkpoint
    from deus_merge.core.units import stored_dtypes

    print(f"making {folder.name} ...", flush=True)
    codes = stored_dtypes()
    read, partial = Checkpoint.open(model), folder.with_name(folder.name + ".partial")

    def parts(tensor: str, size: tuple[int, ...], values: torch.Tensor) -> dict[str, torch.Tensor]:
        return _PARTS[name](values.float()) if ".layers." in tensor and len(size) == 2 else {"": values}

    @cache
    def sizes(size: tuple[int, ...], tensor: str) -> list[tuple[str, str, tuple[int, ...]]]:
        made = parts(tensor, size, torch.zeros(size, dtype=torch.bfloat16))
        return [(rest, codes[part.dtype], tuple(part.shape)) for rest, part in made.items()]

    def entries(tensor: str, size: tuple[int, ...]) -> list[TensorEntry]:
        like = re.sub(r"layers\.\d+\.", "layers.0.", tensor)
        return [TensorEntry(tensor + rest, dtype, part_size) for rest, dtype, part_size in sizes(size, like)]

    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (shard,) = plan_shards([entries(*tensor) for tensor in shape.tensors()], 10**12)
    with open(partial / shard.filename, "wb") as file:
        file.write(shard.header)
        for tensor, size in shape.tensors():
            for rest, part in parts(tensor, size, read.read(tensor)).items():
                file.seek(shard.tensors[tensor + rest][0])
                file.write(part.contiguous().view(-1).view(torch.uint8).numpy().data)
    config = shape.config() | {"quantization_config": SECTIONS[name]}
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    partial.rename(folder)
    return folder


def _by_format(values: torch.Tensor, settings: Mapping[str, Any], *parts: tuple) -> dict[str, torch.Tensor]:
    """A weight as one of our formats quantises it: the rest of a part's name -> the part.

    Args:
        values: In float32.
        settings: Of its quantisation; with the name of the format.
        parts: Label, rest of the name, dtype and shape of each part.
    """
    from deus_merge.checkpoint.formats.registry import formats
    from deus_merge.core.tensors import Quantization, StoredTensor

    named = {label: StoredTensor(rest, dtype, size, Path(), 0, 0) for label, rest, dtype, size in parts}
    quantization = Quantization(settings["format"], named, settings)
    like = StoredTensor("", "BF16", tuple(values.shape), Path(), 0, 0, quantization=quantization)
    made = formats()[settings["format"]].quantize(values, like)
    return {named[label].name: part for label, part in made.items()}


def _fp8(values: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = values.shape
    grid = -(-rows // BLOCK), -(-columns // BLOCK)
    settings = {"format": "fp8", "block": [BLOCK, BLOCK], "power": False}
    return _by_format(values, settings, ("codes", "", "F8_E4M3", (rows, columns)), ("scale", "_scale_inv", "F32", grid))


def _int4(values: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = values.shape
    settings = {
        "format": "compressed_tensors", "stored": "int32", "bits": 4, "block": [1, GROUP], "packed_zeros": False,
    }  # fmt: skip
    return _by_format(
        values,
        settings,
        ("codes", "_packed", "I32", (rows, columns // 8)),
        ("scales", "_scale", "BF16", (rows, columns // GROUP)),
        ("shape", "_shape", "I64", (2,)),
    )


def _nf4(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Runs of the flattened weight, divided by their largest value, as the nearest of 16 numbers."""
    import torch

    table = torch.tensor(NF4)  # (16,)
    runs = values.view(-1, RUN)  # (n / 64, 64)
    largest = runs.abs().amax(1)  # (n / 64,)
    codes = torch.bucketize(runs / largest[:, None], (table[1:] + table[:-1]) / 2).to(torch.uint8).view(-1, 2)
    state = {"quant_type": "nf4", "blocksize": RUN, "dtype": "bfloat16", "shape": list(values.shape)}
    return {
        "": (codes[:, :1] << 4) | codes[:, 1:],
        ".absmax": largest,
        ".quant_map": table,
        ".quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


_PARTS = {"fp8": _fp8, "int4": _int4, "nf4": _nf4}


if __name__ == "__main__":
    main()
