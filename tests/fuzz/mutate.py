"""Valid files, changed in a few places. Everything is drawn from a `random.Random`: seeded, hypothesis' or atheris'."""

from __future__ import annotations

import json
import re
from random import Random


class Raw(str):
    """Text that stands in JSON as it is, whatever JSON thinks of it."""


class Pairs(list):
    """An object as (key, value) pairs, so that a key can stand twice."""


NAMES = (
    "", "..", "../x", "a/../../b", "/etc/passwd", "a\0b", "a\nb", "\x1b]0;x\x07", "\x9b31m", "\u202eabc", "\u2028",
    "\u200b",
    "\ud800", "MODEL.safetensors", "model.SAFETENSORS", "C:\\x", "con", "~", "~root", "-", "--help", "*", "%s%n", "{0}",
    "{layer}", "a" * 300, "é" * 200, "💥", "`x`", "<script>", "---", "__metadata__", "null", "0x10", "١٢", "1_000",
    "model.layers.0.input_layernorm.weight", "model.layers.00.input_layernorm.weight", "model.layers.٣.mlp.x",
    "model.layers.-1.x", "model.layers.99999999999.x", "model.layers." + "9" * 5000 + ".x", "{x}.layers.0.w", "h.0.w",
    "lm_head.weight", "org/name", "base", "other", "base@main", "base+other",
)  # fmt: skip
NUMBERS = (
    "0", "-0", "1", "-1", "2", "3", "4", "7", "8", "16", "17", "64", "0.5", "-0.5", "0.0", "1.0", "1e400", "-1e400",
    "1e-400", "1e30",
    "255", "65536", "2147483648", "4294967296", "9007199254740993", "9223372036854775807", "9223372036854775808",
    "18446744073709551616", "100000000000", "9" * 30, "9" * 310, "9" * 4000, "1" + "0" * 5000, "NaN",
    "Infinity", "-Infinity",
)  # fmt: skip
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I8", "U8", "BOOL", "U16", "C64", "f32", "F4")
WORDS = (
    "llama", "mistral", "qwen2", "qwen3", "gpt2", "full_attention", "sliding_attention", "bfloat16", "float16",
    "float32",
    "opt_deus", "solar", "stack", "average", "llama_pro", "linear", "slerp", "ties", "ot_fuse", "passthrough",
    "top_half",
    "all", "auto", "union", "symmetry", "transport_flow", "sinkhorn", "true", "false", "yes", "mlp", "self_attn",
    "{{ x }}",
)  # fmt: skip
TOKENS = (
    "{", "}", "[", "]", ":", ",", '"', "\\", "\\u0000", "\\ud800", "\n", "\t", " ", "- ", "---", "...", "&a ", "*a",
    "!!python/name:os",
    "!!binary ", "!!set ", "!!timestamp ", "<<: ", "? ", "| ", "> ", "#", "%YAML 1.1\n", "'", "@", "`", "\0", "\x1b",
    "\ufeff", "\x85", "1:1:1",
    "0x" + "f" * 400, "0o7", "0b1", ".inf", ".nan", "1_0", "2001-01-01", "~", "null", "=", "\r",
)  # fmt: skip


def name(r: Random) -> str:
    return r.choice(NAMES)


def value(r: Random, depth: int = 0) -> object:
    """A value that nobody asked for."""
    kind = r.randrange(12)
    if kind < 4:
        return Raw(r.choice(NUMBERS))
    if kind < 6:
        return r.choice((None, True, False, "", Pairs(), []))
    if kind < 8:
        return r.choice(NAMES)
    if kind == 8:
        return r.choice(WORDS + DTYPES)
    if kind == 9:
        levels = r.choice((3, 40, 400, 20_000))
        opening, closing = r.choice((("[", "]"), ('{"a":', "}"))) if r.randrange(2) else ("[", "")
        return Raw(opening * levels + "1" + closing * levels)
    if kind == 10:
        return "x" * r.choice((100, 5000, 50_000))
    if depth > 2:
        return r.randrange(100)
    if r.randrange(2):
        return [value(r, depth + 1) for _ in range(r.randrange(4))]
    return Pairs((r.choice(WORDS + NAMES), value(r, depth + 1)) for _ in range(r.randrange(4)))


def pairs(data: object) -> object:
    """Plain JSON data with its objects as `Pairs`: a copy that may be changed in place."""
    if isinstance(data, dict):
        return Pairs((k, pairs(v)) for k, v in data.items())
    return [pairs(v) for v in data] if isinstance(data, list) else data


def _spots(data: object, found: list) -> list:
    """Every list or object, with the positions in it."""
    for at, item in enumerate(data):
        found.append((data, at))
        inner = item[1] if isinstance(data, Pairs) else item
        if isinstance(inner, list):
            _spots(inner, found)
    return found


def mutate_data(r: Random, data: object) -> object:
    """JSON data (as `pairs` gives it), changed in a few places, or more often in one."""
    for _ in range(r.choice((1, 1, 1, 2, 3, 4))):
        spots = _spots(data, []) if isinstance(data, list) else []
        if not spots:
            return value(r)
        holder, at = r.choice(spots)
        keyed = isinstance(holder, Pairs)
        kind = r.randrange(10)
        if kind == 0:
            del holder[at]
        elif kind == 1:
            holder.insert(r.randrange(len(holder) + 1), holder[at])  # for an object: the key stands twice
        elif kind == 2 and keyed:
            holder[at] = (r.choice(NAMES + WORDS), holder[at][1])
        elif kind == 3:
            other, place = r.choice(spots)  # may have been cut off: then this changes nothing
            if place < len(other):
                theirs = other[place][1] if isinstance(other, Pairs) else other[place]
                if not isinstance(theirs, list):
                    holder[at] = (holder[at][0], theirs) if keyed else theirs
        elif kind == 4:
            old = holder[at][1] if keyed else holder[at]
            if isinstance(old, int) and not isinstance(old, bool):
                new = old + r.choice((-1, 1, -old, 2**31, 2**63, -2 * old))
            elif isinstance(old, str):
                new = mutate_text(r, old)
            else:
                new = [old]
            holder[at] = (holder[at][0], new) if keyed else new
        elif kind == 5 and keyed:
            holder.append((r.choice(WORDS + NAMES), value(r)))
        else:
            holder[at] = (holder[at][0], value(r)) if keyed else value(r)
    return data


def dump(data: object) -> bytes:
    """Such data as JSON text, or what is close to it."""
    raw: list[str] = []
    text = json.dumps(_plain(data, raw))
    return _HOLE.sub(lambda m: raw[int(m[1])] if m[1] else "", text).encode("utf-8", "surrogatepass")


_HOLE = re.compile(r'"<raw (\d+)>"|<again \d+>')


def _plain(data: object, raw: list[str]) -> object:
    """Data that `json` writes, with marks where raw text goes and where a key stands again."""
    if isinstance(data, Pairs):
        plain: dict = {}
        for key, item in data:
            plain[key if key not in plain else f"{key}<again {len(plain)}>"] = _plain(item, raw)
        return plain
    if isinstance(data, list):
        return [_plain(item, raw) for item in data]
    if isinstance(data, Raw):
        raw.append(data)
        return f"<raw {len(raw) - 1}>"
    return data


def mutate_text(r: Random, text: str) -> str:
    """Text with a few characters gone, doubled or put in."""
    for _ in range(1 + r.randrange(3)):
        at, length = r.randrange(len(text) + 1), r.choice((0, 1, 1, 2, 8))
        kind = r.randrange(5)
        if kind == 0:
            text = text[:at] + text[at + length :]
        elif kind == 1:
            text = text[:at] + text[at : at + length] * 2 + text[at + length :]
        elif kind == 2:
            text = text[:at] + r.choice(TOKENS) + text[at:]
        elif kind == 3:
            text = text[:at] + r.choice(TOKENS + NUMBERS + WORDS) + text[at + length :]
        else:
            text = text[:at] + chr(r.choice((0, 9, 10, 27, 34, 92, 127, 155, 0x2028, 0xFEFF, 0x1F4A5))) + text[at + 1 :]
    return text


def mutate_bytes(r: Random, raw: bytes) -> bytes:
    """Bytes with a few flipped, cut, doubled or put in."""
    data = bytearray(raw)
    for _ in range(1 + r.randrange(4)):
        at = r.randrange(len(data) + 1)
        kind = r.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << r.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = r.choice((0, 1, 9, 10, 32, 34, 44, 58, 91, 93, 123, 125, 127, 128, 255))
        elif kind == 2:
            del data[at : at + r.choice((1, 1, 2, 8, 64))]
        elif kind == 3:
            data[at:at] = data[at : at + r.choice((1, 2, 8, 64))]
        elif kind == 4:
            data[at:at] = r.choice(TOKENS).encode()
        elif r.randrange(4) == 0:
            del data[at:]
        else:
            data[at:at] = r.getrandbits(8 * r.choice((1, 2, 8))).to_bytes(8, "little")
    return bytes(data)
