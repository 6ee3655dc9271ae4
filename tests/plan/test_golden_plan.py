"""What must not change unnoticed: a whole plan, its hash, and the header of a shard. Update: see the assertion."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden" / "plan_opt_deus_tiny.json"


def test_plan_of_the_tiny_model(run, tiny, tmp_path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"base_model: {tiny}\nupscale: {{preset: opt_deus, insert: top_half}}\n")
    planned = run("plan", recipe, "--json").json()
    plan = json.loads(json.dumps(planned).replace(str(tiny), "tiny"))
    run("merge", recipe, tmp_path / "out")
    data = (tmp_path / "out/model.safetensors").read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    plan["header_sha256"] = hashlib.sha256(data[:length]).hexdigest()
    assert plan == json.loads(GOLDEN.read_text()), (
        f"if meant, write this to {GOLDEN.name}: {json.dumps(plan, indent=1)}"
    )
