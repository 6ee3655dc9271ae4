"""The settings of other trainers, so that they train the new layers and nothing else; refused where they cannot.

What a trainer makes of its settings is worked out here on the model's tensor names, by that trainer's own rule, and
compared with the manifest before anything is printed. Rules as read in:

- axolotl 0.18.0 (``utils/freeze.py``, ``train.py``): a parameter trains when a pattern of ``unfrozen_parameters``
  matches the beginning of its name; dots in patterns are literal.
- LLaMA-Factory 0.9.6.dev0 (``model/adapter.py``): ``use_llama_pro`` trains the last of every ``layers / trainable``
  layers; without it the last n layers train, for negative n the first.
- torchtune 0.7.0: full fine-tuning trains every parameter, LoRA adapters stand in every layer: nothing chooses layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import yaml

from ..checkpoint.header import parse_json, read_small
from ..core.errors import TrainingError, nearest
from ..models.family import families
from ..models.tokenizer.files import TOKENIZER_FILES
from ..models.view import prefix_of
from .freeze import new_layers, new_names, read_training


def export(out: Path | str, trainer: str) -> str:
    """Settings that train the new layers of an output and nothing else.

    Args:
        out: An output folder, or a trained one that its manifest was carried to.
        trainer: A name in `TRAINERS`.

    Returns:
        Text: a piece of YAML, or of Python for ``trainer``.

    Raises:
        CheckpointError: there is no manifest.
        TrainingError: an unknown trainer, no new layer, or nothing that this trainer can be told trains just these.
    """
    if trainer not in TRAINERS:
        raise TrainingError(
            "unknown trainer", expected=" | ".join(TRAINERS), got=trainer, hint=nearest(trainer, TRAINERS)
        )
    out = Path(out)
    record = read_training(out)
    return TRAINERS[trainer](out, record, new_layers(record))


def _trainer(out: Path, record: Mapping, new: tuple[int, ...]) -> str:
    given = load = save = ""
    if any(name in TOKENIZER_FILES for name in record.get("files", ())):
        load = "tokenizer = transformers.AutoTokenizer.from_pretrained(path)\n"
        given, save = ", processing_class=tokenizer", "# tokenizer.save_pretrained(folder)\n"
    return f"""\
# transformers' Trainer, and trl's, which are made of it: {_told(new)}
import torch
import transformers
from deus_merge import training

path = {_absolute(out)!r}
model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)  # bfloat16 loses small steps
{load}print(training.freeze_base(model, path))
trainer = transformers.Trainer(model=model{given})  # and your arguments and data
training.watch(trainer, path)  # checks that the base stays as it is; logs the new layers
# after trainer.train(), in the dtype that it had, so that the base keeps its bytes:
# model.to(torch.{record.get("dtype") or "float32"}).save_pretrained(folder)
{save}# training.carry_manifest(path, folder)
"""


def _axolotl(out: Path, record: Mapping, new: tuple[int, ...]) -> str:
    _check_described(out)
    patterns = ["^" + prefix_of(layer, record["layer_prefix"]) for layer in new]
    regexes = [re.compile(pattern.replace(".", r"\.")) for pattern in patterns]
    _check_choice("axolotl", record, lambda name: any(regex.match(name) for regex in regexes))
    settings = {"base_model": _absolute(out), "unfrozen_parameters": patterns}
    return (
        f"# axolotl (checked against 0.18.0): {_told(new)}\n"
        + yaml.safe_dump(settings, sort_keys=False)
        + "# no adapter: peft puts base_model.model. before every name, and the patterns match nothing\n"
        + "# with gradient_checkpointing: true also\n"
        + yaml.safe_dump({"gradient_checkpointing_kwargs": {"use_reentrant": False}})
        + _after(out)
    )


def _llama_factory(out: Path, record: Mapping, new: tuple[int, ...]) -> str:
    _check_described(out)
    depth, count = record["num_layers"], len(new)
    settings: dict[str, object] = {"model_name_or_path": _absolute(out), "finetuning_type": "freeze"}
    settings |= {"freeze_trainable_layers": count, "freeze_trainable_modules": "all"}
    stride = depth // count
    if new == tuple(range(depth - count, depth)):
        chosen: Iterable[int] = new
    elif new == tuple(range(count)):
        chosen, settings["freeze_trainable_layers"] = new, -count
    elif depth % count == 0 and new == tuple(range(stride - 1, depth, stride)):
        chosen, settings["use_llama_pro"] = new, True
    else:
        base = depth - count
        fitting = [n for n in range(2, base + 1) if base % n == 0]
        every = min(fitting, key=lambda n: abs(base / n - count)) if fitting else 1
        raise TrainingError(
            "LLaMA-Factory cannot be told to train just the new layers",
            expected="the last of every k layers (use_llama_pro), the last layers, or the first",
            got=f"new layers {', '.join(map(str, new))} of {depth}",
            hint=f"--preset llama_pro --insert '{{every: {every}}}' makes layers it can train; --for trainer or axolotl"
            " trains these",
        )
    parts = [f".{layer}." for layer in chosen]
    _check_choice("LLaMA-Factory", record, lambda name: any(part in name for part in parts))
    head = f"# LLaMA-Factory (checked against 0.9.6.dev0, without USE_V1): {_told(new)}\n"
    return head + yaml.safe_dump(settings, sort_keys=False) + _after(out)


def _torchtune(out: Path, record: Mapping, new: tuple[int, ...]) -> str:
    raise TrainingError(
        "torchtune cannot be told to train just the new layers",
        expected="a setting that chooses layers; torchtune 0.7.0, its last state, has none",
        got=_told(new),
        hint="--for trainer or axolotl",
    )


TRAINERS: Mapping[str, Callable[[Path, Mapping, tuple[int, ...]], str]] = {
    "trainer": _trainer,
    "axolotl": _axolotl,
    "llama-factory": _llama_factory,
    "torchtune": _torchtune,
}


def _absolute(out: Path) -> str:
    return str(out.absolute())


def _after(out: Path) -> str:
    """A comment: what verify, strip and the next growth need."""
    return f"# then, in Python: deus_merge.training.carry_manifest({_absolute(out)!r}, FOLDER_OF_THE_TRAINED_MODEL)\n"


def _told(new: tuple[int, ...]) -> str:
    return f"new layers {', '.join(map(str, new))}"


def _check_described(out: Path) -> None:
    """Only of families described here do we know that a loaded model's names are those of its files."""
    place = out / "config.json"
    model_type = parse_json(read_small(place), place, "config").get("model_type")
    if not any(model_type in family.model_types for family in families().values()):
        raise TrainingError(
            "it is not known how this family's parameters are called once it is loaded",
            where=place,
            expected=f"a described family: {', '.join(families())}",
            got=f"model_type {model_type!r}",
            hint="--for trainer compares the names when it is run",
        )


def _check_choice(trainer: str, record: Mapping, trains: Callable[[str], bool]) -> None:
    """What the trainer would train against what it should."""
    new = set(new_names(record))
    wrong = [name for name in record["tensors"] if trains(name) != (name in new)]
    if wrong:
        how = "leave out" if wrong[0] in new else "also train"
        raise TrainingError(f"{trainer} would {how} {wrong[0]}", where=wrong[0], hint="--for trainer")
