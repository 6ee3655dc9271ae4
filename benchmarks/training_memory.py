"""The estimate of the memory that training new layers takes, against the memory that a training step took.

    python benchmarks/training_memory.py
    python benchmarks/training_memory.py --device cuda --large

A random model of each shape is made deeper, loaded in bfloat16, and frozen but for its new layers, which are float32.
Then it makes steps under bfloat16 autocast: forward, backward, AdamW; without and with gradient checkpointing. Measured
is torch's own accounting: the bytes of all weights and optimizer states, and on top of them the most that torch's
allocator gave at the same time during one step (on the CPU by the profiler's memory events). Memory that libraries take
without torch, and the fixed overhead of the estimate, are in neither figure.
"""

from __future__ import annotations

import gc
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Figure, parser, report

TOLERANCE = 0.15


@dataclass(frozen=True)
class Case:
    """A model and how it is trained.

    Attributes:
        name: What it is like.
        kind: The class of its config in transformers.
        layers, hidden, intermediate, heads, kv_heads, vocabulary: Its sizes.
        insert: The places of new layers.
        batch, length: Of a forward pass.
        more: Other settings of its config.
        optimizer: As in `TrainingSettings`.
        base: The dtype of the base.
    """

    name: str
    kind: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    insert: Any
    batch: int
    length: int
    more: dict[str, Any]
    optimizer: str = "adamw"
    base: str = "bfloat16"


TOP = {"count": 3, "where": "top"}
EVEN = {"count": 3, "where": "even"}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "head_dim": 32}
CASES = (
    Case("Llama", "LlamaConfig", 9, 256, 704, 8, 4, 4000, TOP, 4, 256, {}),
    Case("Llama", "LlamaConfig", 9, 256, 704, 8, 4, 4000, EVEN, 1, 64, {}),
    Case("Llama", "LlamaConfig", 9, 256, 704, 8, 4, 4000, EVEN, 2, 256, {}, optimizer="muon"),
    Case("Llama", "LlamaConfig", 9, 256, 704, 8, 4, 4000, EVEN, 2, 256, {}, base="float32"),
    Case("Llama", "LlamaConfig", 12, 512, 1536, 8, 4, 32000, "top_half", 2, 256, {"tie_word_embeddings": False}),
    Case("SmolLM2", "LlamaConfig", 30, 576, 1536, 9, 3, 49152, {"count": 4, "where": "top"}, 1, 512, {}),
    Case("Qwen3", "Qwen3Config", 8, 384, 1024, 6, 3, 8000, TOP, 2, 256, {"head_dim": 128}),
    Case("Qwen3-MoE", "Qwen3MoeConfig", 8, 256, 704, 8, 4, 4000, EVEN, 2, 256, MOE),
    Case("Gemma 2", "Gemma2Config", 8, 256, 704, 8, 4, 8000, EVEN, 2, 256, {"head_dim": 32}),
    Case("GPT-NeoX", "GPTNeoXConfig", 8, 256, 1024, 8, 8, 8000, EVEN, 2, 256, {}),
)


LLAMA_8B = (32, 4096, 14_336, 32, 8, 128_256)
UNTIED = {"tie_word_embeddings": False}
LARGE = (
    Case("Llama 1B", "LlamaConfig", 16, 2048, 8192, 32, 8, 128_256, "top_half", 2, 2048, {}),
    Case("Llama 8B", "LlamaConfig", *LLAMA_8B, {"count": 4, "where": "even"}, 1, 2048, UNTIED),
    Case("Llama 8B", "LlamaConfig", *LLAMA_8B, {"count": 4, "where": "top"}, 1, 2048, UNTIED),
)


def main() -> None:
    options = parser(__doc__, runs=1)
    options.add_argument("--device", default="cpu", help="where a step is made (cpu)")
    options.add_argument("--large", action="store_true", help="models of 1 and 8 billion parameters: for a GPU")
    options = options.parse_args()
    warnings.simplefilter("ignore")
    figures, details = [], {}
    cases = LARGE if options.large else CASES
    for number, case in enumerate(cases[:1] if options.small else cases):
        scratch = options.scratch / f"training-memory-{number}"
        for figure, detail in compare(case, scratch, options.device):
            figures.append(figure)
            details[figure.what] = detail
            print(f"{figure.what}: estimated {figure.ours:.0f} MB, measured {figure.peer:.0f} MB", flush=True)
    report("Training memory: estimate against measurement", figures, options, details)


def compare(case: Case, scratch: Path, device: str) -> Iterator[tuple[Figure, dict]]:
    """Lines of the table, without and with checkpointing, and their details in MB."""
    from deus_merge import api

    base, out = scratch / "base", scratch / "out"
    shutil.rmtree(scratch, ignore_errors=True)
    _random_model(case, base, device)
    plan = api.plan(api.upscale_recipe(base, preset="llama_pro", insert=case.insert))
    api.merge(plan, out, api.RunOptions(verify=False))
    shutil.rmtree(base)
    for checkpointing in (False, True):
        settings = api.TrainingSettings(case.batch, case.length, case.optimizer, checkpointing, case.base)
        estimate = plan.training_memory(settings)
        assert estimate is not None
        stored, step = _measured(out, settings, device)
        estimated, measured = (estimate.peak - estimate.overhead) / 1e6, (stored + step) / 1e6
        how = f"{case.batch} x {case.length} tokens" + (", checkpointing" if checkpointing else "")
        special = "".join(f", {v}" for v in (case.optimizer, case.base) if v not in ("adamw", "bfloat16"))
        what = (
            f"training {case.name} {plan.shape.parameters / 1e6:.0f} M, {len(plan.new_layers)} new layers{special}, "
            f"{how}"
        )
        met = abs(estimated / measured - 1) <= TOLERANCE
        bar = f"within {TOLERANCE:.0%}"
        detail = {"phase": estimate.phase, "stored": stored / 1e6, "step": step / 1e6, "estimate": estimate.describe()}
        yield Figure(what, estimated, "MB", bar, met, measured, "measured"), detail
    shutil.rmtree(scratch)


def _random_model(case: Case, folder: Path, device: str) -> None:
    import torch
    import transformers

    sizes = {
        "num_hidden_layers": case.layers, "hidden_size": case.hidden, "intermediate_size": case.intermediate,
        "num_attention_heads": case.heads, "num_key_value_heads": case.kv_heads, "vocab_size": case.vocabulary,
        "tie_word_embeddings": True,
    }  # fmt: skip
    config = getattr(transformers, case.kind)(**{**sizes, **case.more})
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def _measured(out: Path, settings: Any, device: str) -> tuple[int, int]:
    """The bytes of weights and optimizer states, and the most that a step takes on top."""
    import torch
    import transformers

    from deus_merge import training

    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=getattr(torch, settings.base)).to(device)
    training.freeze_base(model, out)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    model.train()
    if settings.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizers = _optimizers(settings.optimizer, trained)
    tokens = torch.randint(0, model.config.vocab_size, (settings.batch, settings.length), device=device)  # (B, L)

    def step() -> None:
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    step()  # makes the optimizer's states
    states = [t for o in optimizers for state in o.state.values() for t in state.values() if torch.is_tensor(t)]
    stored = sum(t.nbytes for t in (*model.parameters(), *states))
    gc.collect()
    return stored, _peak_of_gpu(step) if torch.device(device).type == "cuda" else _peak(step)


def _optimizers(name: str, trained: list) -> list:
    """As on CUDA, where torch updates all tensors at once."""
    import torch

    if name == "muon":
        others = [p for p in trained if p.ndim != 2]
        return [torch.optim.Muon([p for p in trained if p.ndim == 2]), torch.optim.AdamW(others, foreach=True)]
    return [torch.optim.AdamW(trained, foreach=True)]


def _peak_of_gpu(action: Callable[[], None]) -> int:
    """The most that torch's CUDA allocator held at the same time, on top of what it held before the action."""
    import torch

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    action()
    return torch.cuda.max_memory_allocated() - before


def _peak(action: Callable[[], None]) -> int:
    """The most that torch's CPU allocator held at the same time, of what it gave during the action."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    inner = profiler.profiler
    assert inner is not None and inner.kineto_results is not None
    events: list[Any] = [e for e in inner.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    if not most:
        sys.exit("the profiler of this torch has no memory events")
    return most


if __name__ == "__main__":
    main()
