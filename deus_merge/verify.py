"""A finished checkpoint against its plan, its base and transformers. Streams: memory does not grow with the model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .architecture import ModelView, view_model
from .checkpoint.header import read_small
from .checkpoint.pickled import has_safetensors
from .checkpoint.reader import Checkpoint, TensorInfo
from .config import layer_lists
from .errors import DeusMergeError
from .report.manifest import read_manifest

_CHUNK = 1 << 18  # bytes compared at a time


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        passed: True, False, or None when it could not be looked at.
        detail: A count, a reason, or where it failed.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Verification:
    """All checks of one checkpoint."""

    folder: Path
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(c.passed is not False for c in self.checks)

    def describe(self) -> dict:
        """As JSON data."""
        return {
            "folder": str(self.folder),
            "passed": self.passed,
            "checks": [{"check": c.name, "passed": c.passed, "detail": c.detail} for c in self.checks],
        }


def verify(folder: str | Path, *, quick: bool = False, logits_text: str | None = None) -> Verification:
    """Check an output folder.

    Args:
        folder: A finished output (or one about to be renamed into place).
        quick: Leave out what needs torch or transformers: finite values, and building the model.
        logits_text: Also run base and output over this text in float32 and compare their logits.

    Raises:
        CheckpointError: there is no manifest, so nothing to compare with.
    """
    folder = Path(folder)
    record = read_manifest(folder)
    checks: list[Check] = []

    def run(name: str, check: Callable[[], tuple[bool | None, str]]) -> None:
        try:
            checks.append(Check(name, *check()))
        except DeusMergeError as error:
            checks.append(Check(name, False, str(error)))

    opened: list[tuple[Checkpoint, ModelView]] = []

    def files() -> tuple[bool, str]:
        checkpoint = Checkpoint.open(folder)
        opened.append((checkpoint, view_model(checkpoint.config, tuple(checkpoint.tensors), folder)))
        return True, f"{len(checkpoint.files)} files, {len(checkpoint.tensors)} tensors"

    run("files and headers", files)
    if opened:
        checkpoint, view = opened[0]
        run("tensors against the plan", lambda: _names(checkpoint, record))
        run("layers and config", lambda: _layers(checkpoint, view, record))
        present = {name: o for name, o in record["tensors"].items() if name in checkpoint.tensors}
        run("other files", lambda: _other_files(folder, record))
        run("zeroed tensors", lambda: _zeros(checkpoint, present))
        run("copied tensors", lambda: _copies(checkpoint, present, record["sources"]))
        if not quick:
            run("finite values", lambda: _finite(checkpoint))
            run("transformers", lambda: _transformers(checkpoint, view))
        if logits_text is not None:
            run("logits", lambda: _logits(folder, record, logits_text))
    return Verification(folder, tuple(checks))


def _names(checkpoint: Checkpoint, record: dict) -> tuple[bool, str]:
    missing = sorted(set(record["tensors"]) - set(checkpoint.tensors))
    extra = sorted(set(checkpoint.tensors) - set(record["tensors"]))
    if missing or extra:
        return False, f"missing: {missing[:3]}, not planned: {extra[:3]}"
    return True, f"{len(checkpoint.tensors)} as planned"


def _layers(checkpoint: Checkpoint, view: ModelView, record: dict) -> tuple[bool, str]:
    if view.num_layers != record["num_layers"]:
        return False, f"{view.num_layers} layers, planned {record['num_layers']}"
    section = checkpoint.config
    for key in view.layers_path[:-1]:
        section = section[key]
    lists = layer_lists(checkpoint.config, view.layers_path)
    if isinstance(kinds := section.get("layer_types"), list) and len(kinds) != view.num_layers:
        return False, f"layer_types has {len(kinds)} entries for {view.num_layers} layers"
    named = f", lists: {', '.join(lists)}" if lists else ""
    return True, f"{view.num_layers} layers, {len(record['new_layers'])} new{named}"


def _other_files(folder: Path, record: dict) -> tuple[bool, str]:
    """Config, tokenizer and recipe as they were written; the model card is the user's to edit."""
    for name, digest in record["files"].items():
        if not (folder / name).is_file():
            return False, f"{name} is missing"
        if hashlib.sha256(read_small(folder / name)).hexdigest() != digest:
            return False, f"{name} is not as it was written"
    return True, f"{len(record['files'])} as written"


def _zeros(checkpoint: Checkpoint, origins: dict) -> tuple[bool, str]:
    names = [name for name, o in origins.items() if o["action"] == "zeros"]
    wrong = _first_different([(checkpoint.tensors[name], None) for name in names])
    return (True, f"{len(names)} zero") if wrong is None else (False, f"{names[wrong]} is not zero")


def _copies(checkpoint: Checkpoint, origins: dict, sources: list[dict]) -> tuple[bool | None, str]:
    wanted = [(name, o) for name, o in origins.items() if o["action"] == "copy"]
    known: dict[int, Checkpoint] = {}
    for index in {o["model"] for _, o in wanted}:
        folder = Path(sources[index]["folder"])
        if not folder.is_dir():
            return None, f"source {folder} is not there any more"
        known[index] = Checkpoint.open(folder)
        if known[index].fingerprint != sources[index]["fingerprint"]:
            return None, f"source {folder} has changed since"
    pairs = []
    for name, origin in wanted:
        ours, theirs = checkpoint.tensors[name], known[origin["model"]].tensors.get(origin["tensor"])
        if theirs is None or theirs.nbytes != ours.nbytes or theirs.dtype != ours.dtype:
            return False, f"{name} has no equal in its source"
        pairs.append((ours, theirs))
    wrong = _first_different(pairs)
    if wrong is not None:
        return False, f"{wanted[wrong][0]} differs from {wanted[wrong][1]['tensor']} of its source"
    return True, f"{len(wanted)} equal to their sources, byte for byte"


def _first_different(pairs: Sequence[tuple[TensorInfo, TensorInfo | None]]) -> int | None:
    """The index of the first pair of equally large stored tensors whose bytes differ; None stands for all zeros."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return next((i for i, same in enumerate(pool.map(_equal, pairs)) if not same), None)


def _equal(pair: tuple[TensorInfo, TensorInfo | None]) -> bool:
    # Two small buffers that are used again and again: they stay in the processor's cache.
    ours, theirs = pair
    one, two = memoryview(bytearray(_CHUNK)), memoryview(bytearray(_CHUNK))
    with ours.file.open("rb", buffering=0) as first, (theirs or ours).file.open("rb", buffering=0) as second:
        for at in range(0, ours.nbytes, _CHUNK):
            size = min(_CHUNK, ours.nbytes - at)
            if os.preadv(first.fileno(), [one[:size]], ours.offset + at) != size:
                return False
            if theirs and os.preadv(second.fileno(), [two[:size]], theirs.offset + at) != size:
                return False
            if one.obj != two.obj:  # what a short last read left in both buffers was equal already
                return False
    return True


def _finite(checkpoint: Checkpoint) -> tuple[bool, str]:
    import torch

    for name in checkpoint.tensors:
        tensor = checkpoint.read(name)
        if tensor.is_floating_point():
            flat = tensor.flatten()
            if tensor.element_size() == 1:  # float8 knows no isfinite
                flat = flat.to(torch.float32)
            if not all(bool(torch.isfinite(piece).all()) for piece in flat.split(1 << 22)):
                return False, f"{name} holds NaN or infinity"
    return True, f"{len(checkpoint.tensors)} tensors"


def _transformers(checkpoint: Checkpoint, view: ModelView) -> tuple[bool | None, str]:
    """Whether transformers builds this model (on the meta device) with exactly these names and shapes."""
    if view.architecture is None:
        return None, f"family {view.model_type!r} is not described here"
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a damaged config makes the library raise whatever it likes
        return False, f"{type(error).__name__}: {error}"
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: info.shape for name, info in checkpoint.tensors.items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
        found.pop("lm_head.weight", None)
    wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    if wrong:
        name = wrong[0]
        return False, f"{len(wrong)} differ, first {name}: {expected.get(name)} expected, {found.get(name)} found"
    return True, f"{type(model).__name__}, {len(expected)} names and shapes"


def _logits(folder: Path, record: dict, text: str) -> tuple[bool | None, str]:
    """Base and output over one text, both in float32: bit for bit when the plan preserves the function."""
    import torch
    import transformers

    base_folder = Path(record["sources"][record["donor"]]["folder"])
    if not base_folder.is_dir():
        return None, f"base {base_folder} is not there any more"
    if not has_safetensors(base_folder):
        return None, f"base {base_folder} has no safetensors: a pickle is not loaded to look at it"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)["input_ids"]
    if ids.numel() < 2:
        return False, "the text has fewer than two tokens: nothing was compared"

    def run(path: Path) -> torch.Tensor:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
        with torch.no_grad():
            return model.eval()(ids).logits[0]  # (tokens, vocabulary)

    base, ours = run(base_folder), run(folder)
    losses = [torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).item() for logits in (base, ours)]
    told = f"{ids.numel()} tokens, loss {losses[0]:.4f} (base) and {losses[1]:.4f}"
    if torch.equal(base, ours):
        return True, f"equal bit for bit on {told}"
    worst = f"largest difference {(base - ours).abs().max().item():.3g} on {told}"
    return not record["function_preserving"], worst
