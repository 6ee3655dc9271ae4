"""A checkpoint's tensor names, sorted into layers and roles.

A model of an undescribed family is split into layers by its tensor names, which is enough for methods that work tensor
by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..checkpoint.quantized import is_cache_scale
from ..core.errors import ArchitectureError
from ..core.text import plural, some_of
from .config_json import Config, class_names, section, value_at
from .facts.text_types import names_of_type
from .family import Family, families
from .spec import TensorSpec
from .stacks import DEPTH_KEYS, DEPTH_LISTS, INDEX, depth_at, depth_path, find_stacks, is_vision_or_audio, side_of

#: the keys of config.json that count prediction layers behind the last layer
PREDICTION_KEYS = ("num_nextn_predict_layers", "num_mtp_modules", "mtp_num_hidden_layers")

#: the classes of models that have a head: others are saved without one
_HAS_HEAD = re.compile(r"ForCausalLM|LMHeadModel|ForConditionalGeneration")


@dataclass(frozen=True)
class ModelView:
    """A checkpoint's tensor names, sorted into layers and roles.

    Attributes:
        family: The family; None for a model whose layers are known only by tensor names.
        model_type: The whole model's ``model_type``.
        layers: For each layer: role -> tensor name. Without a family the role is the name under the prefix.
        layer_prefix: The prefix of a layer's tensor names, with ``{layer}`` for the index.
        before: Names of tensors before the layers (embeddings).
        after: Names of tensors after the layers (final norm, head, prediction layers).
        layers_path: Keys that lead to the depth in config.json.
        specs: For each layer: role -> description, where there is one.
        kinds: For each layer its kind in words: ``attention + experts``; empty without a family.
    """

    family: Family | None
    model_type: str
    layers: tuple[Mapping[str, str], ...]
    layer_prefix: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    layers_path: tuple[str, ...]
    specs: tuple[Mapping[str, TensorSpec], ...] = ()
    kinds: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        """The depth."""
        return len(self.layers)

    @property
    def described(self) -> bool:
        """Whether the whole model is of a described family, and not only its main stack."""
        return self.family is not None and self.model_type in self.family.model_types

    def names(self) -> Iterator[str]:
        """The names of all its tensors."""
        yield from self.before
        yield from (name for layer in self.layers for name in layer.values())
        yield from self.after

    def spec(self, role: str, layer: int = 0) -> TensorSpec | None:
        """The family's description of a layer's role; None for a tensor or a family that is not described."""
        if not self.specs:
            return None
        described = self.specs[layer].get(role)
        return described or (TensorSpec(role, role, opaque=True) if is_cache_scale(role) else None)

    def names_beside(self, names: Sequence[str], other: ModelView, own: Sequence[str]) -> dict[str, str]:
        """Which tensor outside of the layers of another model is which of this one: ``embed_tokens.weight`` is
        ``model.embed_tokens.weight`` where the layers are ``layers.0.`` and ``model.layers.0.``.

        Args:
            names: Tensors of the other model.
            other: Its view.
            own: Tensors of this model.

        Returns:
            For each of ``names`` the name here, or itself where it has none -> its name.
        """
        here = {name.removeprefix(self._root): name for name in own}
        found = {here.get(name.removeprefix(other._root), name): name for name in names}
        alike = self._root == other._root or len(here) != len(own) or len(found) != len(names)
        return {name: name for name in names} if alike else found

    @property
    def _root(self) -> str:
        """What the names of its layers begin with: ``model.`` or nothing, for example."""
        root = ".".join(_parts(self.layer_prefix)[:-1])
        return f"{root}." if root else ""

    def output_name(self, name: str, depth: int) -> str:
        """The name of one of its tensors outside of the layers in an output of another depth: prediction layers that
        are numbered behind the last layer stay behind it."""
        head, _, tail = self.layer_prefix.rpartition("{layer}")
        match = re.match(re.escape(head) + f"({INDEX})" + re.escape(tail), name) if self.layer_prefix else None
        if match is None or int(match[1]) < self.num_layers:
            return name
        return prefix_of(int(match[1]) - self.num_layers + depth, self.layer_prefix) + name[match.end() :]


def prefix_of(layer: int, layer_prefix: str) -> str:
    """The prefix of the tensor names of one layer. Only the last ``{layer}`` of the prefix is the index."""
    head, _, tail = layer_prefix.rpartition("{layer}")
    return f"{head}{layer}{tail}"


def view_model(config: Config, names: tuple[str, ...], where: object) -> ModelView:
    """Sort a checkpoint's tensor names into layers and roles.

    Args:
        config: config.json.
        names: All tensor names.
        where: The folder, for messages.

    Raises:
        ArchitectureError: layers or required tensors are missing, or the config's depth differs from the files'.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        got = repr(model_type) if model_type is not None else None
        raise ArchitectureError("config.json has no model_type", where=where, expected="a string", got=got)
    family = family_of(model_type)
    if family is None:
        return _undescribed(model_type, config, names, where)
    family = family.under(config)
    prefix, layers, outside = _own_layers(family, names)
    key = next((k for k in (family.layers_key, *DEPTH_LISTS) if config.get(k) is not None), family.layers_key)
    depth = depth_at(config, (key,))
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ArchitectureError(
            f"config.json: {family.layers_key} must be a positive integer",
            where=where,
            expected="the number of layers, at least 1",
            got=repr(depth),
        )
    layers, predicting = _without_prediction_layers(layers, depth, config)
    _check_depth(layers, depth, key, where)
    view = _view(family, model_type, prefix, layers, (key,), where)
    before, after, tied = (
        tuple(_rooted(_known(name, family, outside), family.layer_prefix, prefix, outside) for name in part)
        for part in (family.before, family.after, family.tied)
    )
    classes = class_names(config)
    headless = classes and not any(_HAS_HEAD.search(name) for name in classes)
    untied = config.get("tie_word_embeddings") is False and not headless
    for name in (*before, *after):
        if name not in outside and (untied or name not in tied):
            raise ArchitectureError(
                f"the checkpoint lacks {name}",
                where=where,
                hint="its config.json says tie_word_embeddings: false" if name in tied else None,
            )
    before, after = (tuple(n for n in part if n in outside) for part in (before, after))
    rest = sorted(outside - {*before, *after})
    return replace(view, before=before, after=(*after, *rest, *sorted(predicting)))


def family_of(model_type: object) -> Family | None:
    """The described family of a ``model_type``; None if there is none."""
    return next((family for family in families().values() if model_type in family.model_types), None)


def _own_layers(family: Family, names: Sequence[str]) -> tuple[str, dict[int, dict[str, str]], set[str]]:
    """The layers of a described model.

    Returns:
        The prefix of a layer's names with ``{layer}``: the family's, or where no tensor has it that of the largest
        stack with the same last part (``layers``); layer -> name under the prefix -> name; and all other names.
    """
    stacks = {f"{prefix}.{{layer}}.": layers for prefix, layers in find_stacks(names).items()}
    last = _parts(family.layer_prefix)[-1]
    similar = [prefix for prefix in stacks if _parts(prefix)[-1] == last]
    prefix = family.layer_prefix
    if prefix not in stacks and similar:
        prefix = max(similar, key=lambda p: (_size(stacks[p]), p))
    layers = stacks.get(prefix, {})
    return prefix, layers, set(names) - {name for layer in layers.values() for name in layer.values()}


def _known(name: str, family: Family, names: set[str]) -> str:
    """A family's name of a tensor outside of the layers, or the other one that a checkpoint has."""
    other = family.other_names.get(name)
    return other if other in names and name not in names else name


def _rooted(name: str, own_prefix: str, prefix: str, names: set[str]) -> str:
    """A family's name of a tensor outside of the layers, as a checkpoint has it whose layers have another prefix.

    With ``language_model.model.layers.`` that is ``language_model.model.norm.weight`` or
    ``language_model.lm_head.weight``, for example.
    """
    own_root, root = (".".join(_parts(p)[:-1]) for p in (own_prefix, prefix))
    bare = name.removeprefix(f"{own_root}.") if own_root else name
    choices = (name, *(f"{place}.{bare}".lstrip(".") for place in (root, root.rpartition(".")[0])))
    return next((choice for choice in choices if choice in names), name)


def _parts(prefix: str) -> list[str]:
    """``model.layers.{layer}.`` -> model, layers."""
    return prefix.removesuffix(".{layer}.").split(".")


def _without_prediction_layers(
    layers: dict[int, dict[str, str]], depth: int, config: Config
) -> tuple[dict[int, dict[str, str]], list[str]]:
    """Layers without those that config.json counts as prediction layers behind the last one, and the names of these."""
    counts = [config.get(key) for key in PREDICTION_KEYS]
    count = next((n for n in counts if isinstance(n, int) and not isinstance(n, bool) and n > 0), 0)
    behind = [i for i in layers if depth <= i < depth + count]
    names = [name for i in behind for name in layers[i].values()]
    return {i: layer for i, layer in layers.items() if i not in behind}, names


def _view(
    family: Family, model_type: str, prefix: str, layers: Mapping[int, Mapping[str, str]], path: tuple[str, ...],
    where: object,
) -> ModelView:  # fmt: skip
    """The layers of a described stack.

    Raises:
        ArchitectureError: a required tensor is missing, or one has the name of a role.
    """
    by_role, specs, kinds = [], [], []
    for index in range(len(layers)):
        found = family.sort(frozenset(layers[index]))
        if found.clash:
            name = layers[index][found.clash]
            raise ArchitectureError(f"a tensor has the name of the role {found.clash!r}", where=where, got=name)
        if found.missing:
            raise ArchitectureError(
                f"layer {index} lacks its {found.missing.role!r} tensor",
                where=where,
                expected=prefix_of(index, prefix) + found.missing.name,
                hint=f"config.json says model_type {model_type!r}, family {family.name}",
            )
        by_role.append({role: layers[index][suffix] for role, suffix in found.names.items()})
        specs.append(found.specs)
        kinds.append(found.kind)
    described = replace(family, layer_prefix=prefix) if prefix != family.layer_prefix else family
    return ModelView(
        described, model_type, tuple(by_role), prefix, (), (), path, specs=tuple(specs), kinds=tuple(kinds)
    )


def _size(layers: Mapping[int, Mapping[str, str]]) -> int:
    return sum(map(len, layers.values()))


def _undescribed(model_type: str, config: Config, names: tuple[str, ...], where: object) -> ModelView:
    stacks = find_stacks(names)
    if not stacks:
        raise ArchitectureError(
            f"unknown family {model_type!r}, and no tensor has a name like a layer's",
            where=where,
            expected="names like model.layers.0.…, transformer.h.0.…",
        )
    paths = {prefix: depth_path(config, prefix, len(layers)) for prefix, layers in stacks.items()}
    size = {prefix: _size(layers) for prefix, layers in stacks.items()}

    def is_language_model(path: tuple[str, ...] | None) -> bool:
        return path is not None and not is_vision_or_audio(path)

    # the layers of the language model take precedence over a larger vision tower, a decoder over a larger encoder
    decodes = "decoder" in map(side_of, stacks)
    main = {p: is_language_model(paths[p]) and not (decodes and side_of(p) == "encoder") for p in stacks}
    prefix = max(stacks, key=lambda p: (main[p], is_language_model(paths[p]), size[p], p))
    layers, path = stacks[prefix], paths[prefix]
    if path is None:
        raise ArchitectureError(
            f"unknown family {model_type!r}: no depth in config.json fits its {plural(len(layers), 'layer')}",
            where=where,
            expected=" or ".join(DEPTH_KEYS) + f" = {len(layers)}",
        )
    _check_depth(layers, len(layers), path[-1], where)
    in_layers = {name for layer in layers.values() for name in layer.values()}
    return stack_view(model_type, config, prefix, layers, path, [n for n in names if n not in in_layers])


def stack_view(
    model_type: str,
    config: Config,
    prefix: str,
    layers: Mapping[int, Mapping[str, str]],
    path: tuple[str, ...],
    outside: Sequence[str],
) -> ModelView:
    """The view of one stack of layers, with roles if its section of config.json is of a described family.

    Args:
        model_type: The whole model's ``model_type``.
        config: config.json.
        prefix: The prefix of the layers' names.
        layers: Index -> name under the prefix -> name.
        path: Keys that lead to the stack's depth.
        outside: The stack's tensors outside its layers.
    """
    stated = value_at(config, (*path[:-1], "model_type"))
    family = next(filter(None, map(family_of, names_of_type(stated, path[:-1], model_type))), None)
    before = tuple(n for n in outside if re.search(r"embed|wte|wpe", n))
    after = tuple(n for n in outside if n not in before)
    full = prefix + ".{layer}."
    if family and not any(_unlike(family, layer) for layer in layers.values()):
        family = family.under(section(config, path))
        view = _view(replace(family, before=(), after=(), tied=()), model_type, full, layers, path, prefix)
        return replace(view, before=before, after=after)
    plain = tuple(dict(sorted(layers[i].items())) for i in range(len(layers)))
    return ModelView(None, model_type, plain, full, before, after, path)


def _unlike(family: Family, layer: Mapping[str, str]) -> bool:
    """Whether a layer lacks a tensor of the family, or has one with the name of a role."""
    found = family.sort(frozenset(layer))
    return bool(found.missing or found.clash)


def _check_depth(layers: Mapping[int, Mapping[str, str]], depth: int, key: str, where: object) -> None:
    if len(layers) != depth or (layers and max(layers) >= depth):
        missing = sorted(set(range(min(depth, 100_000))) - set(layers))
        raise ArchitectureError(
            f"config.json's {key} does not fit the tensors",
            where=where,
            expected=f"{plural(depth, 'layer')}, 0 to {depth - 1}",
            got=f"{plural(len(layers), 'layer')}"
            + (f", missing: {some_of(missing)}" if missing else f", up to {max(layers)}"),
        )
