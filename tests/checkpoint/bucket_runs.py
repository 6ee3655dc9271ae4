"""What tests of models and outputs elsewhere run, and what they look at."""

from __future__ import annotations

import json
from pathlib import Path

from support import write_recipe

#: MODEL, OTHER and FP8 are addresses
RECIPES = {
    "ot_fuse": "base_model: MODEL\nupscale: {preset: opt_deus, insert: all}\n",
    "documents": """
name: mean
merge_method: linear
parameters: {weight: 1}
models: [{model: MODEL}, {model: OTHER}]
---
base_model: MODEL
slices:
- {merge_method: slerp, parameters: {t: 0.5}, sources: [{model: MODEL}, {model: mean}]}
tokenizer_source: union
""",
    "quantised": "base_model: FP8\nupscale: {preset: opt_deus, insert: {count: 1}}\n",
}
#: a program that is killed at its Nth read of a file that it uploads: RECIPE OUT N
KILLED = """
import os, signal, sys
from deus_merge import api
from deus_merge.checkpoint.storage import _sink
_sink.PART, reads = 5 << 20, 0

def opening(*arguments):
    file = open(*arguments)
    class Killing:
        def __enter__(self): return self
        def __exit__(self, *error): file.close()
        def read(self, size):
            global reads
            reads += 1
            if reads == int(sys.argv[3]):
                import time
                time.sleep(0.3)  # the first part of the second file is there
                os.kill(os.getpid(), signal.SIGKILL)
            return file.read(size)
    return Killing()

_sink.open = opening
api.merge(api.plan(sys.argv[1], max_shard_size=6_000_000), sys.argv[2], api.RunOptions(threads=1))
"""


def written(text: str, root: Path | str, folder: Path) -> Path:
    """A recipe in a folder, whose models are in another one or at an address."""
    for word, model in (("MODEL", "base"), ("OTHER", "other"), ("FP8", "fp8")):
        text = text.replace(word, f"{root}/{model}")
    return write_recipe(folder / "recipe.yml", text)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def objects(out: str) -> dict[str, bytes]:
    """Every object under an address."""
    import obstore
    import obstore.store

    store = obstore.store.from_url(out, client_options={"allow_http": True})
    names = [meta["path"] for found in obstore.list(store) for meta in found]
    return {name: bytes(obstore.get(store, name).bytes()) for name in names}


def put(out: str, name: str, content: bytes) -> None:
    import obstore
    import obstore.store

    obstore.put(obstore.store.from_url(out, client_options={"allow_http": True}), name, content)


def content(files: dict[str, bytes]) -> dict[str, object]:
    """Every file, without times, and without paths, which are relative to a local output."""
    left_out = ("seconds", "sha256", "created", "date", "folder")
    untimed = lambda d: {k: d[k] for k in d if k not in left_out}  # noqa: E731
    manifest = json.loads(files["deus_merge.json"], object_hook=untimed)
    del manifest["files"]["deus_merge.yml"]
    kept = {name: text for name, text in files.items() if name not in ("deus_merge.yml", "README.md")}
    return kept | {"deus_merge.json": manifest}
