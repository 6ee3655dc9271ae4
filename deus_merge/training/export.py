"""Settings of other trainers that train the new layers and nothing else; an error where a trainer has none.

Which tensors a trainer would train is computed here from the model's tensor names, by that trainer's own rule, and
compared with the manifest before anything is printed. The rules are those of:

- axolotl 0.18.0 (``utils/freeze.py``, ``train.py``): a parameter trains when a pattern of ``unfrozen_parameters``
  matches the beginning of its name; dots in patterns are literal.
- LLaMA-Factory 0.9.5 (``model/adapter.py``): ``use_llama_pro`` trains the last of every ``layers / trainable`` layers;
  without it the last n layers train, for negative n the first.

`VERSIONS` has the versions that the settings were written for; in ``tests/training/test_other_trainers.py`` these
trainers read them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint.header import parse_json, read_small
from ..checkpoint.hub import PRIVATE
from ..checkpoint.quantized import quantization
from ..core.errors import TrainingError, nearest
from ..models.family import families
from ..report.manifest import Manifest
from ..report.shareable import shared_path
from .export_optimizers import Exported, OptimizerSettings, for_axolotl, for_llama_factory
from .freeze import new_layers, new_names, read_training


def export(
    out: Path | str, trainer: str, optimizer: OptimizerSettings | None = None, *, private_paths: bool = False
) -> str:
    """Settings that train the new layers of an output and nothing else.

    Args:
        out: An output folder, or a trained one that its manifest was copied to.
        trainer: A name in `TRAINERS`.
        optimizer: The optimizer; None for the trainer's own.
        private_paths: Whether the folder's path is written as a whole; else as it is seen from the working directory.

    Returns:
        Lines of YAML, or of Python for ``trainer``.

    Raises:
        CheckpointError: there is no manifest.
        TrainingError: an unknown trainer, no new layer, or no settings of this trainer train only these,
            or none express the optimizer.
    """
    if trainer not in TRAINERS:
        raise TrainingError(
            "unknown trainer", expected=" | ".join(TRAINERS), got=trainer, hint=nearest(trainer, TRAINERS)
        )
    out = Path(out)
    manifest = read_training(out)
    path = os.path.abspath(out) if private_paths else _seen_from_here(out)
    return TRAINERS[trainer](_Output(out, path, manifest, new_layers(manifest)), optimizer)


#: Trainer -> what its settings were written for, and what that needs
VERSIONS = {
    "trainer": "the Trainer of transformers 5.0 or newer, and trl's from 1.0",
    "axolotl": "axolotl 0.18.0, which needs transformers 5.14.1",
    "llama-factory": "LLaMA-Factory 0.9.5, which needs transformers 4.55.0 to 5.6.0; without USE_V1",
}


@dataclass(frozen=True)
class _Output:
    """An output that is trained.

    Attributes:
        folder: Its folder.
        path: The folder's path in the settings.
        manifest: Its manifest.
        new: Its new layers.
    """

    folder: Path
    path: str
    manifest: Manifest
    new: tuple[int, ...]

    @property
    def carried(self) -> str:
        """A comment: the call that verify, strip and the next growth need."""
        return f"# then, in Python: deus_merge.training.carry_manifest({self.path!r}, FOLDER_OF_THE_TRAINED_MODEL)\n"

    def head(self, trainer: str) -> str:
        """The first comments."""
        here = "# the path is seen from the folder where this was printed; --private-paths writes it as a whole\n"
        layers = f"new layers {', '.join(map(str, self.new))}"
        return f"# {VERSIONS[trainer]}: {layers}\n{'' if os.path.isabs(self.path) else here}"


def _seen_from_here(out: Path) -> str:
    """A folder's path from the working directory; as a whole where both have nothing in common that may be shown."""
    path = shared_path(out, Path.cwd())
    return os.path.abspath(out) if path.startswith(PRIVATE) or not os.path.exists(path) else path


def _trainer(out: _Output, wanted: OptimizerSettings | None) -> str:
    given = made = note = ""
    if wanted is not None:
        made = f"optimizer = training.optimizer(model, path, {wanted.arguments})\n"
        given = ", optimizers=(optimizer, None)"
        note = "; learning_rate and weight_decay in its arguments have no effect"
    return f"""\
{out.head("trainer")}import transformers
from deus_merge import training

path = {out.path!r}
model, tokenizer = prepared = training.prepare(path)  # frozen base in bfloat16 (or as stored), new layers in float32
print(prepared)
# give it your arguments and data, too{note}
{made}trainer = transformers.Trainer(model=model, processing_class=tokenizer{given})
training.watch(trainer, path)  # checks that the base stays as it is; logs the new layers
# after trainer.train(): new weights in the dtype that they had; all else, and the manifest, from file to file
# training.save_trained(model, path, folder)
"""


def _axolotl(out: _Output, wanted: OptimizerSettings | None) -> str:
    manifest = out.manifest
    _check_described(out.folder)
    _check_plain("axolotl", out.folder)
    patterns = ["^" + manifest.prefix_of(layer) for layer in out.new]
    regexes = [re.compile(pattern.replace(".", r"\.")) for pattern in patterns]
    _check_choice("axolotl", manifest, lambda name: any(regex.match(name) for regex in regexes))
    settings: dict[str, object] = {"base_model": out.path, "unfrozen_parameters": patterns}
    optimizer = for_axolotl(wanted, out.folder, manifest) if wanted else Exported({})
    return (
        out.head("axolotl")
        + _yaml(settings, optimizer)
        + "# no adapter: peft puts base_model.model. before every name, and the patterns match nothing\n"
        + "# with gradient_checkpointing: true also\n"
        + yaml.safe_dump({"gradient_checkpointing_kwargs": {"use_reentrant": False}})
        + out.carried
    )


def _llama_factory(out: _Output, wanted: OptimizerSettings | None) -> str:
    manifest, new = out.manifest, out.new
    _check_described(out.folder)
    _check_plain("LLaMA-Factory", out.folder)
    depth, count = manifest.num_layers, len(new)
    settings: dict[str, object] = {"model_name_or_path": out.path, "finetuning_type": "freeze"}
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
            "LLaMA-Factory cannot train only the new layers",
            expected="the last of every k layers (use_llama_pro), the last layers, or the first",
            got=f"new layers {', '.join(map(str, new))} of {depth}",
            hint=f"grow the base anew, so that it can: deus-merge upscale BASE OUT --preset llama_pro --insert"
            f" '{{every: {every}}}'; or train this output with --for axolotl or --for trainer",
        )
    parts = [f".{layer}." for layer in chosen]
    _check_choice("LLaMA-Factory", manifest, lambda name: any(part in name for part in parts))
    optimizer = for_llama_factory(wanted, out.folder, manifest) if wanted else Exported({})
    return out.head("llama-factory") + _yaml(settings, optimizer) + out.carried


TRAINERS: Mapping[str, Callable[[_Output, OptimizerSettings | None], str]] = {
    "trainer": _trainer,
    "axolotl": _axolotl,
    "llama-factory": _llama_factory,
}


def _yaml(settings: Mapping[str, object], optimizer: Exported) -> str:
    text = yaml.safe_dump({**settings, **optimizer.settings}, sort_keys=False)
    return text + "".join(f"{comment}\n" for comment in optimizer.comments)


def _config(out: Path) -> Mapping[str, Any]:
    return parse_json(read_small(out / "config.json"), out / "config.json", "config")


def _quantization(out: Path) -> Mapping[str, Any] | None:
    return quantization(_config(out))


def _check_plain(trainer: str, out: Path) -> None:
    """Check that the weights are in floating point: over quantised ones these trainers train adapters alone, or save
    a model that is quantised, but whose config.json does not say it.

    Raises:
        TrainingError: they are not.
    """
    if (section := _quantization(out)) is not None:
        raise TrainingError(
            f"{trainer} trains no layers of a quantised model",
            where=out / "config.json",
            expected="weights in floating point",
            got=f"quant_method {section.get('quant_method')}",
            hint="--for trainer does; or grow the base in floating point: deus-merge upscale --dtype bfloat16",
        )


def _check_described(out: Path) -> None:
    """Check that the family is described: only then are the names of a loaded model known to be those of its files.

    Raises:
        TrainingError: it is not.
    """
    place = out / "config.json"
    model_type = _config(out).get("model_type")
    if not any(model_type in family.model_types for family in families().values()):
        raise TrainingError(
            "the parameter names of this family, once it is loaded, are not known",
            where=place,
            expected="a model_type that deus-merge methods lists; not a whole model with vision or audio",
            got=f"model_type {model_type!r}",
            hint="--for trainer works: it compares the names when it runs",
        )


def _check_choice(trainer: str, manifest: Manifest, trains: Callable[[str], bool]) -> None:
    """Check that a trainer would train the new tensors and no others.

    Args:
        trainer: Its name, for messages.
        manifest: The output's manifest.
        trains: Whether it would train a tensor of this name.

    Raises:
        TrainingError: it would not.
    """
    new = set(new_names(manifest))
    wrong = [name for name in manifest.model_tensors if trains(name) != (name in new)]
    if wrong:
        how = "leave out" if wrong[0] in new else "also train"
        raise TrainingError(
            f"{trainer} would {how} {wrong[0]}", where=wrong[0], hint="--for trainer trains exactly the new tensors"
        )
