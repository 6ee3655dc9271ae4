"""A folder of small valid models and recipes whose files a case replaces, on a RAM disk where the machine has one."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file

from deus_merge import api

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 16,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "layer_types": ["full_attention"] * 3,
    "use_sliding_window": False,
    "max_window_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
VOCABULARY = ["<unk>", "<s>", "</s>", *"abcdefghijklm"]
GENERATION = {"bos_token_id": 1, "eos_token_id": [2], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {
            "id": i,
            "content": t,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, t in enumerate(VOCABULARY[:3])
    ],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(VOCABULARY)}, "unk_token": "<unk>"},
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "model_max_length": 1000000000000000019884624838656,
    "added_tokens_decoder": {str(i): {"content": t, "special": True} for i, t in enumerate(VOCABULARY[:3])},
    "chat_template": "{{ messages[0]['content'] }}",
}
ADAPTER_CONFIG = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "bias": "none",
    "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "init_lora_weights": True, "alpha_pattern": {},
    "rank_pattern": {}, "modules_to_save": None, "base_model_name_or_path": "base",
}  # fmt: skip
ADAPTER = {
    f"base_model.model.model.layers.{i}.{module}.lora_{half}.weight": shape
    for i in range(3)
    for module, rows, columns in (("self_attn.q_proj", 8, 8), ("mlp.down_proj", 8, 12))
    for half, shape in (("A", [2, columns]), ("B", [rows, 2]))
}
_BASE = {"model": "base", "layer_range": [0, 2]}
_OTHER = {"model": "other", "layer_range": [1, 3]}
RECIPES = (
    {"base_model": "base", "upscale": {"insert": "all", "parameters": {"reg": 0.1, "t": [0, 0.5]}}},
    {"base_model": "base", "dtype": "bfloat16", "upscale": {"preset": "stack", "insert": {"count": 2, "where": "top"}}},
    {"base_model": "base", "upscale": {"preset": "llama_pro", "insert": {"after": [0, 2]}}},
    {"base_model": "base", "upscale": {"preset": "average", "insert": {"count": 1, "where": "even"}}},
    {
        "merge_method": "passthrough",
        "slices": [{"sources": [_BASE]}, {"sources": [_OTHER]}],
        "tokenizer_source": "base",
        "out_dtype": "float16",
    },
    {
        "base_model": "base",
        "slices": [
            {
                "merge_method": "slerp",
                "sources": [_BASE, _OTHER],
                "parameters": {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]},
            },
            {"merge_method": "ot_fuse", "sources": [_BASE], "parameters": {"zero_init": ["o"], "layers_per_gap": 2}},
            {"merge_method": "linear", "align": "symmetry", "sources": [_BASE, _OTHER], "parameters": {"weight": 0.5}},
        ],
    },
    {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "base"}, {"model": "other", "parameters": {"weight": 0.5, "density": [0.2, 0.8]}}],
        "parameters": {"normalize": True},
        "dtype": "float32",
        "out_dtype": "bfloat16",
        "chat_template": "{{ messages }}",
        "tokenizer_source": "other",
    },
    {
        "merge_method": "passthrough",
        "base_model": "base",
        "modules": {"default": {"slices": [{"sources": [_BASE]}, {"sources": [_BASE]}]}},
    },
    {"merge_method": "karcher", "models": [{"model": {"path": "base"}}, {"model": {"model": {"path": "other"}}}]},
)  # fmt: skip
ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U16": 2}  # others: one byte


@dataclass(frozen=True)
class Special:
    """What stands in a file's place: a ``link`` (to a target), ``fifo``, ``folder``, ``sparse`` file, or ``gone``."""

    kind: str
    target: str = ""
    size: int = 0
    begin: bytes = b""


Content = bytes | Special
Files = Mapping[str, Content]


def shapes(layers: int = 3) -> dict[str, list[int]]:
    """The tensors of such a model."""
    layer = {
        "self_attn.q_proj": [8, 8], "self_attn.k_proj": [4, 8], "self_attn.v_proj": [4, 8], "self_attn.o_proj": [8, 8],
        "mlp.gate_proj": [12, 8], "mlp.up_proj": [12, 8], "mlp.down_proj": [8, 12],
        "input_layernorm": [8], "post_attention_layernorm": [8],
    }  # fmt: skip
    names = {f"model.layers.{i}.{n}.weight": s for i in range(layers) for n, s in layer.items()}
    return {"model.embed_tokens.weight": [16, 8], **names, "model.norm.weight": [8], "lm_head.weight": [16, 8]}


def header_of(sizes: Mapping[str, list[int]], dtype: str = "F32") -> dict:
    """A safetensors header for tensors one behind the other."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in sizes.items():
        nbytes = math.prod(shape) * ITEMSIZE[dtype]
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    return table


def weights_file(header: object, data: bytes) -> bytes:
    """A safetensors file; a header that is text stays as it is."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def values(count: int, seed: int) -> bytes:
    """Float32 numbers as weights have them."""
    r = Random(seed)
    return struct.pack(f"<{count}f", *(r.gauss(0, 0.3) for _ in range(count)))


def valid_files() -> dict[str, bytes]:
    """Two models, one of them in two files with an index, and a recipe."""
    files: dict[str, bytes] = {}
    sizes = shapes()
    count = sum(math.prod(s) for s in sizes.values())
    files["base/model.safetensors"] = weights_file(header_of(sizes), values(count, 0))
    weight_map = {}
    for i, names in enumerate((list(sizes)[:14], list(sizes)[14:])):
        part = {n: sizes[n] for n in names}
        name = f"model-0000{i + 1}-of-00002.safetensors"
        weight_map |= dict.fromkeys(names, name)
        files[f"other/{name}"] = weights_file(header_of(part), values(sum(math.prod(s) for s in part.values()), 1 + i))
    index = {"metadata": {"total_size": 4 * count}, "weight_map": weight_map}
    files["other/model.safetensors.index.json"] = json.dumps(index).encode()
    for model in ("base", "other"):
        for file, data in (
            ("config.json", CONFIG),
            ("generation_config.json", GENERATION),
            ("tokenizer.json", TOKENIZER),
            ("tokenizer_config.json", TOKENIZER_CONFIG),
        ):
            files[f"{model}/{file}"] = json.dumps(data).encode()
        files[f"{model}/LICENSE"] = b"As you like.\n"
    count = sum(math.prod(s) for s in ADAPTER.values())
    files["adapter/adapter_model.safetensors"] = weights_file(header_of(ADAPTER), values(count, 3))
    files["adapter/adapter_config.json"] = json.dumps(ADAPTER_CONFIG).encode()
    files["recipe.yml"] = json.dumps(RECIPES[0]).encode()
    return files


class Workshop:
    """The folder.

    Attributes:
        root: Where relative paths of recipes begin.
        valid: What stands there between cases.
    """

    def __init__(self):
        memory = Path("/dev/shm")
        place = memory if os.access(memory, os.W_OK) else None
        self.root = Path(tempfile.mkdtemp(prefix="deus-merge-fuzz-", dir=place))
        self.valid = valid_files()
        for name, raw in self.valid.items():
            (self.root / name).parent.mkdir(exist_ok=True)
            (self.root / name).write_bytes(raw)

    @cached_property
    def finished(self) -> dict[str, bytes]:
        """An output, ``done``."""
        recipe, out = self.root / "recipe.yml", self.root / "done"
        here = os.getcwd()
        os.chdir(self.root)
        try:
            api.merge(recipe, out)
        finally:
            os.chdir(here)
        files = {f"done/{path.name}": path.read_bytes() for path in out.iterdir()}
        self.valid |= files
        return files

    @cached_property
    def pickles(self) -> tuple[bytes, bytes]:
        """The weights of ``base`` as torch pickles them: as it does today, and as it did before."""
        tensors = load_file(self.root / "base/model.safetensors")
        made = []
        for new in (True, False):
            file = io.BytesIO()
            torch.save(tensors, file, _use_new_zipfile_serialization=new)
            made.append(file.getvalue())
        return made[0], made[1]

    def copy(self, model: str, folder: Path) -> Path:
        """One of the models, somewhere else."""
        folder.mkdir()
        for name, raw in self.valid.items():
            if name.startswith(f"{model}/"):
                (folder / Path(name).name).write_bytes(raw)
        return folder

    @contextmanager
    def changed(self, files: Files) -> Iterator[None]:
        """These files in place of the valid ones."""
        try:
            for name, content in files.items():
                self._put(self.root / name, content)
            yield
        finally:
            for name in files:
                _remove(self.root / name)
                if name in self.valid:
                    (self.root / name).write_bytes(self.valid[name])
            _remove(self.root / "out")

    def _put(self, path: Path, content: Content) -> None:
        if isinstance(content, bytes):
            path.write_bytes(content)
            return
        _remove(path)
        if content.kind == "link":
            path.symlink_to(content.target)
        elif content.kind == "fifo":
            os.mkfifo(path)
        elif content.kind == "folder":
            path.mkdir()
        elif content.kind == "sparse":
            path.write_bytes(content.begin)
            os.truncate(path, content.size)

    def close(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
