"""A new solver with an option of its own is one new file: recipes, limits, `deus-merge methods` and the API know it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, fields

import pytest
import torch
from support import make_model, weights, write_recipe

from deus_merge.align.memory import alignment_memory
from deus_merge.align.parameters import PARAMETERS, align_options
from deus_merge.core.errors import SolverError
from deus_merge.core.tensors import StoredTensor
from deus_merge.methods.registry import methods
from deus_merge.models.spec import RESIDUAL, Heads, TensorSpec
from deus_merge.ot.registry import solver, solver_parameters, solvers

SOLVER = '''
"""Every column takes its mass from the same few rows: of no use but for this test."""

from dataclasses import dataclass
import time

import torch

from deus_merge.core.parameters import block_parameter
from deus_merge.ot.coupling import Coupling
from deus_merge.ot.problem import DEFAULT_OPTIONS, OTSolution
from deus_merge.ot.solver import OTSolver


@dataclass(frozen=True)
class FirstRows(OTSolver):
    first_rows: int = 2

    name = "first"
    summary = "the first rows"
    reference = "a test"
    parameters = (block_parameter("first_rows", "integer", 2, "rows that solver first uses", minimum=1),)

    def solve(self, problem, options=DEFAULT_OPTIONS):
        plan = torch.zeros(problem.cost.shape)
        plan[: self.first_rows] = 1 / (self.first_rows * plan.shape[1])
        return OTSolution.of(problem, Coupling(plan), options, started=time.perf_counter())


SOLVER = FirstRows()
'''

PROGRAM = """
import contextlib, io, json, sys
import deus_merge.ot.solvers as folder
folder.__path__.append(sys.argv[1])  # as if the file were in it
from deus_merge.cli import main
results = []
for arguments in json.loads(sys.argv[2]):
    said, sys.argv = io.StringIO(), ["deus-merge", *arguments]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main()
        except SystemExit as exit:
            code = exit.code
    results.append([code or 0, said.getvalue()])
print(json.dumps(results))
"""


def test_a_new_solver_with_an_option_is_one_file(tmp_path):
    (tmp_path / "solvers").mkdir()
    (tmp_path / "solvers/first.py").write_text(SOLVER)
    base = make_model(tmp_path / "base", layers=2)
    text = (
        "base_model: {base}\nupscale: {{insert: all, parameters: {{alignment: transport_flow, solver: first,"
        " restore_norm: none, t: 0, {more}}}}}\n"
    )
    commands = [["methods", "--json"]]
    for name, more in (("default", "layers_per_gap: 1"), ("five", "first_rows: 5"), ("none", "first_rows: 0")):
        recipe = write_recipe(tmp_path / f"{name}.yml", text.format(base=base, more=more))
        commands.append(["merge", str(recipe), str(tmp_path / name)])
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "solvers"), json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [code for code, _ in said] == [0, 0, 0, 2], said

    listed = json.loads(said[0][1])
    assert listed["solvers"]["first"]["summary"] == "the first rows"
    named = {p["name"]: p for p in listed["methods"]["ot_fuse"]["parameters"]}
    assert named["first_rows"]["help"] == "rows that solver first uses" and "first" in named["solver"]["values"]
    for name, rows in (("default", 2), ("five", 5)):
        new = weights(tmp_path / name)["model.layers.1.mlp.gate_proj.weight"].double()
        flow = new.new_zeros(new.shape[1], new.shape[1])  # the plan of o
        flow[:rows] = 1 / rows
        # every row is the mean of A's first rows
        want = (weights(base)["model.layers.0.mlp.gate_proj.weight"].double() @ flow)[:rows].mean(0)
        assert torch.allclose(new, want.expand_as(new), atol=1e-5)
    assert "first_rows" in said[3][1] and "a whole number of at least 1" in said[3][1]


def test_solver_options_are_fields_of_their_solver():
    """Every parameter is a field with the same default; names are unique among all parameters of a method."""
    for name, one in solvers().items():
        own = {field.name: field.default for field in fields(one)}
        assert own == {p.name: p.default for p in one.parameters}, name
        assert all(p.scope == "block" for p in one.parameters)
    for parameters in (PARAMETERS, methods()["ot_fuse"].parameters):
        names = [p.name for p in parameters]
        assert len(set(names)) == len(names)
        assert {p.name for p in solver_parameters()} <= set(names)


@dataclass(frozen=True)
class Role:
    role: str
    shape: tuple[int, ...]
    spec: TensorSpec
    heads: Heads | None = None
    inputs: tuple[StoredTensor, ...] = ()


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
@pytest.mark.parametrize("alignment", ["symmetry", "transport_flow"])
def test_a_solver_that_stores_the_cost_needs_that_memory_at_least(alignment, compute_dtype):
    """One cost in the dtype of the arithmetic, and cost and plan of POT in float64."""
    values = {p.name: p.default for p in PARAMETERS} | {"alignment": alignment, "compute_dtype": compute_dtype}
    spaces = {"gate": (RESIDUAL, "neurons"), "down": ("neurons", RESIDUAL)}
    shapes = {"gate": (1000, 10), "down": (10, 1000)}
    roles = [Role(role, shapes[role], TensorSpec(role, role, *spaces[role])) for role in spaces]
    small, large = (alignment_memory(values | {"solver": name}, roles).minimum for name in ("auto", "emd"))
    entry = {"float32": 4, "float64": 8}[compute_dtype] + 16
    assert entry * 1000**2 <= large <= entry * 1000**2 + small


def test_options_of_a_recipe_reach_their_solver_and_no_other():
    values = {p.name: p.default for p in PARAMETERS} | {"progot_steps": 3, "marginal_penalty": 0.25, "tolerance": 0.5}
    for name, want in (("progot", ("progot_steps", 3)), ("unbalanced", ("marginal_penalty", 0.25))):
        options = align_options(values | {"solver": name}, None, 77)
        assert getattr(options.chosen_solver, want[0]) == want[1]
        assert (options.solver_options.tolerance, options.solver_options.memory) == (0.5, 77)
    for alignment, name in (("symmetry", "assignment"), ("transport_flow", "sinkhorn"), ("none", "sinkhorn")):
        chosen = align_options(values | {"alignment": alignment, "solver": "auto"}, None, None).chosen_solver
        assert chosen == solver(name)
    with pytest.raises(SolverError, match="unknown solver\n.*\n.*\n.*did you mean 'sinkhorn'"):
        solver("sinkhron")
