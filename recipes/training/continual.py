"""Continual pre-training of an up-scaled model on plain text: only its new layers train, and the base is watched.

    deus-merge upscale demo/SmolLM2-135M-Instruct deeper
    python recipes/training/continual.py deeper TEXT [TEXT ...] --out trained

Takes minutes on a CPU; needs accelerate. The result is an ordinary model: it runs in transformers, `deus-merge upscale`
can make it deeper, and `deus-merge strip trained base` removes the new layers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers

from deus_merge import training


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="an output folder of deus-merge")
    parser.add_argument("text", type=Path, nargs="+", help="plain text files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--context", type=int, default=256, help="tokens per window")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--output-ratio", type=float, default=1.0, help="the rate of what began as zeros, over --lr")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.out.absolute() == options.model.absolute():
        parser.error("--out must be another folder than the model's")

    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    dtype = transformers.AutoConfig.from_pretrained(options.model).dtype
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    print(training.freeze_base(model, options.model))
    learn, held_out = windows(tokenizer, options.text, options.context)
    print(f"{len(learn)} windows of {options.context} tokens to learn from, {len(held_out)} held out")

    optimizer = training.optimizer(
        model, options.model, kind=options.optimizer, lr=options.lr, output_ratio=options.output_ratio
    )
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(options.out),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=options.batch,
            lr_scheduler_type="cosine",
            warmup_steps=options.steps // 20,
            logging_steps=max(1, options.steps // 10),
            save_strategy="no",
            report_to="none",
            seed=options.seed,
        ),
        train_dataset=learn,
        eval_dataset=held_out,
        optimizers=(optimizer, None),
    )
    training.watch(trainer, options.model)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"held-out loss: {before:.4f} before, {after:.4f} after {options.steps} steps")

    model.to(dtype).save_pretrained(options.out)  # in the stored dtype, so that frozen tensors keep their bytes
    tokenizer.save_pretrained(options.out)
    training.carry_manifest(options.model, options.out)
    return {"before": before, "after": after}


def windows(tokenizer, files: list[Path], context: int) -> tuple[list[dict], list[dict]]:
    """Windows of the concatenated texts to learn from, and one in twenty held out."""
    ids: list[int] = []
    for file in files:
        ids += tokenizer(file.read_text(encoding="utf-8", errors="replace"), verbose=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
    cut = [ids[i : i + context] for i in range(0, len(ids) - context + 1, context)]
    if len(cut) < 2:
        raise SystemExit(f"the texts have {len(ids)} tokens: at least two windows of {context} are needed")
    examples = [{"input_ids": window, "labels": window} for window in cut]
    return [example for i, example in enumerate(examples) if i % 20], examples[::20]


if __name__ == "__main__":
    main()
