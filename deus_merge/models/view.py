"""A checkpoint's tensor names, sorted into layers and roles.

A family that nobody described is still split into layers by its tensor names, which is enough for methods that work
tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..core.errors import ArchitectureError
from .family import Architecture, TensorSpec, families
from .stacks import DEPTH_KEYS, INDEX, at, depth_path, find_stacks, reads_senses


@dataclass(frozen=True)
class ModelView:
    """A checkpoint's tensor names, sorted into layers and roles.

    Attributes:
        architecture: The family, or None for one known only by its tensor names.
        layers: For each layer: role -> tensor name. Without a family the role is the name under the prefix.
        layer_prefix: With ``{layer}`` for the index.
        before: Names in front of the layers (embeddings).
        after: Names behind the layers (final norm, head).
        layers_path: Keys into config.json that lead to the depth.
    """

    architecture: Architecture | None
    model_type: str
    layers: tuple[Mapping[str, str], ...]
    layer_prefix: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    layers_path: tuple[str, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def described(self) -> bool:
        """Whether all of it is a described family's, and not just its main stack."""
        return self.architecture is not None and self.model_type in self.architecture.model_types

    def names(self) -> Iterator[str]:
        """Every tensor of it."""
        yield from self.before
        yield from (name for layer in self.layers for name in layer.values())
        yield from self.after

    def spec(self, role: str) -> TensorSpec | None:
        """The family's description of a role; None for tensors (or families) without one."""
        return self.architecture.roles.get(role) if self.architecture else None

    def residual_writers(self) -> tuple[str, ...]:
        """Roles that add to the residual stream."""
        return tuple(s.role for s in self.architecture.layer if s.writes_residual) if self.architecture else ()


def prefix_of(layer: int, layer_prefix: str) -> str:
    """What the names of a layer's tensors begin with. A `ModelView.layer_prefix` may hold more braces than its own."""
    head, _, tail = layer_prefix.rpartition("{layer}")
    return f"{head}{layer}{tail}"


def view_model(config: Mapping, names: tuple[str, ...], where: object) -> ModelView:
    """Sort a checkpoint's tensor names by its config.

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
    for architecture in families().values():
        if model_type in architecture.model_types:
            return _known(architecture, model_type, config, names, where)
    return _generic(model_type, config, names, where)


def _known(architecture: Architecture, model_type: str, config: Mapping, names: tuple[str, ...], where) -> ModelView:
    depth = config.get(architecture.layers_key)
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ArchitectureError(
            f"config.json: {architecture.layers_key} is no depth",
            where=where,
            expected="a whole number of at least 1",
            got=repr(depth),
        )
    head, tail = architecture.layer_prefix.split("{layer}")
    pattern = re.compile(re.escape(head) + f"({INDEX})" + re.escape(tail) + r"(.+)", re.DOTALL)
    by_suffix = {spec.name: spec.role for spec in architecture.layer}
    layers: dict[int, dict[str, str]] = {}
    outside = []
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            outside.append(name)
        elif match[2] in architecture.roles and match[2] not in by_suffix:
            raise ArchitectureError(f"a tensor is named like the role {match[2]!r}", where=where, got=name)
        elif match[2] not in architecture.ignored:
            layers.setdefault(int(match[1]), {})[by_suffix.get(match[2], match[2])] = name
    _check_depth(layers, depth, architecture.layers_key, where)
    for index in range(depth):
        for spec in architecture.layer:
            if not spec.optional and spec.role not in layers[index]:
                raise ArchitectureError(
                    f"layer {index} lacks its {spec.role!r} tensor",
                    where=where,
                    expected=architecture.layer_prefix.format(layer=index) + spec.name,
                    hint=f"config.json says model_type {model_type!r}, family {architecture.family}",
                )
    order = {spec.role: i for i, spec in enumerate(architecture.layer)}
    ordered = tuple(
        dict(sorted(layers[i].items(), key=lambda item: (order.get(item[0], len(order)), item[1])))
        for i in range(depth)
    )
    untied = config.get("tie_word_embeddings") is False
    for name in (*architecture.before, *architecture.after):
        if name not in outside and (untied or name not in architecture.tied):
            raise ArchitectureError(
                f"the checkpoint lacks {name}",
                where=where,
                hint="its config.json says tie_word_embeddings: false" if name in architecture.tied else None,
            )
    before = tuple(n for n in architecture.before if n in outside)
    after = tuple(n for n in architecture.after if n in outside)
    rest = tuple(sorted(set(outside) - set(before) - set(after)))
    return ModelView(
        architecture, model_type, ordered, architecture.layer_prefix, before, after + rest, (architecture.layers_key,)
    )


def _generic(model_type: str, config: Mapping, names: tuple[str, ...], where) -> ModelView:
    stacks = find_stacks(names)
    if not stacks:
        raise ArchitectureError(
            f"unknown family {model_type!r}, and no tensor is named like a layer's",
            where=where,
            expected="names like model.layers.0.…, transformer.h.0.…",
        )
    paths = {prefix: depth_path(config, prefix, len(layers)) for prefix, layers in stacks.items()}
    size = {prefix: sum(map(len, layers.values())) for prefix, layers in stacks.items()}
    # a language model's own layers go before the larger stack of a vision tower
    prefix = max(stacks, key=lambda p: (paths[p] is not None and not reads_senses(paths[p]), size[p], p))
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
    config: Mapping,
    prefix: str,
    layers: Mapping[int, Mapping[str, str]],
    path: tuple[str, ...],
    outside: Sequence[str],
) -> ModelView:
    """A stack of layers that was found by its names, with roles if its section of the config is of a described family.

    Args:
        model_type: The whole model's.
        config: config.json.
        prefix: Of the layers' names.
        layers: Index -> name under the prefix -> name.
        path: Keys that lead to its depth.
        outside: The tensors that belong to it but to no layer.
    """
    kind = at(config, (*path[:-1], "model_type"))
    architecture = next((a for a in families().values() if len(path) > 1 and kind in a.model_types), None)
    needed = [spec.name for spec in architecture.layer if not spec.optional] if architecture else []
    if architecture and all(name in layer for layer in layers.values() for name in needed):
        architecture = replace(architecture, layer_prefix=prefix + ".{layer}.", before=(), after=(), tied=())
    else:
        architecture = None
    role = {spec.name: spec.role for spec in architecture.layer} if architecture else {}
    order = {name: i for i, name in enumerate(role)}
    before = tuple(n for n in outside if re.search(r"embed|wte|wpe", n))
    return ModelView(
        architecture,
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


def _check_depth(layers: Mapping[int, object], depth: int, key: str, where) -> None:
    if len(layers) != depth or (layers and max(layers) >= depth):
        missing = sorted(set(range(min(depth, 100_000))) - set(layers))[:5]
        raise ArchitectureError(
            f"config.json's {key} does not fit the tensors",
            where=where,
            expected=f"{depth} layers, 0 to {depth - 1}",
            got=f"{len(layers)} layers" + (f", first missing: {missing}" if missing else f", up to {max(layers)}"),
        )
