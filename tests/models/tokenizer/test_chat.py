"""Chat templates: published prompt formats by name, the most common one, and no other next to the chosen one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers
from support import write_recipe

from deus_merge.models.tokenizer.chat_template import template_names

SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure?"},
]  # fmt: skip

#: What a chat with a system message looks like, and one without, as the models' makers describe it.
PUBLISHED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4"
        "<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\n2 + 2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\n4<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\n",
    ),
    "mistral": (
        "<s>[INST] Be brief.\n\n2 + 2? [/INST] 4</s>[INST] Sure? [/INST]",
        "<s>[INST] 2 + 2? [/INST] 4</s>[INST] Sure? [/INST]",
    ),
    "alpaca": (
        "Be brief.\n\n### Instruction:\n2 + 2?\n\n### Response:\n4</s>\n\n### Instruction:\nSure?\n\n### Response:\n",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n2 + 2?\n\n### Response:\n4</s>\n\n### Instruction:\nSure?\n\n### Response:\n",
    ),
    "exaone": (
        "[|system|]Be brief.[|endofturn|]\n[|user|]2 + 2?\n[|assistant|]4[|endofturn|]\n[|user|]Sure?\n[|assistant|]",
        "[|system|][|endofturn|]\n[|user|]2 + 2?\n[|assistant|]4[|endofturn|]\n[|user|]Sure?\n[|assistant|]",
    ),
}


def chat(folder: Path, messages: list[dict]) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.fixture
def planned(run, speakers, tmp_path):
    """The output of a recipe with this ``chat_template``, of models with these templates."""

    def call(template: str, *found: str | list | None, more: str = "") -> tuple[Path, str]:
        folders = []
        for i, own in enumerate(found or (None,)):
            folders.append(tmp_path / str(i))
            shutil.copytree(speakers["base"], folders[-1])
            if isinstance(own, list) or (own and i % 2):  # both places of templates
                config = json.loads((folders[-1] / "tokenizer_config.json").read_text())
                (folders[-1] / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": own}))
            elif own:
                (folders[-1] / "chat_template.jinja").write_text(own)
        models = "".join(f"  - model: {f}\n" for f in folders)
        text = f"merge_method: {'linear' if len(folders) > 1 else 'passthrough'}\nmodels:\n{models}"
        text += "parameters: {weight: 1}\n" * (len(folders) > 1) + f"chat_template: {json.dumps(template)}\n{more}"
        done = run("merge", write_recipe(tmp_path / "r.yml", text), tmp_path / "out", "--quiet")
        return tmp_path / "out", done.err

    return call


def test_every_name_has_a_published_format():
    assert template_names() == tuple(sorted(PUBLISHED))


@pytest.mark.parametrize("name", PUBLISHED)
def test_templates_by_name(planned, name):
    """Also where the tokenizer is another one than the base's files."""
    out, _ = planned(name, "old", more="tokenizer: {tokens: {<|new|>: {source: {kind: zero}}}}\n")
    assert chat(out, [SYSTEM, *CHAT]) == PUBLISHED[name][0]
    assert chat(out, CHAT) == PUBLISHED[name][1]


def test_mistral_refuses_what_it_was_not_trained_on(planned):
    out, _ = planned("mistral")
    with pytest.raises(Exception, match="take turns"):
        chat(out, [CHAT[0], CHAT[0]])


def test_the_most_common_one(planned):
    """Space around a template does not count; of several templates the default does."""
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": " {{ 'two' }}"}]
    out, _ = planned("auto", "{{ 'one' }}", "{{ 'two' }}\n", None, several)
    assert chat(out, CHAT) == "two" and (out / "chat_template.jinja").read_text() == "{{ 'two' }}"


def test_the_first_of_equally_common_ones(planned):
    out, _ = planned("auto", None, "{{ 'one' }}", "{{ 'two' }}")
    assert chat(out, CHAT) == "one"


def test_no_template_anywhere(planned):
    out, stderr = planned("auto")
    assert "chat_template (line 4): no model has a chat template" in stderr and not list(out.glob("chat*"))


def test_a_template_of_ones_own(planned):
    """It replaces the others; loops with break and marks of what an assistant says are part of the language."""
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    out, _ = planned(template, ["x", {"name": "default", "template": "{{ 'old' }}"}])
    assert chat(out, CHAT) == "2 + 2?"
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
