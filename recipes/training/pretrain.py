"""Continued pre-training of an up-scaled model on text: only its new layers train, and the base is watched.

    deus-merge upscale HuggingFaceTB/SmolLM2-135M-Instruct deeper
    python recipes/training/pretrain.py deeper TEXT.txt --out trained

Text is streamed: from text files, from JSON lines or Parquet files with a column of texts, or from a data set on the
hub (org/name, or org/name:config). Documents are joined, with the end token between them, and cut into windows of
--length tokens; one document in twenty is held out. The data is read again and again, in another order, until --steps
updates are made.

For one GPU (or a CPU, in minutes for a small model); needs pip install "deus-merge[train]". --resume goes on after an
interruption, with the same losses as without one. The result is an ordinary model: it runs in transformers,
`deus-merge upscale` can make it deeper, `deus-merge strip` removes the new layers, and sft.py trains it further.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import datasets
import shared
import transformers


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = shared.parser(__doc__.splitlines()[0], "text, JSON lines or Parquet files; or a data set on the hub")
    parser.add_argument("--column", default="text", help="the column with the texts")
    options = shared.parse(parser, arguments)
    prepared = shared.prepare(options)
    learn, rest = shared.parts(shared.read(options))
    held_out = [*itertools.islice(windows(rest, prepared.tokenizer, options), options.eval_size)]
    if not held_out:
        raise SystemExit(
            f"the documents that are held out have no {options.length} tokens: more text, or less --length"
        )
    packed = {"rows": learn, "tokenizer": prepared.tokenizer, "options": options}
    trainer = transformers.Trainer(
        model=prepared.model,
        args=transformers.TrainingArguments(**shared.trainer_settings(options)),
        train_dataset=datasets.IterableDataset.from_generator(endless, gen_kwargs=packed),
        eval_dataset=held_out,
    )
    return shared.run(trainer, prepared, options)


def endless(rows: datasets.IterableDataset, tokenizer: Any, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Windows of the rows, again and again, each time in another order."""
    for seed in itertools.count(options.seed):
        found = False
        for window in windows(rows.shuffle(seed=seed, buffer_size=1000), tokenizer, options):
            found = True
            yield window
        if not found:
            raise SystemExit(f"the texts have no {options.length} tokens to learn from")


def windows(rows: datasets.IterableDataset, tokenizer: Any, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The documents one after the other, cut into windows."""
    ids: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for row in rows:
        if options.column not in row:
            raise SystemExit(f"--column: there is no {options.column!r} in {', '.join(row)}")
        ids += tokenizer(row[options.column], verbose=False)["input_ids"] + end
        while len(ids) >= options.length:
            window, ids = ids[: options.length], ids[options.length :]
            yield {"input_ids": window, "labels": window}


if __name__ == "__main__":
    main()
