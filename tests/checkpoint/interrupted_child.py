"""A run that waits to be killed in the middle of a block: python interrupted_child.py SOURCE OUT BLOCK."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

from deus_merge.checkpoint import Checkpoint, OutputFolder, TensorEntry, index_json, plan_shards

BLOCKS = 40


def run(source: Path, out: Path, *, resume: bool = False, wait_in: int | None = None) -> list[str]:
    """Merge, and return the blocks that an earlier run had finished."""
    with Checkpoint.open(source) as checkpoint:
        copied = checkpoint["model.embed_tokens.weight"]
        entries = []
        for i in range(BLOCKS):
            entries += [TensorEntry(f"{i}.computed", "U8", (5000,)), TensorEntry(f"{i}.zero", "F32", (100,))]
            entries += [TensorEntry(f"{i}.copied", copied.dtype, copied.shape)]
        layouts = plan_shards([[e] for e in entries], 30_000)
        with OutputFolder(out, plan_hash="p", identity={"seed": 0}, overwrite=True, resume=resume) as folder:
            writer = folder.shards(layouts)
            resumed = list(folder.finished)
            for i in range(BLOCKS):
                if str(i) in folder.finished:
                    continue
                if i == wait_in:
                    writer.write(f"{i}.computed", b"?" * 2000, at=1000)
                    writer.write(f"{i}.zero", b"?" * 400)
                    print("half a block", flush=True)
                    time.sleep(600)
                writer.write(f"{i}.computed", random.Random(i).randbytes(5000))
                writer.zeros(f"{i}.zero")
                writer.copy(f"{i}.copied", copied)
                folder.record(str(i), {"cost": i / 7})
                if i % 3 == 2:
                    folder.flush()
            (folder.folder / "model.safetensors.index.json").write_bytes(index_json(layouts))
            (folder.folder / "config.json").write_text("{}")
            folder.finish()
    return resumed


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), wait_in=int(sys.argv[3]))
