"""What the benchmark scripts share: checkpoints of a given shape, runs with their time and memory, and the table.

Memory is the anonymous resident memory (``RssAnon``) of a process and its children, sampled from outside: mapped
files are the kernel's cache and go when somebody needs the room. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.01
_CHUNK = 1 << 23  # numbers drawn, or bytes read, at once


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; by default TinyLlama 1.1B, 2.2 GB in bfloat16."""

    layers: int = 22
    hidden: int = 2048
    intermediate: int = 5632
    heads: int = 32
    kv_heads: int = 4
    vocabulary: int = 32000

    @property
    def name(self) -> str:
        return f"llama-{self.layers}x{self.hidden}"

    def config(self) -> dict:
        """The checkpoint's config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in file order."""
        d, f, kv = self.hidden, self.intermediate, self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocabulary, d)
        for i in range(self.layers):
            at = f"model.layers.{i}."
            yield at + "input_layernorm.weight", (d,)
            yield at + "self_attn.q_proj.weight", (d, d)
            yield at + "self_attn.k_proj.weight", (kv, d)
            yield at + "self_attn.v_proj.weight", (kv, d)
            yield at + "self_attn.o_proj.weight", (d, d)
            yield at + "post_attention_layernorm.weight", (d,)
            yield at + "mlp.gate_proj.weight", (f, d)
            yield at + "mlp.up_proj.weight", (f, d)
            yield at + "mlp.down_proj.weight", (d, f)
        yield "model.norm.weight", (d,)
        yield "lm_head.weight", (self.vocabulary, d)


SMALL = Shape(layers=4, hidden=256, intermediate=768, heads=8, kv_heads=2, vocabulary=2000)


def parser(description: str | None, runs: int) -> argparse.ArgumentParser:
    """The options every script has."""
    options = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    options.add_argument("--scratch", type=Path, default=Path(".bench"), help="models and outputs go here (.bench)")
    options.add_argument("--runs", type=int, default=runs, help=f"runs of each side; the median counts ({runs})")
    options.add_argument("--json", type=Path, metavar="FILE", help="also save the results here")
    options.add_argument("--small", action="store_true", help="a tiny shape: tries the script, measures nothing")
    return options


def shape_of(options: argparse.Namespace) -> Shape:
    """The shape that ``--small`` and ``--layers`` ask for."""
    shape = SMALL if options.small else Shape()
    return Shape(**{**vars(shape), "layers": options.layers}) if options.layers else shape


def random_checkpoint(scratch: Path, shape: Shape, seed: int = 0) -> Path:
    """A bfloat16 checkpoint of random weights (std 0.02, norms about 1), made once; the model is never in memory."""
    return _checkpoint(scratch.resolve() / shape.name, shape, seed)


def fine_tuned(base: Path, shape: Shape, seed: int, std: float = 0.002) -> Path:
    """A checkpoint that differs from another one by normal noise in every element, made once."""
    return _checkpoint(base.with_name(f"{base.name}-tuned-{seed}"), shape, seed, base, std)


def _checkpoint(folder: Path, shape: Shape, seed: int, base: Path | None = None, std: float = 0.02) -> Path:
    """Random weights, on top of a base's where there is one, chunk by chunk."""
    if folder.is_dir():
        return folder
    import torch

    from deus_merge.checkpoint.layout import TensorEntry, index_json, plan_shards
    from deus_merge.checkpoint.reader import Checkpoint

    print(f"making {folder.name} ...", flush=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)
    shards = plan_shards([[TensorEntry(name, "BF16", size)] for name, size in shape.tensors()], 5 * 10**9)
    below = Checkpoint.open(base) if base else None
    for shard in shards:
        with open(partial / shard.filename, "wb") as file:
            file.write(shard.header)
            for name, entry in shard.entries.items():
                scale = 0.1 if len(entry.shape) == 1 and not below else std
                start = below.read(name).flatten() if below else None
                for at in range(0, entry.nbytes // 2, _CHUNK):
                    count = min(entry.nbytes // 2 - at, _CHUNK)
                    piece = torch.randn(count, generator=random).mul_(scale)  # (chunk,)
                    piece += start[at : at + count] if below else float(len(entry.shape) == 1)
                    file.write(memoryview(piece.bfloat16().view(torch.uint8).numpy()))
                assert file.tell() == shard.tensors[name][1]
    if len(shards) > 1:
        (partial / "model.safetensors.index.json").write_bytes(index_json(shards))
    (partial / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n")
    partial.rename(folder)
    return folder


@dataclass(frozen=True)
class Run:
    """One finished process: wall seconds, processor seconds, peak of anonymous memory in bytes, and what it printed."""

    seconds: float
    cpu: float
    memory: int
    stdout: str


def deus_merge(*arguments: object) -> list[str]:
    """Our command line: the installed script, as a user runs it."""
    script = Path(sys.executable).with_name("deus-merge")
    return [*([str(script)] if script.is_file() else [sys.executable, "-m", "deus_merge"]), *map(str, arguments)]


def run(command: Sequence[object], *, sample: bool = True) -> Run:
    """Run a command to its end. Exits with its messages when it fails.

    Args:
        command: Program and arguments.
        sample: Whether to sample its memory; off for runs so short that watching would count.
    """
    # Compiled modules are cached, as they are for everybody who has not switched that off.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=env)
        peak = _Peak(process.pid) if sample else None
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = code = os.waitstatus_to_exitcode(status)
        memory = peak.stop() if peak else 0
        out.seek(0)
        if code:
            err.seek(0)
            sys.exit(f"{command[0]} exited with {code}:\n{err.read().decode(errors='replace')[-2000:]}")
        return Run(seconds, usage.ru_utime + usage.ru_stime, memory, out.read().decode(errors="replace"))


class _Peak(threading.Thread):
    """Samples a process tree until told to stop."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self._pid, self._peak, self._done = pid, 0, threading.Event()
        if not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists():
            sys.exit("measuring memory needs Linux with /proc/PID/task/TID/children")
        self.start()

    def run(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, sum(map(_anonymous, _tree(self._pid))))

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self._peak


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                children = file.read().split()
            for child in children:
                yield from _tree(int(child))
    except OSError:  # it ended while we looked
        return


def _anonymous(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status") as file:
            line = next((line for line in file if line.startswith("RssAnon:")), "RssAnon: 0 kB")
    except OSError:
        return 0
    return int(line.split()[1]) * 1024


def settle(*warm: Path) -> None:
    """Before a timed run: nobody's pages wait for the disk, and these folders' files are in the cache."""
    os.sync()
    for folder in warm:
        for path in sorted(folder.iterdir()):
            with open(path, "rb", buffering=0) as file:
                while file.read(_CHUNK):
                    pass


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        what: What was measured.
        ours, peer: In ``unit``, medians; peer None where there is none.
        unit: ``s``, ``MB``, or "" for a plain number.
        bar: The bar as text; "" for a figure without one.
        met: Whether it was reached.
        peer_name: What the peer is.
    """

    what: str
    ours: float
    unit: str
    bar: str = ""
    met: bool | None = None
    peer: float | None = None
    peer_name: str = ""

    @property
    def ratio(self) -> float | None:
        return self.ours / self.peer if self.peer else None

    def cells(self) -> tuple[str, ...]:
        peer = "" if self.peer is None else f"{_number(self.peer, self.unit)} ({self.peer_name})"
        ratio = "" if self.ratio is None else f"{self.ratio:.3g}"
        met = {True: "yes", False: "NO", None: ""}[self.met]
        return self.what, _number(self.ours, self.unit), peer, ratio, self.bar, met


COLUMNS = ("what", "ours", "peer", "ratio", "bar", "met")


def _number(value: float, unit: str) -> str:
    text = f"{value:.0f}" if unit == "MB" else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return f"{text} {unit}".strip()


def at_most(what: str, ours: float, unit: str, limit: float) -> Figure:
    """A figure with an absolute bar."""
    return Figure(what, ours, unit, f"<= {_number(limit, unit)}", ours <= limit)


def ratio_at_most(what: str, ours: float, peer: float, unit: str, peer_name: str, limit: float) -> Figure:
    """A figure whose bar is a share of the peer's."""
    return Figure(what, ours, unit, f"ratio <= {limit:.3g}", ours <= limit * peer, peer, peer_name)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def megabytes(runs: Sequence[Run]) -> float:
    """The largest peak of these runs in MB (10^6 bytes)."""
    return max(r.memory for r in runs) / 1e6


def seconds(runs: Sequence[Run]) -> float:
    """Their median time."""
    return median([r.seconds for r in runs])


def spread(runs: Sequence[Run]) -> dict:
    """Every run's figures, for the JSON file."""
    told = {"seconds": [round(r.seconds, 3) for r in runs], "cpu_seconds": [round(r.cpu, 3) for r in runs]}
    return told | ({"anonymous_mb": [round(r.memory / 1e6, 1) for r in runs]} if runs[0].memory else {})


def table(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> str:
    """Aligned text columns."""
    widths = [max(len(str(row[i])) for row in (columns, *rows)) for i in range(len(columns))]
    lines = ["  ".join(str(c).ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (columns, *rows)]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def report(title: str, figures: Sequence[Figure], options: argparse.Namespace, details: dict) -> None:
    """Print the table and save what ``--json`` asks for."""
    print()
    for name, told in details.items():
        if isinstance(told, dict) and "cpu_seconds" in told:
            print(f"{name}: " + ", ".join(f"{key} {values}" for key, values in told.items()))
    print(f"\n{title}\n{table([f.cells() for f in figures], COLUMNS)}", flush=True)
    if options.json:
        lines = [vars(f) | {"ratio": f.ratio} for f in figures]
        options.json.write_text(json.dumps({"title": title, "figures": lines, "details": details}, indent=1) + "\n")
