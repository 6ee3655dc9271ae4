"""Training steps a second of a small model, by how many processes share the device: what ``compare --workers`` gains.

    python benchmarks/side_by_side.py --device cuda --processes 1 12
    nvidia-cuda-mps-control -d; python benchmarks/side_by_side.py --device cuda --processes 12

Each process trains every eighth layer of a Llama of SmolLM2's shape, four layers deeper, on two windows of 256 tokens.
"""

from __future__ import annotations

import multiprocessing
import time
from argparse import Namespace

from common import SMALL, Figure, Shape, parser, report

DEEPER = Shape(layers=34, hidden=576, intermediate=1536, heads=9, kv_heads=3, vocabulary=49_152)
WARM_UP, BATCH, LENGTH = 3, 2, 256
PATIENCE = 300  # seconds, in which others start, too


def main() -> None:
    options = parser(__doc__, runs=1)
    options.add_argument("--device", default="cpu", help="where steps are made (cpu)")
    options.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="how many at the same time (1 2)")
    options.add_argument("--seconds", type=float, default=6, help="of measuring (6)")
    options = options.parse_args()
    figures, alone = [], 0.0
    for count in options.processes:
        rate = steps_a_second(count, options)
        alone = alone or rate
        figures.append(Figure(f"{count} processes: steps a second together", rate, "", "", None, alone, "the first"))
    report("Side by side", figures, options, {})


def steps_a_second(count: int, options: Namespace) -> float:
    """Of all processes together."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count)
    queue = context.Queue()
    settings = (SMALL if options.small else DEEPER, options.device, options.seconds, barrier, queue)
    processes = [context.Process(target=train, args=settings, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    rates = [queue.get(timeout=PATIENCE) for _ in processes]
    for process in processes:
        process.join()
    return sum(rates)


def train(shape: Shape, device: str, seconds: float, barrier, queue) -> None:
    """Make steps as long as the others do, and report how many a second."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    config = {**shape.config(), "tie_word_embeddings": True}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    for index, layer in enumerate(model.model.layers):
        layer.requires_grad_(index % 8 == 0)
    for module in (model.model.embed_tokens, model.model.norm):
        module.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        windows = torch.randint(0, shape.vocabulary, (BATCH, LENGTH), device=device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = model(input_ids=windows, labels=windows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    for _ in range(WARM_UP):
        step()
    barrier.wait(PATIENCE)
    began, steps = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        step()
        steps += 1
    queue.put(steps / (time.monotonic() - began))


if __name__ == "__main__":
    main()
