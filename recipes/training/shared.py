"""What pretrain.py and sft.py share: options, data, the rate, checkpoints, and the end of a training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers.integrations import is_tensorboard_available, is_wandb_available
from transformers.trainer_utils import get_last_checkpoint

from deus_merge import training

#: Options that may differ when a training is resumed
FREE = ("resume", "out", "save_every", "log_every", "report_to")
ZEROED_LR = 1e-5  # of outputs with norms behind them


def parser(description: str, data: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("model", type=Path, help="an output folder of deus-merge, or what was trained from one")
    made.add_argument("data", nargs="+", help=data)
    made.add_argument("--out", type=Path, required=True, help="the new folder for the trained model")
    made.add_argument("--checkpoints", type=Path, help="folder for checkpoints and logs; None for OUT-checkpoints")
    made.add_argument("--resume", action="store_true", help="go on from the last checkpoint, with the same options")
    made.add_argument("--split", default="train", help="of a data set on the hub")
    made.add_argument("--steps", type=int, default=1000, help="updates of the weights")
    made.add_argument("--batch", type=int, default=4, help="sequences in a forward pass")
    made.add_argument("--accumulate", type=int, default=1, help="forward passes for an update")
    made.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    made.add_argument("--lr", type=float, help="the learning rate; None to search for it")
    made.add_argument("--search-steps", type=int, default=128, help="forward passes of that search, 84 at least")
    made.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    made.add_argument("--output-ratio", type=float, default=1.0, help="the rate of what began as zeros, over --lr")
    made.add_argument("--zeroed-lr", type=float, help="that rate itself; 1e-5 where norms stand behind the outputs")
    made.add_argument("--schedule", default="cosine", help="how the rate falls: as lr_scheduler_type of transformers")
    made.add_argument("--warmup", type=int, help="steps; None for a twentieth")
    made.add_argument("--base", choices=("bfloat16", "float32", "8bit", "4bit"), help="how the frozen base is held;"
                      " None for bfloat16 (float32 on a CPU), or for the format that it is stored in")  # fmt: skip
    made.add_argument("--all-layers", action="store_true", help="train the base, too")
    made.add_argument("--device", help="None for the GPU if there is one")
    made.add_argument("--attention", help="as attn_implementation of transformers; None lets it choose")
    made.add_argument("--no-checkpointing", action="store_true", help="keep activations: faster, more memory")
    made.add_argument("--eval-size", type=int, default=64, help="sequences that are held out")
    made.add_argument("--eval-every", type=int, default=100, help="steps between evaluations")
    made.add_argument("--patience", type=int, help="stop after so many evaluations in a row without a better loss, and"
                      " save the best model")  # fmt: skip
    made.add_argument("--save-every", type=int, help="steps between checkpoints; None for --eval-every")
    made.add_argument("--log-every", type=int, default=10)
    made.add_argument("--report-to", help="none, tensorboard, wandb; None for those of them that are installed")
    made.add_argument("--seed", type=int, default=0)
    return made


def parse(made: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    options = made.parse_args(arguments)
    options.checkpoints = options.checkpoints or options.out.with_name(f"{options.out.name}-checkpoints")
    options.save_every = options.save_every or options.eval_every
    if options.out.exists():
        made.error(f"--out: {options.out} exists already: name a new folder")
    if get_folder(options) and not options.resume:
        made.error(f"{options.checkpoints} has checkpoints: --resume goes on from them; or remove them")
    if options.patience and options.save_every % options.eval_every:
        made.error("--patience: --save-every must be a multiple of --eval-every")
    if options.resume and (file := options.checkpoints / "options.json").is_file():
        before, now = json.loads(file.read_text()), plain(options)
        for name in sorted(now.keys() - FREE):
            if before.get(name) != now[name]:
                made.error(
                    f"--{name.replace('_', '-')} was {before.get(name)} when this training began: not {now[name]}"
                )
    return options


def plain(options: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON data."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}


def get_folder(options: argparse.Namespace) -> str | None:
    """The last checkpoint."""
    return get_last_checkpoint(str(options.checkpoints)) if options.checkpoints.is_dir() else None


def prepare(options: argparse.Namespace) -> training.Prepared:
    """The model, ready to train."""
    transformers.set_seed(options.seed)
    base, config = options.base, json.loads((options.model / "config.json").read_text())
    cpu = torch.device(options.device).type == "cpu" if options.device else not torch.cuda.is_available()
    if base is None and cpu and "quantization_config" not in config:
        base = "float32"  # most CPUs are slow in bfloat16
    prepared = training.prepare(
        options.model,
        base=base,
        all_layers=options.all_layers,
        device=options.device,
        checkpointing=not options.no_checkpointing,
        attention=options.attention,
    )
    print(prepared)
    return prepared


def read(options: argparse.Namespace) -> datasets.IterableDataset:
    """A stream of rows, from files or from the hub; nothing is loaded as a whole."""
    files = [Path(name) for name in options.data if Path(name).is_file()]
    if not files:
        if len(options.data) > 1:
            raise SystemExit(f"not files: {', '.join(options.data)}; a data set on the hub is named alone")
        name, _, config = options.data[0].partition(":")
        return datasets.load_dataset(name, config or None, split=options.split, streaming=True)
    if len(files) < len(options.data):
        raise SystemExit(f"not a file: {next(name for name in options.data if not Path(name).is_file())}")
    kinds = {next((s for s in (".jsonl", ".json", ".parquet") if s in f.suffixes), ".txt") for f in files}
    if len(kinds) > 1:
        raise SystemExit(f"files of one kind are needed, not of {', '.join(sorted(kinds))}")
    if kinds == {".txt"}:
        size = 8 * options.length
        return datasets.IterableDataset.from_generator(blocks, gen_kwargs={"files": [*map(str, files)], "size": size})
    kind = "parquet" if kinds == {".parquet"} else "json"
    return datasets.load_dataset(kind, data_files=[*map(str, files)], split="train", streaming=True)


def blocks(files: list[str], size: int) -> Iterator[dict[str, str]]:
    """Blocks of about ``size`` characters that end where a line ends: each counts as a document."""
    for file in files:
        with open(file, encoding="utf-8", errors="replace") as text:
            while block := text.read(size):
                yield {"text": block + text.readline()}


def parts(rows: datasets.IterableDataset) -> tuple[datasets.IterableDataset, datasets.IterableDataset]:
    """Rows to learn from, and one in twenty held out."""
    learn = rows.filter(lambda _, i: i % 20 != 0, with_indices=True)
    return learn, rows.filter(lambda _, i: i % 20 == 0, with_indices=True)


def trainer_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of TrainingArguments, and of trl's SFTConfig."""
    there = {"tensorboard": is_tensorboard_available(), "wandb": is_wandb_available()}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    return {
        "output_dir": str(options.checkpoints),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "per_device_eval_batch_size": options.batch,
        "gradient_accumulation_steps": options.accumulate,
        "lr_scheduler_type": options.schedule,
        "warmup_steps": options.steps // 20 if options.warmup is None else options.warmup,
        "eval_strategy": "steps",
        "eval_steps": options.eval_every,
        "prediction_loss_only": True,
        "save_strategy": "steps",
        "save_steps": options.save_every,
        "save_total_limit": 2,
        "logging_steps": options.log_every,
        "report_to": options.report_to or [name for name, installed in there.items() if installed] or "none",
        "seed": options.seed,
        "use_cpu": bool(options.device) and torch.device(options.device).type == "cpu",
        "dataloader_pin_memory": torch.cuda.is_available(),
        **(best if options.patience else {}),
    }


def run(trainer: transformers.Trainer, prepared: training.Prepared, options: argparse.Namespace) -> dict[str, Any]:
    """Train, evaluate, and save the model; what it returns is for tests."""
    checkpoint = get_folder(options) if options.resume else None
    state = options.checkpoints / "start.json"
    if not options.all_layers:
        training.watch(trainer, options.model)
    if options.patience:
        trainer.add_callback(transformers.EarlyStoppingCallback(options.patience))
    rates: dict[str, Any] = {"output_ratio": options.output_ratio}
    if options.zeroed_lr or (prepared.trainable.normed and options.output_ratio == 1):
        rates = {"zeroed_lr": options.zeroed_lr or ZEROED_LR}
    if checkpoint:
        start = json.loads(state.read_text())
        print(f"goes on from {checkpoint}")
    else:
        start = {"lr": options.lr or search(trainer, options, rates), "before": trainer.evaluate()["eval_loss"]}
        options.checkpoints.mkdir(parents=True, exist_ok=True)
        state.write_text(json.dumps(start))
        (options.checkpoints / "options.json").write_text(json.dumps(plain(options)))
    model = prepared.model
    trainer.optimizer = training.optimizer(model, options.model, kind=options.optimizer, lr=start["lr"], **rates)
    trainer.train(resume_from_checkpoint=checkpoint)
    after, steps = trainer.evaluate()["eval_loss"], trainer.state.global_step
    training.save_trained(model, options.model, options.out, all_layers=options.all_layers)
    print(f"held-out loss: {start['before']:.4f} before, {after:.4f} after {steps} steps\n{next_steps(options)}")
    return {**start, "after": after, "steps": steps, "log": trainer.state.log_history}


def search(trainer: transformers.Trainer, options: argparse.Namespace, rates: dict[str, Any]) -> float:
    """A learning rate, by short trainings on the data."""
    found = training.find_lr(
        trainer.model,
        options.model,
        tensors(trainer.get_train_dataloader()),
        kind=options.optimizer,
        budget_tokens=options.search_steps * options.batch * options.length,
        **rates,
    )
    print(found)
    return found.suggestion


def tensors(batches: Any) -> Iterator[dict[str, torch.Tensor]]:
    for batch in batches:
        yield {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def next_steps(options: argparse.Namespace) -> str:
    out = options.out
    folders = f"checkpoints and logs are in {options.checkpoints}, which you can remove"
    if options.all_layers:
        return f"next: deus-merge verify {out}; {folders}"
    return (
        f"next: deus-merge verify {out}; deus-merge strip {out} BASE; deus-merge upscale {out} DEEPER;\n"
        f"python recipes/training/sft.py {out} CONVERSATIONS.jsonl --all-layers --out TUNED; {folders}"
    )
