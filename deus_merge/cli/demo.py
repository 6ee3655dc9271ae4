"""``demo``: up-scaling a small real model from start to end."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import click

from .. import api
from ..checkpoint.staging import check_local
from ..core.text import plural
from .completion import complete_inserts, complete_presets
from .next_steps import show_next
from .output import note, quiet_transformers, show_verification
from .progress import block_progress, check_progress

_PROMPTS = {False: ("The capital of France is", 16), True: ("Return True if", 5)}  # by --tiny; number of new tokens


@click.command()
@click.argument("out", type=click.Path(path_type=Path), default="demo")
@click.option("--tiny", is_flag=True, help="Use the tiny trained model in the package: no download.")
@click.option("--preset", default="opt_deus", show_default=True, shell_complete=complete_presets)
@click.option("--insert", default="even", show_default=True, shell_complete=complete_inserts)
def demo(out: Path, tiny: bool, preset: str, insert: str):
    """Up-scale a small real model into the folder OUT, verify the result, let both models continue a sentence,
    and write the report.

    \b
    Example:
      deus-merge demo --tiny
    """
    from ..models.demo import smollm2, tiny_model

    check_local(out)
    quiet_transformers()
    base = tiny_model() if tiny else smollm2(out)
    target = out / f"{'tiny' if tiny else base.name}-{preset}"
    recipe = api.upscale_recipe(str(base), preset=preset, insert=insert)
    plan = api.plan(recipe)
    if (target / "deus_merge.json").is_file():
        note(f"{target} exists already and is not computed again; remove it to start over")
    else:
        with block_progress(plan) as shown:
            api.merge(plan, target, api.RunOptions(resume=True), on_block=shown.on_block, on_fraction=shown.on_fraction)
    with check_progress() as progress:
        checked = api.verify(target, logits_text=argparse.__doc__, **progress)  # English prose that every Python has
    show_verification(checked)
    for name, folder in (("base", base), ("up-scaled", target)):
        click.echo(f"{name:>10}: {_continue(folder, *_PROMPTS[tiny])}")
    depth = plan.donor.view.num_layers
    click.echo(f"\n{depth} -> {plural(plan.num_layers, 'layer')}")
    click.echo(f"base model       {base}\nup-scaled model  {target}\nrecipe           {target / 'deus_merge.yml'}")
    click.echo(f"report           {api.report(target, verification=checked)}")
    new = plural(len(plan.new_parameters), "tensor")
    click.echo(f"to train: the {new} under new_parameters in {target / 'deus_merge.json'}")
    if not checked.passed:
        note("the result failed verification")
        raise click.exceptions.Exit(3)
    show_next(target, new_layers=bool(plan.new_layers))


def _continue(folder: Path, prompt: str, tokens: int) -> str:
    """The model's greedy continuation of the prompt, as one printable line."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0]
    return repr(tokenizer.decode(ids, skip_special_tokens=True))
