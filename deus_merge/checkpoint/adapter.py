"""The files of a LoRA adapter, and the tensors of a model that they change. Reads names and shapes, no tensor."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from ..core.errors import CheckpointError
from ..core.tensors import StoredTensor
from ..core.text import some_of
from .formats._conv1d import is_transposed
from .header import parse_json, read_header, read_small

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PART = re.compile(r"(.+)\.(lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector)(?:\.weight)?")
_WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save)(?=\.)")
#: beginnings of names that depend on the class that a model was loaded with
_PREFIX = re.compile(r"(?:(?:base_model|model|language_model|text_model|transformer|backbone|module|llm)\.)+")
_EMBEDDINGS = re.compile(r"(?:.+\.)?(?:embed_tokens|wte|word_embeddings)\.weight")
_HEAD = "lm_head.weight"
#: the types of the options that may be there
_KINDS = {
    "lora_alpha": int | float | None, "alpha_pattern": dict | None, "use_rslora": bool | None, "use_dora": bool | None,
    "fan_in_fan_out": bool | None, "init_lora_weights": bool | str | None,
}  # fmt: skip
#: regular expressions that may never end: a repeated group, or many repetitions
_COSTLY = re.compile(r"\)[*+{]|([*+{?].*){5}")
#: options of adapters that do more than add to weights
_OTHER_KINDS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config",
    "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
#: initialisations that also changed the model, at random or by training data
_OTHER_STARTS = ("pissa_niter", "corda", "loftq", "lora_ga")


@dataclass
class Adapted:
    """A module with low-rank weights.

    Attributes:
        name: The module's name in the adapter, which peft's patterns match.
        parts: peft's name of a tensor (``lora_A.weight``) -> its name in the adapter's file.
        weight: The tensor of the model that it changes.
        kind: ``linear``; ``transposed``, for a weight stored (in, out); ``embedding``.
    """

    name: str
    parts: dict[str, str] = field(default_factory=dict)
    weight: str = ""
    kind: str = "linear"


@dataclass(frozen=True)
class Change:
    """The change of one tensor by an adapter.

    Attributes:
        base: The tensor of the model that is changed: itself, or the embeddings for a head that was tied to them.
        whole: The tensor of the adapter that replaces it first, if there is one.
        module: The low-rank weights that are then added, if there are any.
    """

    base: str
    whole: str | None = None
    module: Adapted | None = None


class Adapter:
    """The folder of an adapter.

    Attributes:
        folder: The folder.
        options: adapter_config.json.
        config_bytes: The content of that file.
        header: The header of its weights.
        shapes: The shapes of its weights by name.

    Raises:
        CheckpointError: files are missing or malformed, or this kind of adapter is not supported.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not os.path.lexists(folder / CONFIG):
            raise CheckpointError(
                f"not an adapter: {CONFIG} is missing", where=folder, expected="a folder that peft saved"
            )
        self.config_bytes = read_small(folder / CONFIG)
        self.options = parse_json(self.config_bytes, folder / CONFIG, "config")
        self._check_options()
        if not os.path.lexists(folder / WEIGHTS):
            others = [n for n in ("adapter_model.bin", "adapter_model.pt") if os.path.lexists(folder / n)]
            raise CheckpointError(
                f"the adapter's {WEIGHTS} is missing",
                where=folder,
                got=", ".join(others) or "no weights",
                hint="only safetensors is read; load the adapter with peft and write it with .save_pretrained(folder)",
            )
        self.header = read_header(folder / WEIGHTS)
        self.shapes = {tensor.name: tensor.shape for tensor in self.header.tensors}

    def changes(self, tensors: Mapping[str, StoredTensor], where: object) -> dict[str, Change]:
        """The changes to the tensors of a model.

        Args:
            tensors: The model's tensors by name.
            where: The model, for messages.

        Returns:
            Tensor -> its change. `_HEAD` may be a new tensor, see `Change.base`.

        Raises:
            CheckpointError: it changes tensors that are missing from the model, or have other shapes there.
        """
        find = _Names(tensors).find
        modules: dict[str, Adapted] = {}
        wholes: dict[str, str] = {}  # the model's tensor -> the adapter's
        missing: list[str] = []
        for stored, shape in self.shapes.items():
            name = stored.removeprefix("base_model.model.")
            name = name.replace(".default.", ".").removesuffix(".default")
            if part := _PART.fullmatch(name):
                modules.setdefault(part[1], Adapted(part[1])).parts[part[2]] = stored
            elif "lora_" in name or "token_adapter" in name:
                self._refuse("a tensor of an unknown kind", expected="those of LoRA and DoRA", got=stored)
            elif target := find(_WRAPPER.sub("", name)):
                self._check_shape(stored, shape, _tensor(target, tensors))
                wholes[target] = stored
            else:
                missing.append(name)
        changes = {name: Change(_base(name, tensors), whole) for name, whole in wholes.items()}
        for module in modules.values():
            target = find(f"{module.name}.weight")
            if target is None:
                missing.append(module.name)
                continue
            if target in changes and changes[target].module:
                self._refuse("two modules of the adapter change one tensor", expected="one module", got=target)
            module.weight = target
            self._shape_of(module, _tensor(target, tensors))
            changes[target] = Change(_base(target, tensors), wholes.get(target), module)
            if "lora_B.bias" in module.parts:
                bias = target.removesuffix("weight") + "bias"
                if bias not in tensors:
                    missing.append(bias)
                changes[bias] = Change(bias, wholes.get(bias), module)
        if missing:
            self._refuse(
                "the adapter changes tensors that are missing from the model",
                expected=f"tensors of {where}",
                got=some_of(missing, 3),
                hint="it may be an adapter of another model",
            )
        if not changes:
            self._refuse("the adapter changes nothing", expected="lora_A and lora_B of some modules")
        embeddings = changes.get(_embeddings(tensors) or "")
        untied = embeddings and embeddings.whole and not embeddings.module
        if embeddings and untied and _HEAD not in tensors and not self.options.get("ensure_weight_tying"):
            changes.setdefault(_HEAD, Change(embeddings.base))  # training used the old head
        return changes

    def _check_options(self) -> None:
        where, kind = self.folder / CONFIG, self.options.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(
                "an adapter of an unsupported kind", where=where, expected="peft_type: LORA", got=kind
            )
        for option, kinds in _KINDS.items():
            if not isinstance(self.options.get(option), kinds):
                raise CheckpointError(f"{option} has a wrong type", where=where, got=repr(self.options[option]))
        for pattern, alpha in (self.options.get("alpha_pattern") or {}).items():
            if not isinstance(alpha, int | float) or _COSTLY.search(pattern) or len(pattern) > 200:
                raise CheckpointError("alpha_pattern is malformed", where=where, got=f"{pattern}: {alpha!r}")
        for option in _OTHER_KINDS:
            if self.options.get(option):
                self._unsupported(option)
        start = self.options.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_OTHER_STARTS):
            self._unsupported("init_lora_weights")

    def _unsupported(self, option: str) -> NoReturn:
        raise CheckpointError(
            f"adapters with {option} are not supported",
            where=self.folder / CONFIG,
            expected=f"no {option}",
            got=f"{option}: {self.options[option]}",
            hint="merge the adapter with peft into a model of its own"
            if option != "init_lora_weights"
            else "save the adapter again with path_initial_model_for_weight_conversion",
        )

    def _shape_of(self, module: Adapted, info: StoredTensor) -> None:
        """Check a module's low-rank weights, and set its kind from them."""
        shapes = {part: self.shapes[name] for part, name in module.parts.items()}
        embedding = "lora_embedding_A" in shapes or "lora_embedding_B" in shapes
        halves = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        if self.options.get("use_dora"):
            halves += ("lora_magnitude_vector",)
        for part in halves:
            if part not in shapes:
                self._refuse(f"{module.name}: {part} is missing", expected=", ".join(halves), got=", ".join(shapes))
        (rank, columns), (rows, same) = (
            s if len(s := shapes[half]) == 2 else self._refuse(f"{module.name}: {half} is not a matrix", got=list(s))
            for half in halves[:2]
        )
        if rank != same:
            self._refuse(f"{module.name}: its two matrices have different ranks", got=f"{rank} and {same}")
        if embedding:
            rows, columns = columns, rows
        turned = not embedding and info.shape == (columns, rows)
        if not turned:
            self._check_shape(f"B times A of {module.name}", (rows, columns), info)
        unlike = rows != columns or self.options.get("fan_in_fan_out") or is_transposed(info)
        if embedding or (turned and unlike):
            module.kind = "embedding" if embedding else "transposed"

    def _check_shape(self, what: str, shape: tuple[int, ...], info: StoredTensor) -> None:
        if shape != info.shape:
            self._refuse(
                "the adapter is for a model of other shapes",
                expected=f"{list(info.shape)} for {info.name}",
                got=f"{list(shape)}, {what}",
                hint="if its training added tokens, resize the model's embeddings first",
            )

    def _refuse(
        self, message: str, *, expected: object = None, got: object = None, hint: str | None = None
    ) -> NoReturn:
        raise CheckpointError(message, where=self.folder / WEIGHTS, expected=expected, got=got, hint=hint)


class _Names:
    """The names of a model's tensors, found by those that an adapter has. The adapter may have been trained with the
    class of the whole model or of its body, and names may have other prefixes than in the model's files: they are found
    as long as only one tensor can be meant.

    Args:
        tensors: The model's tensors.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]):
        self._tensors = tensors
        self._by_tail: dict[str, list[str]] = {}
        for name in tensors:
            self._by_tail.setdefault(_PREFIX.sub("", name), []).append(name)

    def find(self, name: str) -> str | None:
        """The model's name; None for a tensor that is missing. A head that is tied to the embeddings has a name."""
        tail = _PREFIX.sub("", name)
        found = self._by_tail.get(tail, [])
        for whole in (name, name.partition(".")[2]):
            if whole in self._tensors:
                return whole
        if tail == _HEAD and not found and _embeddings(self._tensors):
            return _HEAD
        return found[0] if len(found) == 1 else None


def _base(name: str, tensors: Mapping[str, StoredTensor]) -> str:
    if name in tensors:
        return name
    embeddings = _embeddings(tensors)
    assert embeddings is not None, "only a tied head is not among the tensors, see _Names.find"
    return embeddings


def _tensor(name: str, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
    return tensors[_base(name, tensors)]


def _embeddings(tensors: Mapping[str, StoredTensor]) -> str | None:
    """The token embeddings; None if the names are ambiguous."""
    found = [name for name in tensors if _EMBEDDINGS.fullmatch(name)]
    return found[0] if len(found) == 1 else None
