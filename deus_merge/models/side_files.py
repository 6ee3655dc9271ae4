"""The other files of a checkpoint: generation config, tokenizer, chat template, licence."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from ..checkpoint.reader import TensorSource
from ..core.errors import CheckpointError
from ..core.located import Located
from ..core.text import some_of
from .tokenizer.build import Vocabulary
from .tokenizer.chat_template import find_template, set_template
from .tokenizer.files import TOKENIZER_FILES, content, is_tokenizer_file, present
from .tokenizer.special import set_generation

_SHOWN = 10  # names in a warning
#: files that may say that the model needs code of its own
_NAMING_CODE = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "modules.json")
_OWN_MODULE = re.compile(r'"type"\s*:\s*"(?!sentence_transformers\.)')
#: files of the donor that are copied by their names; those in folders that are part of a model are copied, too
_COPIED = re.compile(
    r"""
    generation_config\.json | (pre|video_pre|audio_pre)?processor_config\.json | normalizer\.json | modules\.json
    | sentence_[a-z_]+_config\.json | config_sentence_transformers\.json | (quantize|quant)_config\.json
    | (\w+_)?licen[cs]e([._-].*)? | notice([._-].*)? | copying | use_policy\.md
    """,
    re.VERBOSE | re.IGNORECASE,
)
#: files that are no part of a model for transformers: weights in other formats, documentation, remains of training
_NO_PART = re.compile(
    r"""
    \..* | config\.json | params\.json | deus_merge(\.original)?\.(json|yml) | mergekit_config\.ya?ml | adapter_.*
    | readme.*
    | .*\.(safetensors|index\.json|bin|pt|pth|gguf|ggml|ckpt|h5|msgpack|onnx.*|ot|np[yz]|nemo|mlmodel|tflite|pkl)
    | .*\.(md|rst|pdf|png|jpe?g|gif|svg|webp|bmp|ico|mp4|webm|wav|mp3|html|css|ipynb|csv|parquet|log|lock|sh|dat)
    | trainer_state\.json | training_args\..* | optimizer.* | scheduler.* | rng_state.* | events\..* | zero_to_fp32\.py
    | (all|train|eval|test|predict)_results\.json | .*requirements.*\.txt | latest | dockerfile
    """,
    re.VERBOSE | re.IGNORECASE,
)


def output_side_files(
    models: Mapping[str, TensorSource],
    donor: TensorSource,
    vocabulary: Vocabulary | None = None,
    chat_template: Located | None = None,
) -> tuple[dict[str, bytes | Path], list[str]]:
    """The files of an output other than weights and config.json.

    Args:
        models: Every model of the recipe, by name.
        donor: The model whose files the output takes.
        vocabulary: The output's tokens, where the recipe configures them.
        chat_template: The recipe's ``chat_template``, text.

    Returns:
        Every file's name with its bytes or the file to copy, and warnings.

    Raises:
        RecipeError: the chat template is neither a known name nor a template.
        CheckpointError: a link that leads out of a model's folder.
    """
    files: dict[str, bytes | Path] = _own_files(donor)
    files |= vocabulary.files if vocabulary else _tokenizer_of(donor)
    warnings: list[str] = []
    if vocabulary:
        files, warnings = set_generation(files, vocabulary)
    if left := [
        n for n in donor.side_files if n not in files and n not in TOKENIZER_FILES and not _NO_PART.fullmatch(n)
    ]:
        warnings.append(f"not copied from {donor.where}: {some_of(left, _SHOWN)}")
    if chat_template is not None:
        known = [present(m.side_files, TOKENIZER_FILES) for m in models.values()]
        template = find_template(str(chat_template.value), chat_template, known)
        if template is None:
            warnings.append(f"{chat_template.where}: no model has a chat template")
        else:
            files = set_template(files, template)
    return dict(sorted(files.items())), warnings


def copied_files(source: TensorSource) -> dict[str, bytes | Path]:
    """All files of a model other than weights and config.json: name -> bytes, or a file to copy."""
    return dict(sorted((_own_files(source) | _tokenizer_of(source)).items()))


def _own_files(source: TensorSource) -> dict[str, bytes | Path]:
    """The files that never come from another model: its code (copied, not run), generation config, licence, and the
    modules that are put behind it."""
    names = source.side_files
    named = {"config.json": json.dumps(source.config), **{n: _text(names[n]) for n in _NAMING_CODE if n in names}}
    code = any('"auto_map"' in t for t in named.values()) or _OWN_MODULE.search(named.get("modules.json", ""))
    taken = [n for n in names if _COPIED.fullmatch(n) or ("/" in n and not is_tokenizer_file(n))]
    return present(names, (*taken, *(n for n in names if code and "/" not in n and n.endswith(".py"))))


def _tokenizer_of(source: TensorSource) -> dict[str, bytes | Path]:
    return present(source.side_files, [name for name in source.side_files if is_tokenizer_file(name)])


def _text(file: bytes | Path) -> str:
    """A file's text; nothing of a file that cannot be read, which is reported where it is used."""
    try:
        return content(file).decode("utf-8", "replace")
    except CheckpointError:
        return ""
