"""`zero_init` with a list of roles: each takes its bias along, and every other writer keeps its values."""

from __future__ import annotations

import json

import pytest
from support import make_model, weights, write_recipe


@pytest.mark.parametrize(("roles", "zeroed"), [("[o]", {"o"}), ("[down]", {"down"}), ("[o, down]", {"o", "down"})])
@pytest.mark.parametrize("alignment", ["symmetry", "transport_flow", "none"])
def test_a_role_takes_its_bias_along(run, tmp_path, alignment, roles, zeroed):
    base = make_model(tmp_path / "base", "llama_bias", layers=2)
    parameters = f"{{alignment: {alignment}, zero_init: {roles}}}"
    recipe = write_recipe(
        tmp_path / "r.yml", f"base_model: {base}\nupscale: {{insert: all, parameters: {parameters}}}\n"
    )
    run("merge", recipe, tmp_path / "out")
    new = weights(tmp_path / "out")
    actions = json.loads((tmp_path / "out/deus_merge.json").read_text())["tensors"]
    for role, module in (("o", "self_attn.o_proj"), ("down", "mlp.down_proj")):
        for kind in ("weight", "bias"):
            name = f"model.layers.1.{module}.{kind}"
            assert bool((new[name] == 0).all()) == (role in zeroed), name
            assert actions[name]["action"] == ("zeros" if role in zeroed else "compute")
