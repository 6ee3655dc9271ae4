"""Supervised fine-tuning of an up-scaled model on conversations, with trl: only its new layers train.

    deus-merge upscale demo/SmolLM2-135M-Instruct deeper
    python recipes/training/sft.py deeper CONVERSATIONS.jsonl --out trained

A line of the file is {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}. The last
message is the completion to learn, the ones before it are its prompt; the model's chat template joins them. Takes
minutes on a CPU, with trl.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import datasets
import torch
import transformers
import trl

from deus_merge import training

#: for models without a chat template
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="an output folder of deus-merge")
    parser.add_argument("conversations", type=Path, help="a JSON lines file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="conversations per step")
    parser.add_argument("--context", type=int, default=256, help="maximum number of tokens of a conversation")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--output-ratio", type=float, default=1.0, help="the rate of what began as zeros, over --lr")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.out.absolute() == options.model.absolute():
        parser.error("--out must be another folder than the model's")

    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN
    dtype = transformers.AutoConfig.from_pretrained(options.model).dtype
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    print(training.freeze_base(model, options.model))
    learn, held_out = conversations(options.conversations)
    print(f"{len(learn)} conversations to learn from, {len(held_out)} held out")

    optimizer = training.optimizer(
        model, options.model, kind=options.optimizer, lr=options.lr, output_ratio=options.output_ratio
    )
    trainer = trl.SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=trl.SFTConfig(
            output_dir=str(options.out),
            max_steps=options.steps,
            max_length=options.context,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=options.batch,
            lr_scheduler_type="cosine",
            warmup_steps=options.steps // 20,
            logging_steps=max(1, options.steps // 10),
            save_strategy="no",
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
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


def conversations(file: Path) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Prompts and completions to learn from, and one in twenty held out. Only completions count for the loss."""
    lines = file.read_text(encoding="utf-8").splitlines()
    messages = [json.loads(line)["messages"] for line in lines if line.strip()]
    if len(messages) < 2:
        raise SystemExit(f"{file} has {len(messages)} conversations: at least two are needed")
    pairs = [{"prompt": m[:-1], "completion": m[-1:]} for m in messages]
    learn, held_out = [pair for i, pair in enumerate(pairs) if i % 20], pairs[::20]
    return datasets.Dataset.from_list(learn), datasets.Dataset.from_list(held_out)


if __name__ == "__main__":
    main()
