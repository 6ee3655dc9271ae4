"""How each case is made: files that take the place of valid ones, all drawn from one `Random`."""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Callable, Mapping
from random import Random

import yaml

from .mutate import DTYPES, NAMES, WORDS, Pairs, dump, mutate_bytes, mutate_data, mutate_text, pairs
from .workshop import (
    ADAPTER,
    CONFIG,
    GENERATION,
    ITEMSIZE,
    RECIPES,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Files,
    Special,
    Workshop,
    header_of,
    shapes,
    values,
    weights_file,
)

_FEW = dict(list(shapes().items())[7:12])
_FEW_BYTES = 4 * sum(math.prod(s) for s in _FEW.values())
SPECIALS = (
    Special("gone"), Special("folder"), Special("fifo"), Special("link", "nowhere"), Special("link", "/dev/zero"),
    Special("link", "/etc/passwd"), Special("link", "../base"), Special("link", "config.json"), Special("link", "."),
    Special("sparse", size=100_000_000_000, begin=b"{}"), Special("sparse", size=100_000_000_000),
    Special("sparse", size=100_000_000_000, begin=(50_000_000_000).to_bytes(8, "little") + b"{"),
    Special("sparse", size=1_000_000, begin=b'{"a": 1}'),
)  # fmt: skip


def _json_file(name: str, data: object) -> Callable[[Random, Workshop], Files]:
    raw = json.dumps(data).encode()

    def make(r: Random, workshop: Workshop) -> Files:
        return {name: mutate_bytes(r, raw) if r.randrange(4) == 0 else dump(mutate_data(r, pairs(data)))}

    return make


def header(r: Random, workshop: Workshop) -> Files:
    """Half of the headers lie; the others describe strange tensors truly."""
    kind = r.randrange(8)
    valid = workshop.valid["base/model.safetensors"]
    if kind == 0:
        return {"base/model.safetensors": mutate_bytes(r, valid)}
    if kind < 4:
        return {"base/model.safetensors": weights_file(dump(mutate_data(r, pairs(header_of(_FEW)))), bytes(_FEW_BYTES))}
    return {"base/model.safetensors": _strange_model(r, _FEW)}


def strange_weights(r: Random, workshop: Workshop) -> Files:
    return {"base/model.safetensors": _strange_model(r, shapes())}


def _strange_model(r: Random, sizes: Mapping[str, list[int]]) -> bytes:
    """A well-formed file whose tensors have other names, dtypes and shapes than a Llama's."""
    entries = [[n, "F32", list(s)] for n, s in sizes.items()]
    for _ in range(1 + r.randrange(3)):
        entry = r.choice(entries)
        kind = r.randrange(6)
        if kind == 0:
            entry[0] = r.choice(NAMES)
        elif kind == 1:
            entry[0] = mutate_text(r, entry[0])
        elif kind == 2:
            entry[1] = r.choice(DTYPES)
        elif kind == 3:
            entry[2] = [r.choice((0, 1, 2, 8, 9, 64)) for _ in range(r.randrange(5))]
        elif kind == 4:
            entries.append([r.choice(NAMES) + entry[0], entry[1], entry[2]])
        else:
            entries.remove(entry)
    table, at = Pairs(), 0
    if r.randrange(3):
        r.shuffle(entries)
    for name, dtype, shape in entries:
        nbytes = math.prod(shape) * ITEMSIZE.get(dtype, 1)
        table.append((name, Pairs((("dtype", dtype), ("shape", shape), ("data_offsets", [at, at + nbytes])))))
        at += nbytes
    at = min(at, 2_000_000)
    piece = bytes(64) if r.randrange(2) else r.getrandbits(512).to_bytes(64, "little")
    return weights_file(dump(table), (piece * (at // 64 + 1))[:at])


def family(r: Random, workshop: Workshop) -> Files:
    """A family known only by the names of its tensors, or by names that hardly are any."""
    prefix = r.choice(("transformer.h", "{x}.layers", "{layer}.h", "layers.layers", "h", "a.0.block", "\u0663.blocks"))
    key = r.choice(("n_layer", "n_layers", "num_layers", "num_hidden_layers"))
    names = {n.replace("model.layers", prefix): s for n, s in shapes().items()}
    data = {k: v for k, v in CONFIG.items() if k != "num_hidden_layers"} | {"model_type": r.choice(WORDS)}
    data |= {"text_config": {key: 3}} if r.randrange(2) else {key: 3}
    count = sum(math.prod(s) for s in names.values())
    text = dump(mutate_data(r, pairs(data))) if r.randrange(2) else json.dumps(data).encode()
    return {"base/config.json": text, "base/model.safetensors": weights_file(header_of(names), values(count, 0))}


def two_stacks(r: Random, workshop: Workshop) -> Files:
    """A model that also sees, and a recipe for one of its modules."""
    sizes = {f"language_model.{n}": s for n, s in shapes().items()} | {
        n.replace("model.layers", r.choice(("vision_tower.encoder.layers", "visual.blocks"))): s
        for n, s in shapes(2).items()
        if "layers" in n
    }
    data = {"model_type": "llava", "text_config": CONFIG, "vision_config": {"num_hidden_layers": 2, "hidden_size": 8}}
    source = {"sources": [{"model": "base", "layer_range": [0, 2]}]}
    names = r.sample(("vision_tower", "text_decoder", "multi_modal_projector", "default"), 1 + r.randrange(2))
    text = {
        "base_model": "base",
        "merge_method": "passthrough",
        "modules": {n: {"slices": [source] * 2} for n in names},
    }
    if r.randrange(2):
        data, text = mutate_data(r, pairs(data)), pairs(text)
    else:
        data, text = pairs(data), mutate_data(r, pairs(text))
    count = sum(math.prod(s) for s in sizes.values())
    return {
        "base/config.json": dump(data),
        "base/model.safetensors": weights_file(header_of(sizes), values(count, 0)),
        "recipe.yml": dump(text),
    }


def recipe(r: Random, workshop: Workshop) -> Files:
    """One document, or several of which the last takes the first's result for a model."""
    if r.randrange(6) == 5:
        first = pairs(r.choice(RECIPES) | {"name": "first"})
        last = pairs(
            {"merge_method": "slerp", "models": [{"model": "first"}, {"model": "other"}], "parameters": {"t": 1}}
        )
        documents = [last, mutate_data(r, first)] if r.randrange(2) else [mutate_data(r, last), first]
        return {"recipe.yml": b"\n---\n".join(map(dump, documents))}
    data = r.choice(RECIPES)
    kind = r.randrange(4)
    if kind == 0:
        return {"recipe.yml": mutate_text(r, yaml.safe_dump(data)).encode("utf-8", "surrogatepass")}
    text = dump(mutate_data(r, pairs(data)))
    return {"recipe.yml": text if kind < 3 else mutate_bytes(r, text)}


def valid_recipe(r: Random) -> bytes:
    return json.dumps(r.choice(RECIPES)).encode()


def config(r: Random, workshop: Workshop) -> Files:
    make = _json_file(r.choice(("base/config.json", "base/config.json", "other/config.json")), CONFIG)
    return {**make(r, workshop), "recipe.yml": valid_recipe(r)}


index = _json_file(
    "other/model.safetensors.index.json",
    {
        "metadata": {},
        "weight_map": {n: f"model-0000{1 + (i >= 14)}-of-00002.safetensors" for i, n in enumerate(shapes())},
    },
)


def side_files(r: Random, workshop: Workshop) -> Files:
    name, data = r.choice(
        (
            ("generation_config.json", GENERATION),
            ("tokenizer.json", TOKENIZER),
            ("tokenizer_config.json", TOKENIZER_CONFIG),
        )
    )
    return {**_json_file(f"{r.choice(('base', 'other'))}/{name}", data)(r, workshop), "recipe.yml": valid_recipe(r)}


def places(r: Random, workshop: Workshop) -> Files:
    """No file where one should be, or a strange one."""
    names = r.sample(sorted(workshop.valid), 1 + r.randrange(2))
    return {"recipe.yml": valid_recipe(r)} | {name: r.choice(SPECIALS) for name in names if name != "recipe.yml"}


def adapter(r: Random, workshop: Workshop) -> Files:
    """A model with a LoRA adapter whose config or weights are not what they should be."""
    recipe = {"merge_method": "passthrough", "models": [{"model": "base+adapter"}]}
    files: dict = {name: raw for name, raw in workshop.valid.items() if name.startswith("adapter/")}
    if r.randrange(2):
        data = json.loads(files["adapter/adapter_config.json"])
        files["adapter/adapter_config.json"] = dump(mutate_data(r, pairs(data)))
    else:
        files["adapter/adapter_model.safetensors"] = _strange_model(r, ADAPTER)
    return files | {"recipe.yml": json.dumps(recipe).encode()}


def pickled(r: Random, workshop: Workshop) -> Files:
    """The archive's bytes, or the program in it, changed; in the format of today or the older one."""
    new, old = workshop.pickles
    kind = r.randrange(4)
    if kind == 0:
        raw = mutate_bytes(r, old)
    elif kind == 1:
        raw = mutate_bytes(r, new)
    else:
        packed = io.BytesIO()
        method = zipfile.ZIP_DEFLATED if r.randrange(8) == 0 else zipfile.ZIP_STORED
        with zipfile.ZipFile(io.BytesIO(new)) as source, zipfile.ZipFile(packed, "w", method) as target:
            for entry in source.infolist():
                content = source.read(entry)
                if entry.filename.endswith("data.pkl"):
                    content = _mutate_pickle(r, content)
                if r.randrange(40):
                    target.writestr(entry.filename, content)
        raw = packed.getvalue()
    return {
        "base/model.safetensors": Special("gone"),
        "base/pytorch_model.bin": raw,
        "recipe.yml": valid_recipe(r),
    }


def _mutate_pickle(r: Random, raw: bytes) -> bytes:
    """A pickle in which words stand for others, or a few bytes are changed."""
    for _ in range(1 + r.randrange(2)):
        kind = r.randrange(3)
        if kind == 0:
            old = r.choice((b"torch._utils\n_rebuild_tensor_v2", b"torch\nFloatStorage", b"collections\nOrderedDict"))
            new = r.choice((
                b"os\nsystem", b"builtins\neval", b"builtins\nbytearray", b"builtins\ngetattr", b"torch\nHalfStorage",
                b"torch\nComplexFloatStorage", b"torch\nBoolStorage", b"torch.storage\nUntypedStorage", b"torch\nSize",
                b"torch._utils\n_rebuild_parameter", b"torch._utils\n_rebuild_sparse_tensor", b"torch.load\nx",
                b"torch._utils\n_rebuild_meta_tensor_no_storage", b"torch._utils\n_rebuild_qtensor",
                b"collections\nCounter", b"_codecs\nencode",
            ))  # fmt: skip
            raw = raw.replace(old, new)
        elif kind == 1:  # sizes, strides and offsets
            at = r.randrange(len(raw))
            old = r.choice((b"K\x08", b"K\x04", b"K\x01", b"K\x0c", b"K\x00", b"M\x80\x00"))
            new = r.choice((b"K\x00", b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff"))
            raw = raw[:at] + raw[at:].replace(old, new, 1)
        else:
            raw = mutate_bytes(r, raw)
    return raw


def manifest(r: Random, workshop: Workshop) -> Files:
    """A finished output that somebody has worked on."""
    if r.randrange(8) == 0:
        names = sorted(n for n in workshop.finished if n != "done/README.md")
        return {r.choice(names): r.choice(SPECIALS)}
    record = json.loads(workshop.finished["done/deus_merge.json"])
    text = mutate_text(r, json.dumps(record)).encode("utf-8", "replace") if r.randrange(8) == 0 else None
    text = text or dump(mutate_data(r, pairs({k: v for k, v in record.items() if k != "sha256"})))
    if r.randrange(20):  # sealed anew: a seal is against accidents, not against somebody who can write
        body = text.removesuffix(b"}") + b",\n"
        text = body + b' "sha256": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode()
    place = r.choice(("done/deus_merge.json", "done/deus_merge.json", "base/deus_merge.json"))
    return {place: text, "recipe.yml": valid_recipe(r)}


def everything(r: Random, workshop: Workshop) -> Files:
    makers = r.sample((strange_weights, family, config, index, side_files, recipe, places), 1 + r.randrange(3))
    files: dict = {"recipe.yml": valid_recipe(r)}
    for make in makers:
        files |= {k: v for k, v in make(r, workshop).items() if k != "recipe.yml" or make is recipe}
    return files
