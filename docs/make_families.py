"""Writes families.md from the descriptions of families; a test checks that it is up to date.

Run: python docs/make_families.py
"""

from __future__ import annotations

from pathlib import Path

from deus_merge.models.abilities import STEPS, abilities
from deus_merge.models.family import families

PAGE = Path(__file__).with_name("families.md")
_HEAD = """# Model families

Written by `python docs/make_families.py` from the files in `deus_merge/models/families/`. `deus-merge methods FAMILY`
says the same of one family, with the roles of its tensors; `deus-merge inspect MODEL` says of what kind each layer of a
model is.

- **zeros** A new layer can start as the identity: all presets with zero outputs work (`opt_deus`, `llama_pro`, ...).
- **fused** Parts of a layer that `ot_fuse` aligns and fuses, by `symmetry` and by `transport_flow`; other parts are
  taken from one parent.
- **symmetry** What `alignment: symmetry` moves: {steps}. A step that would change the function of a family's layers is
  left out.

Text parts of vision-language models are covered by the family of their `text_config`. A family that is not in the table
can be merged tensor by tensor, and new layers can be copies (`llama_pro`, `copy_next`) where transformers builds the
model and the tensors that write to the residual stream can be found and proved on a small instance; everything else is
refused with the reason. Layers change places only where the kinds of layers in `config.json` can go along.

| family | model types | parts of a layer | zeros | fused | symmetry |
|---|---|---|---|---|---|
"""


def render() -> str:
    """The page."""
    steps = ", ".join(f"{name} ({what})" for name, what in STEPS.items())
    rows = []
    for name, family in families().items():
        found = abilities(family)
        left_out = [f"no {step}\\*" for step in found.without]
        cells = [
            name,
            " ".join(f"`{kind}`" for kind in family.model_types),
            "; ".join(found.kinds),
            f"no: {found.identity}" if found.identity else "yes",
            ", ".join(found.aligned) or "-",
            ", ".join([*found.steps, *left_out]) or "-",
        ]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, family in families().items():
        for without in abilities(family).without.items():
            reasons.setdefault(without, []).append(name)
    notes = [f"\\* no {step} in {', '.join(names)}: {reason}." for (step, reason), names in reasons.items()]
    notes += [
        f"{name}, with `{condition}` in its config: {what}." for name, family in families().items()
        for condition, what in abilities(family).cases.items()
    ]  # fmt: skip
    return _HEAD.format(steps=steps) + "\n".join(rows) + "\n\n" + "\n\n".join(notes) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
