"""A checkpoint's tensor names, sorted into layers and roles.

A model of an undescribed family is split into layers by its tensor names, which is enough for methods that work tensor
by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..core.errors import ArchitectureError
from ..core.text import some_of
from .config_json import Config, value_at
from .family import Family, TensorSpec, families
from .stacks import DEPTH_KEYS, INDEX, depth_path, find_stacks, is_vision_or_audio


@dataclass(frozen=True)
class ModelView:
    """A checkpoint's tensor names, sorted into layers and roles.

    Attributes:
        family: The family; None for a model whose layers are known only by tensor names.
        model_type: The whole model's ``model_type``.
        layers: For each layer: role -> tensor name. Without a family the role is the name under the prefix.
        layer_prefix: The prefix of a layer's tensor names, with ``{layer}`` for the index.
        before: Names of tensors before the layers (embeddings).
        after: Names of tensors after the layers (final norm, head).
        layers_path: Keys that lead to the depth in config.json.
    """

    family: Family | None
    model_type: str
    layers: tuple[Mapping[str, str], ...]
    layer_prefix: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    layers_path: tuple[str, ...]

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

    def spec(self, role: str) -> TensorSpec | None:
        """The family's description of a role; None for a tensor or a family that is not described."""
        return self.family.roles.get(role) if self.family else None

    def residual_writers(self) -> tuple[str, ...]:
        """The roles of tensors that add to the residual stream."""
        return tuple(s.role for s in self.family.layer if s.writes_residual) if self.family else ()


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
    for family in families().values():
        if model_type in family.model_types:
            return _described(family, model_type, config, names, where)
    return _undescribed(model_type, config, names, where)


def _described(family: Family, model_type: str, config: Config, names: tuple[str, ...], where: object) -> ModelView:
    depth = config.get(family.layers_key)
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ArchitectureError(
            f"config.json: {family.layers_key} must be a positive integer",
            where=where,
            expected="the number of layers, at least 1",
            got=repr(depth),
        )
    head, tail = family.layer_prefix.split("{layer}")
    pattern = re.compile(re.escape(head) + f"({INDEX})" + re.escape(tail) + r"(.+)", re.DOTALL)
    by_suffix = {spec.name: spec.role for spec in family.layer}
    layers: dict[int, dict[str, str]] = {}
    outside = []
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            outside.append(name)
        elif match[2] in family.roles and match[2] not in by_suffix:
            raise ArchitectureError(f"a tensor has the name of the role {match[2]!r}", where=where, got=name)
        elif match[2] not in family.ignored:
            layers.setdefault(int(match[1]), {})[by_suffix.get(match[2], match[2])] = name
    _check_depth(layers, depth, family.layers_key, where)
    for index in range(depth):
        for spec in family.layer:
            if not spec.optional and spec.role not in layers[index]:
                raise ArchitectureError(
                    f"layer {index} lacks its {spec.role!r} tensor",
                    where=where,
                    expected=family.layer_prefix.format(layer=index) + spec.name,
                    hint=f"config.json says model_type {model_type!r}, family {family.name}",
                )
    order = {spec.role: i for i, spec in enumerate(family.layer)}
    ordered = tuple(
        dict(sorted(layers[i].items(), key=lambda item: (order.get(item[0], len(order)), item[1])))
        for i in range(depth)
    )
    untied = config.get("tie_word_embeddings") is False
    for name in (*family.before, *family.after):
        if name not in outside and (untied or name not in family.tied):
            raise ArchitectureError(
                f"the checkpoint lacks {name}",
                where=where,
                hint="its config.json says tie_word_embeddings: false" if name in family.tied else None,
            )
    before = tuple(n for n in family.before if n in outside)
    after = tuple(n for n in family.after if n in outside)
    rest = tuple(sorted(set(outside) - set(before) - set(after)))
    return ModelView(family, model_type, ordered, family.layer_prefix, before, after + rest, (family.layers_key,))


def _undescribed(model_type: str, config: Config, names: tuple[str, ...], where: object) -> ModelView:
    stacks = find_stacks(names)
    if not stacks:
        raise ArchitectureError(
            f"unknown family {model_type!r}, and no tensor has a name like a layer's",
            where=where,
            expected="names like model.layers.0.…, transformer.h.0.…",
        )
    paths = {prefix: depth_path(config, prefix, len(layers)) for prefix, layers in stacks.items()}
    size = {prefix: sum(map(len, layers.values())) for prefix, layers in stacks.items()}

    def is_language_model(path: tuple[str, ...] | None) -> bool:
        return path is not None and not is_vision_or_audio(path)

    # the layers of the language model take precedence over a larger vision tower
    prefix = max(stacks, key=lambda p: (is_language_model(paths[p]), size[p], p))
    layers, path = stacks[prefix], paths[prefix]
    if path is None:
        raise ArchitectureError(
            f"unknown family {model_type!r}: no depth in config.json fits its {len(layers)} layers",
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
    kind = value_at(config, (*path[:-1], "model_type"))
    family = next((f for f in families().values() if len(path) > 1 and kind in f.model_types), None)
    needed = [spec.name for spec in family.layer if not spec.optional] if family else []
    if family and all(name in layer for layer in layers.values() for name in needed):
        family = replace(family, layer_prefix=prefix + ".{layer}.", before=(), after=(), tied=())
    else:
        family = None
    role = {spec.name: spec.role for spec in family.layer} if family else {}
    order = {name: i for i, name in enumerate(role)}
    before = tuple(n for n in outside if re.search(r"embed|wte|wpe", n))
    return ModelView(
        family,
        model_type,
        tuple(
            {
                role.get(suffix, suffix): layers[i][suffix]
                for suffix in sorted(layers[i], key=lambda s: (order.get(s, len(order)), s))
            }
            for i in range(len(layers))
        ),
        prefix + ".{layer}.",
        before,
        tuple(n for n in outside if n not in before),
        path,
    )


def _check_depth(layers: Mapping[int, Mapping[str, str]], depth: int, key: str, where: object) -> None:
    if len(layers) != depth or (layers and max(layers) >= depth):
        missing = sorted(set(range(min(depth, 100_000))) - set(layers))
        raise ArchitectureError(
            f"config.json's {key} does not fit the tensors",
            where=where,
            expected=f"{depth} layers, 0 to {depth - 1}",
            got=f"{len(layers)} layers" + (f", missing: {some_of(missing)}" if missing else f", up to {max(layers)}"),
        )
