"""The commands and the snippet of docs/quantised.md, in their order."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

from quantized_checkpoints import VARIANTS
from support import make_model, save_tokenizer, train_tokenizer

PAGE = (Path(__file__).parents[2] / "docs/quantised.md").read_text(encoding="utf-8")


def test_commands_and_training(quantized, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(quantized("fp8_block"), "Qwen3-8B-FP8")
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("deus-merge")]
    assert commands
    for command in commands:
        run(*shlex.split(command, comments=True)[1:])
    shutil.rmtree("deeper")
    tokenizer = train_tokenizer()
    base = make_model(tmp_path / "base", vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=96)
    VARIANTS["bnb_nf4"].make(base, tmp_path / "base-nf4")
    save_tokenizer(tmp_path / "base-nf4", tokenizer, bos_token="<s>", eos_token="</s>")
    run("upscale", "base-nf4", "deeper", "--insert", "top_half")
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(snippets) == 1
    scope: dict = {}
    exec(snippets[0], scope)
    run("verify", "trained")
    run("strip", "trained", "stripped")
