"""What can be done with the layers of a described family, read off its description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .family import Case, Family, Sublayer
from .spec import RESIDUAL, TensorSpec

#: the steps of ``alignment: symmetry`` and what each moves
STEPS: Mapping[str, str] = {
    "experts": "experts permuted",
    "neurons": "neurons permuted",
    "heads": "heads permuted",
    "values": "values turned",
    "rotary": "queries and keys turned",
}
_ATTENTION = {"query_heads", "key_heads", "value_heads"}


@dataclass(frozen=True)
class Abilities:
    """What can be done with the layers of a family.

    Attributes:
        kinds: The kinds of each part of a layer: ``attention or mamba``, ``mlp``.
        identity: The reason why no new layer can start as the identity; None where it can.
        aligned: The kinds of parts that are aligned and fused.
        copied: The kinds of parts that a new layer takes from one parent, since nothing is known about their axes.
        steps: The steps of ``alignment: symmetry`` that its layers have.
        without: Steps that would change the function -> the reason.
        cases: A condition on config.json -> what is not possible then, and why.
    """

    kinds: tuple[str, ...]
    identity: str | None
    aligned: tuple[str, ...]
    copied: tuple[str, ...]
    steps: tuple[str, ...]
    without: Mapping[str, str]
    cases: Mapping[str, str]


def abilities(family: Family) -> Abilities:
    """What can be done with the layers of a family."""
    sublayers = [kind for kinds in family.sublayers for kind in kinds if kind.tensors]
    aligned = [s for s in sublayers if any(part.in_space and not part.opaque for part in parts(s))]
    spaces = {
        space for s in aligned for part in parts(s) if not part.opaque for space in (part.in_space, part.out_space)
    }
    has = {
        "experts": "experts" in spaces,
        "neurons": any(space and space.startswith("neurons") for space in spaces),
        "heads": spaces >= _ATTENTION,
        "values": spaces >= _ATTENTION,
        "rotary": spaces >= _ATTENTION and family.rotary != "none",
    }
    return Abilities(
        tuple(kinds for kinds in map(_kinds, family.sublayers) if kinds),
        family.no_identity,
        tuple(dict.fromkeys(s.kind for s in aligned)),
        tuple(dict.fromkeys(s.kind for s in sublayers if s not in aligned)),
        tuple(step for step in STEPS if has[step] and step not in family.without),
        {step: reason for step, reason in family.without.items() if has.get(step, True) or step == "rotary"},
        {f"{case.key}: {str(case.when).lower()}": _told(case) for case in family.cases},
    )


def _told(case: Case) -> str:
    told = [f"no zeros: {case.no_identity}"] if case.no_identity else []
    reasons = dict.fromkeys(case.without.values())
    told += [f"no {', '.join(s for s, r in case.without.items() if r == reason)}: {reason}" for reason in reasons]
    return "; ".join(told)


def _kinds(alternatives: Sequence[Sublayer]) -> str:
    return " or ".join(dict.fromkeys(kind.kind for kind in alternatives if kind.kind))


def parts(sublayer: Sublayer) -> list[TensorSpec]:
    """The matrices and vectors of a sublayer, those that lie in one stored tensor apart; of experts one."""
    found = []
    for spec in sublayer.tensors:
        found += spec.layout.specs((1, 1, 1)) if spec.layout else [spec]
    return found


def writers(family: Family) -> tuple[str, ...]:
    """The roles that write to the residual stream, in layers of any kind."""
    return tuple(dict.fromkeys(s.group for s in family.tensors if s.out_space == RESIDUAL and s.writes_residual))
