"""Trains the tiny Llama that ships as ``deus_merge/models/tiny/``, on the text of Python's standard library; and tiny
models of other families for the tests, which read text with the shipped model's tokenizer.

    python benchmarks/train_tiny.py --out deus_merge/models/tiny
    python benchmarks/train_tiny.py --family gemma2 --out tests/families/trained/gemma2

Question it answers: what loss does such a model have, and on what text. The run depends on the seed, the Python
version (its standard library is the text) and the versions of torch and tokenizers; it uses one core and no clock:
``--minutes`` stands for a number of steps. Needs torch, transformers and tokenizers; no download.
"""

from __future__ import annotations

import argparse
import ast
import io
import platform
import random
import sysconfig
import textwrap
import time
import tokenize
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from deus_merge.models.demo import tiny_model

VOCABULARY = 2048
CONTEXT = 256  # tokens in a window, and the model's longest position
BATCH = 8  # windows in a step
LEARNING_RATE = 2e-2
STEPS_PER_MINUTE = 140  # about what one server core does; fixes what --minutes means
BOS, EOS = "<s>", "</s>"
#: tests, generated tables and vendored grammars: much text, little language
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data"}
_SMALL = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "initializer_range": 0.1}
#: the other families: what their models are for, and their configs; at most half a million parameters each
FAMILIES: Mapping[str, tuple[str, dict[str, object]]] = {
    "gemma2": (
        "norms with scales 1 + w in front of attention and MLP and behind them; layers of sliding and of full "
        "attention in turn; attention and head with softcaps",
        {
            **_SMALL, "intermediate_size": 192, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16,
            "sliding_window": 32, "tie_word_embeddings": True,
        },
    ),
    "gpt_neox": (
        "attention and MLP in parallel; queries, keys and values of each head in turn in one tensor; LayerNorms, "
        "biases, a head of its own",
        {**_SMALL, "intermediate_size": 128, "tie_word_embeddings": False},
    ),
    "qwen3_moe": (
        "experts with a router, of which a token takes two of eight; layer 3 has an MLP instead; norms of queries and "
        "keys per head",
        {
            **_SMALL, "intermediate_size": 192, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8,
            "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [3], "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=["llama", *FAMILIES], default="llama")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--minutes", type=float, default=5.0, help="length of the training, in nominal minutes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    training, held_out = documents(options.seed)
    shipped = options.family != "llama"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model()) if shipped else train_tokenizer(training)
    training_ids, held_out_ids = encode(tokenizer, training), encode(tokenizer, held_out)  # (n,), (m,)
    entropy = unigram_entropy(held_out_ids)
    print(f"text: {len(training_ids)} training tokens, {len(held_out_ids)} held out, unigram {entropy:.3f} nats")

    config = family_config(options.family, tokenizer) if shipped else tiny_config(tokenizer)
    model = AutoModelForCausalLM.from_config(config)
    started = time.process_time()
    curve = train(model, training_ids, held_out_ids, round(options.minutes * STEPS_PER_MINUTE), options.seed)
    seconds = time.process_time() - started

    model.to(torch.bfloat16).float()  # the weights as they will be saved; arithmetic that a CPU is fast in
    loss = held_out_loss(model, held_out_ids)
    print(f"held out: {loss:.3f} nats per token, {entropy - loss:.3f} under the unigram entropy")
    save(model, tokenizer, options.out, with_tokenizer=not shipped)
    facts = {
        "seed": options.seed,
        "steps": f"{curve[-1][0]} of {BATCH} windows of {CONTEXT} tokens",
        "CPU seconds of training, one core": f"{seconds:.0f}",
        "training tokens": len(training_ids),
        "held-out tokens": len(held_out_ids),
        "parameters": sum(p.numel() for p in model.parameters()),
        "held-out loss, bfloat16 weights (nats per token)": f"{loss:.3f}",
        "unigram entropy of the held-out tokens (nats)": f"{entropy:.3f}",
        "made with": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    }
    (options.out / "TRAINING.md").write_text(training_note(options.family, facts, curve), encoding="utf-8")


def documents(seed: int) -> tuple[list[str], list[str]]:
    """Training and held-out documents: the manual's topics, and each module's prose and its source.

    A file falls to one side whole, by a checksum of its name, so that nothing held out is seen in training.
    """
    root = Path(sysconfig.get_path("stdlib"))
    sides: tuple[list[str], list[str]] = ([], [])
    for path in modules():
        inside = path.relative_to(root)
        if not inside.name.startswith("_sysconfigdata"):
            try:
                source = path.read_text(encoding="utf-8")
                side = sides[is_held_out(inside.as_posix())]
                side.extend(prose(source))
                side.append(source)
            except (SyntaxError, UnicodeDecodeError):
                continue
    for name, topic in sorted(manual_topics().items()):
        sides[is_held_out(name)].append(topic)
    for side in sides:
        random.Random(seed).shuffle(side)
    return sides


def modules() -> list[Path]:
    """The standard library's files of Python, without `LEFT_OUT`."""
    root = Path(sysconfig.get_path("stdlib"))
    return [p for p in sorted(root.rglob("*.py")) if LEFT_OUT.isdisjoint(p.relative_to(root).parts)]


def is_held_out(name: str) -> bool:
    """One name in twenty."""
    return zlib.crc32(name.encode()) % 20 == 0


def manual_topics() -> dict[str, str]:
    """The chapters of the language reference that ``help()`` shows."""
    from pydoc_data.topics import topics

    return topics


def prose(source: str) -> Iterator[str]:
    """Docstrings, dedented, and blocks of comment lines, of at least a sentence's length."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= 40:
                yield text
    block: list[str] = []
    last_line = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if token.start[0] != last_line + 1 and block:
            yield from sentence(block)
            block = []
        block.append(token.string.lstrip("#").strip())
        last_line = token.start[0]
    yield from sentence(block)


def sentence(lines: list[str]) -> Iterator[str]:
    """The block as one text, unless it is shorter than a line."""
    text = "\n".join(lines).strip()
    if len(text) >= 80:
        yield text


def train_tokenizer(texts: list[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that sets a start token before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0), (EOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts in one row, each between its start and its end token."""
    eos = tokenizer.eos_token_id
    rows = (encoding.ids + [eos] for encoding in tokenizer.backend_tokenizer.encode_batch(texts))
    return torch.tensor([token for row in rows for token in row])  # (n,)


def unigram_entropy(ids: torch.Tensor) -> float:
    """Entropy of the tokens' own frequencies: the loss of the best model that ignores context, in nats per token."""
    share = torch.bincount(ids).double() / len(ids)  # (v,)
    return -torch.special.xlogy(share, share).sum().item()


def tiny_config(tokenizer: PreTrainedTokenizerFast, **sizes: object) -> LlamaConfig:
    """Six layers, so that half of them is a whole number; three query heads share a key-value head. ``sizes``: what
    another small model has otherwise."""
    tiny = {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "initializer_range": 0.08,  # near hidden_size ** -0.5; the usual 0.02 is for wider models
    }
    return LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **(tiny | sizes),
    )


def family_config(family: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """The config of the tiny model of a family of `FAMILIES`."""
    return AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **FAMILIES[family][1],
    )


def train(
    model: PreTrainedModel,
    ids: torch.Tensor,
    held_out: torch.Tensor,
    steps: int,
    seed: int,
    *,
    batch: int = BATCH,
    lr: float = LEARNING_RATE,
    mixed: bool = False,
) -> list[tuple[int, float, float]]:
    """Muon for the layers' matrices, AdamW for the rest; a short warm-up and a linear fall to zero.

    Args:
        model: Changed in place.
        ids, held_out: Tokens, (n,) and (m,).
        steps: How many.
        seed: Of the windows.
        batch: Windows in a step.
        lr: The highest learning rate.
        mixed: Multiply in bfloat16.

    Returns:
        (step, mean training loss since the row before, held-out loss) ten times, in nats per token.
    """
    draw = torch.Generator().manual_seed(seed)
    hidden = [p for name, p in model.named_parameters() if p.ndim >= 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    optimizers = [
        Orthogonal(hidden, lr),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    warm_up = max(1, steps // 20)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))
        )
        for optimizer in optimizers
    ]
    few = held_out[: 32 * CONTEXT]  # a glance for the curve; the final figure takes all
    curve: list[tuple[int, float, float]] = []
    losses: list[torch.Tensor] = []
    for step in range(1, steps + 1):
        starts = torch.randint(len(ids) - CONTEXT, (batch,), generator=draw)  # (b,)
        windows = ids[starts[:, None] + torch.arange(CONTEXT)].to(model.device)  # (b, t)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
            loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        if step % max(1, steps // 10) == 0 or step == steps:
            curve.append((step, torch.stack(losses).mean().item(), held_out_loss(model, few)))
            print("step {}: training {:.3f}, held out {:.3f}".format(*curve[-1]), flush=True)
            losses.clear()
    return curve


class Orthogonal(torch.optim.Optimizer):
    """Muon: momentum, whose singular values are all set near one. It needs far fewer steps than AdamW did here.

    torch has one too, which multiplies in bfloat16; that is slow on a CPU without such instructions.

    Reference: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks" (quintic Newton-Schulz);
    the step's size by Liu et al. 2025, "Muon is scalable for LLM training", eq. 4.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
                self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
            for shape, params in by_shape.items():
                ahead = torch.stack(
                    [p.grad.lerp(self.state[p]["mean"], group["momentum"]) for p in params]
                )  # (k, o, i), or (k, e, o, i) for experts
                size = group["lr"] * 0.2 * max(shape[-2:]) ** 0.5  # an update as large as AdamW's would be
                for p, update in zip(params, orthogonalised(ahead), strict=True):
                    p.mul_(1 - group["lr"] * group["decay"]).sub_(update, alpha=size)


def orthogonalised(x: torch.Tensor) -> torch.Tensor:
    """Each matrix of ``x`` (.., o, i) with its singular values moved near one, by five Newton-Schulz steps."""
    if x.shape[-2] > x.shape[-1]:
        return orthogonalised(x.mT).mT  # the smaller Gram matrix
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)  # (.., o, i)
    for _ in range(5):
        gram = x @ x.mT  # (.., o, o)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x  # (.., o, i)
    return x


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Mean loss over whole windows that do not overlap, in nats per token."""
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)  # (w, t)
    chunks = (chunk.to(model.device) for chunk in windows.split(BATCH))
    losses = [model(input_ids=chunk, labels=chunk).loss.float() * len(chunk) for chunk in chunks]
    return (torch.stack(losses).sum() / len(windows)).item()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path, *, with_tokenizer: bool = True) -> None:
    """The checkpoint as transformers writes it, in bfloat16."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(out)
    if with_tokenizer:
        tokenizer.save_pretrained(out)


def training_note(family: str, facts: dict[str, object], curve: list[tuple[int, float, float]]) -> str:
    """TRAINING.md: how the model came to be, its figures, and the licence of its text."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    points = "\n".join(f"| {step} | {training:.3f} | {held_out:.3f} |" for step, training, held_out in curve)
    if family == "llama":
        opening = """# The tiny model

A Llama for demonstrations and tests, small enough to ship: it has learned some Python prose and code, nothing more.
Made by `benchmarks/train_tiny.py`, which says how."""
        ending = """None of the text is in this folder, beyond the pieces of words in the
tokenizer's vocabulary. The weights and the tokenizer are under the licence of deus-merge."""
    else:
        about = textwrap.fill(
            f"For tests: {FAMILIES[family][0]}. It has learned some Python prose and code, nothing more, with the "
            "tokenizer of `deus_merge/models/tiny/`. Made by:",
            width=120,
        )
        command = f"python benchmarks/train_tiny.py --family {family} --out tests/families/trained/{family}"
        opening = f"# A tiny {family}\n\n{about}\n\n    {command}"
        ending = "None of the text is in this folder.\nThe weights are under the licence of deus-merge."
    return f"""{opening}

| | |
| - | - |
{rows}

Text: the documentation strings, comments and source of Python's standard library and the chapters of its language
reference that `help()` shows. One file in twenty, by the checksum of its name, is held out.

Losses on the way, in nats per token (held out: the first 32 windows):

| step | training | held out |
| - | - | - |
{points}

Licence of the text: Python and its documentation are (c) Python Software Foundation, under the PSF License Version 2
(https://docs.python.org/3/license.html). {ending}
"""


if __name__ == "__main__":
    main()
