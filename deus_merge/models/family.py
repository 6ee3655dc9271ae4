"""The description of a model family as data: the sublayers of a decoder layer, their tensors, and the spaces that these
connect.

A family is one file in ``families/``, and `families` is their registry. Sublayers are put together from the pieces in
``families/_pieces.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple, cast

from ..core.plugins import plugins
from .config_json import Config, value_at
from .facts.base import Rule
from .spec import EXPERT, TensorSpec


@dataclass(frozen=True)
class Sublayer:
    """A part of a layer: attention, an MLP, experts, a mixer of another kind; with its norms.

    Attributes:
        kind: Its name in tables: ``attention``, ``experts``.
        tensors: Its tensors, in the order in which alignment processes them.
    """

    kind: str
    tensors: tuple[TensorSpec, ...]

    def find(self, suffix: str) -> Placed | None:
        """The description of a tensor by its name under the layer's prefix, and its place among the layer's."""
        if suffix in self._exact:
            return self._exact[suffix]
        for place, spec in self._patterns:
            assert spec.pattern is not None
            if match := spec.pattern.fullmatch(suffix):
                if "e" not in match.groupdict():
                    return Placed((place, 0, place), replace(spec, role=suffix, name=suffix))
                expert = int(match["e"])
                return Placed((self._first_expert, expert, place), spec.of_expert(expert))
        return None

    def missing(self, suffixes: Iterable[str]) -> TensorSpec | None:
        """The first required tensor that is not among these names."""
        there = set(suffixes)
        for spec in self.tensors:
            if spec.optional or spec.name in there:
                continue
            if spec.pattern is None or not any(spec.pattern.fullmatch(s) for s in there):
                return spec
        return None

    @cached_property
    def _exact(self) -> Mapping[str, Placed]:
        plain = ((i, s) for i, s in enumerate(self.tensors) if s.pattern is None)
        return {spec.name: Placed((i, 0, i), spec) for i, spec in plain}

    @cached_property
    def _patterns(self) -> tuple[tuple[int, TensorSpec], ...]:
        return tuple((i, s) for i, s in enumerate(self.tensors) if s.pattern is not None)

    @cached_property
    def _first_expert(self) -> int:
        """The place of all experts, which are aligned one after the other."""
        return next((i for i, spec in self._patterns if EXPERT in spec.name), 0)


class Placed(NamedTuple):
    """A tensor's description and its place in the order of alignment."""

    place: tuple[int, int, int]
    spec: TensorSpec


@dataclass(frozen=True)
class Case:
    """What differs in models whose config.json has a value.

    Attributes:
        key: The key of the config's section, with dots between the keys of nested mappings.
        without, no_identity: As `Family`'s, for these models.
        when: Whether this holds where the value is true, or where it is false.
        default: Whether the value counts as true where the key is missing.
    """

    key: str
    without: Mapping[str, str] = field(default_factory=dict)
    no_identity: str | None = None
    when: bool = True
    default: bool = False

    def holds(self, sizes: Config) -> bool:
        """Whether a section of config.json has the value."""
        value = value_at(sizes, tuple(self.key.split(".")))
        return (self.default if value is None else bool(value)) is self.when


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: Its name, which is also its file's.
        model_types: The ``model_type`` values of config.json that it covers, also of a ``text_config``.
        sublayers: The parts of a decoder layer in the order in which alignment processes them; for each the kinds of
            which a layer has one.
        layer_prefix: The layer's prefix with ``{layer}`` for the index. Checkpoints may have other prefixes in front of
            its last part.
        before: Tensors before the layers.
        after: Tensors after the layers.
        other_names: Names that tensors of ``before`` and ``after`` have in some checkpoints.
        tied: Tensors of ``before`` and ``after`` that a checkpoint may lack, unless its config says that embeddings are
            not tied.
        ignored: Layer tensors of old checkpoints that current models compute (rotary buffers): not written to outputs.
        layers_key: The key of config.json that holds the depth.
        rotary: The rotations of a rotary pair of components of query and key that leave the function of attention
            unchanged. ``phases``: by any angle, since they commute with the rotary embedding; ``signs``: by half a turn
            only, since per-head norm weights scale the two components differently; ``none``.
        rotary_share: The share of a head's components that are rotary where config.json does not say.
        interleaved: See `Heads`.
        without: Steps of ``alignment: symmetry`` that would change the function -> the reason.
        unchecked: Spaces whose sizes the usual keys of config.json do not say.
        no_identity: The reason why no layer of this family can be the identity; None where zeros make one.
        cases: What differs where a config has certain values.
        facts: The rules by which its configs say of what kind each layer is, where these are not known by
            ``model_type`` or by the keys: see `layer_facts`.
    """

    name: str
    model_types: tuple[str, ...]
    sublayers: tuple[tuple[Sublayer, ...], ...]
    layer_prefix: str = "model.layers.{layer}."
    before: tuple[str, ...] = ("model.embed_tokens.weight",)
    after: tuple[str, ...] = ("model.norm.weight", "lm_head.weight")
    other_names: Mapping[str, str] = field(default_factory=dict)
    tied: tuple[str, ...] = ("lm_head.weight",)
    ignored: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)
    layers_key: str = "num_hidden_layers"
    rotary: Literal["phases", "signs", "none"] = "none"
    rotary_share: float = 1.0
    interleaved: bool = False
    without: Mapping[str, str] = field(default_factory=dict)
    unchecked: tuple[str, ...] = ()
    no_identity: str | None = None
    cases: tuple[Case, ...] = ()
    facts: tuple[Rule, ...] = ()

    def under(self, sizes: Config) -> Family:
        """The family as a model with this section of config.json has it."""
        found = [case for case in self.cases if case.holds(sizes)]
        if not found:
            return self
        without = {step: reason for case in found for step, reason in case.without.items()}
        no_identity = next((case.no_identity for case in found if case.no_identity), self.no_identity)
        return replace(self, without={**self.without, **without}, no_identity=no_identity, cases=())

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """All tensors that a layer of any kind may have."""
        return tuple(dict.fromkeys(s for kinds in self.sublayers for kind in kinds for s in kind.tensors))

    @cached_property
    def layer(self) -> tuple[TensorSpec, ...]:
        """The tensors of a layer of the first kind."""
        return tuple(spec for kinds in self.sublayers for spec in kinds[0].tensors)

    def sort(self, suffixes: frozenset[str]) -> SortedLayer:
        """The tensors of one layer by role, whatever kind of layer it is.

        Args:
            suffixes: Their names under the layer's prefix.
        """
        if suffixes not in self._sorted:
            self._sorted[suffixes] = self._sort(suffixes - {*self.ignored})
        return self._sorted[suffixes]

    @cached_property
    def _sorted(self) -> dict[frozenset[str], SortedLayer]:
        return {}

    def _sort(self, suffixes: frozenset[str]) -> SortedLayer:
        specs: dict[str, TensorSpec] = {}  # name -> description
        kinds, missing = [], None
        for alternatives in self.sublayers:
            hits = [{s: placed for s in suffixes if (placed := kind.find(s))} for kind in alternatives]
            lacks = [kind.missing(hit) for kind, hit in zip(alternatives, hits, strict=True)]
            best = max(range(len(hits)), key=lambda i: (lacks[i] is None, len(hits[i]), -i))
            specs |= {
                s: placed.spec for s, placed in sorted(hits[best].items(), key=lambda item: (item[1].place, item[0]))
            }
            missing = missing or lacks[best]
            kinds += [alternatives[best].kind] if alternatives[best].kind else []
        rest = sorted(suffixes - specs.keys())
        names = {spec.role: suffix for suffix, spec in specs.items()}
        clash = next((suffix for suffix in rest if suffix in {s.role for s in self.tensors}), None)
        by_role = {spec.role: spec for spec in specs.values()}
        return SortedLayer(" + ".join(kinds), names | dict(zip(rest, rest, strict=True)), by_role, missing, clash)


@dataclass(frozen=True)
class SortedLayer:
    """One layer's tensors by role.

    Attributes:
        kind: In words: ``attention + experts``.
        names: Role -> name under the layer's prefix, in the order of alignment. Tensors that the family does not
            describe come last, by their names.
        specs: Role -> description, where there is one.
        missing: The first required tensor that is not there; None if all are.
        clash: A tensor that has the name of a role; None if there is none.
    """

    kind: str
    names: Mapping[str, str]
    specs: Mapping[str, TensorSpec]
    missing: TensorSpec | None = None
    clash: str | None = None


def families() -> Mapping[str, Family]:
    """Every described family, by file name."""
    return cast(Mapping[str, Family], plugins("deus_merge.models.families", "FAMILY"))
