"""Supervised fine-tuning of an up-scaled model on conversations, with trl.

    deus-merge upscale HuggingFaceTB/SmolLM2-135M-Instruct deeper
    python recipes/training/sft.py deeper CONVERSATIONS.jsonl --out trained

Conversations are streamed, from JSON lines or Parquet files, or from a data set on the hub (org/name:config). A row has
"messages", [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}], of which the last is the
completion to learn and the others are its prompt, joined by the model's chat template; or "prompt" and "completion".

Only the new layers train. LLaMA-Pro's authors fine-tune all layers after the continued pre-training of the new ones:
--all-layers, with a rate of about 2e-5. For one GPU (or a CPU, in minutes for a small model); needs Python 3.11 and
pip install "deus-merge[train]".
"""

from __future__ import annotations

import itertools
from typing import Any

import datasets
import shared
import trl

#: for models without a chat template
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = shared.parser(__doc__.splitlines()[0], "JSON lines or Parquet files; or a data set on the hub")
    parser.add_argument(
        "--packing", action="store_true", help="several conversations in a sequence, apart from another"
    )
    options = shared.parse(parser, arguments)
    prepared = shared.prepare(options)
    tokenizer = prepared.tokenizer
    without_template = tokenizer.chat_template is None
    if without_template:
        tokenizer.chat_template = PLAIN
    learn, rest = shared.parts(pairs(shared.read(options)))
    held_out = [*itertools.islice(rest, options.eval_size)]
    if not held_out or next(iter(learn), None) is None:
        raise SystemExit("at least two conversations are needed")
    trainer = trl.SFTTrainer(
        model=prepared.model,
        processing_class=tokenizer,
        args=trl.SFTConfig(
            max_length=options.length,
            packing=options.packing,
            eval_packing=False,
            shuffle_dataset=False,
            bf16=False,  # the model's own forward pass runs under autocast
            gradient_checkpointing=False,  # training.prepare has enabled it
            **shared.trainer_settings(options),
        ),
        train_dataset=learn.shuffle(seed=options.seed, buffer_size=1000).repeat(None),
        eval_dataset=datasets.Dataset.from_list(held_out),
    )
    done = shared.run(trainer, prepared, options)
    if without_template:
        tokenizer.save_pretrained(options.out)
    return done


def pairs(rows: datasets.IterableDataset) -> datasets.IterableDataset:
    """Prompts and completions. Only completions count for the loss."""
    names = {*next(iter(rows), {})}
    if {"prompt", "completion"} <= names:
        return rows.select_columns(["prompt", "completion"])
    if "messages" not in names:
        raise SystemExit(f"a row has {', '.join(sorted(names))}: neither messages, nor prompt and completion")
    long = rows.filter(lambda row: len(row["messages"]) > 1)
    return long.map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}, remove_columns=sorted(names)
    )


if __name__ == "__main__":
    main()
