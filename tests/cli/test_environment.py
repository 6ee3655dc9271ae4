"""`deus-merge env`: what a bug report needs, and nothing that is private."""

from __future__ import annotations

import getpass
import os
import platform
import socket
from importlib import metadata
from pathlib import Path

import torch

import deus_merge
from deus_merge.run.device import _no_device

ROOT = Path(__file__).parents[2]


def test_facts(run):
    facts = run("env", "--json").json()
    assert facts["deus_merge"] == deus_merge.__version__
    assert facts["python"].split() == [platform.python_implementation(), platform.python_version()]
    assert facts["packages"]["torch"] == metadata.version("torch") and None not in facts["packages"].values()
    assert facts["instruction_set"].split()[0] == torch.backends.cpu.get_cpu_capability()
    assert facts["threads"] == torch.get_num_threads()
    assert 0 < facts["memory"]["available_bytes"] <= facts["memory"]["total_with_swap_bytes"]
    assert len(facts["devices"]) == torch.cuda.device_count()
    needed = {
        line.split(">")[0].strip('", ').replace("pyyaml", "PyYAML").replace("jinja2", "Jinja2")
        for line in (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("]")[0].splitlines()
    }
    assert needed - {""} <= facts["packages"].keys()  # fmt: skip


def test_the_table_has_the_facts(run):
    facts, lines = run("env", "--json").json(), run("env").out.splitlines()
    found = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in lines}
    assert found["torch"] == facts["packages"]["torch"] and found["platform"] == facts["platform"]
    assert "None" not in run("env").out and facts["instruction_set"].split()[0] in found["instruction set"]


def test_nothing_private(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "secret-place"))
    monkeypatch.setenv("HF_ENDPOINT", "https://user:secret-word@hub.secret-company.example")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("OMP_NUM_THREADS", "secret-number")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for text in (run("env").out, run("env", "--json").out):
        assert "secret" not in text and "0,1" in text and "(set)" in text
        private = {socket.gethostname(), str(Path.home()), str(Path.cwd()), os.path.dirname(deus_merge.__file__)}
        if len(getpass.getuser()) > 4:
            private.add(getpass.getuser())
        assert not [name for name in private if len(name) > 3 and name in text]


def test_issue_forms_ask_for_it():
    for form in ("bug.yml", "family.yml"):
        assert "deus-merge env" in (ROOT / ".github/ISSUE_TEMPLATE" / form).read_text()


def test_a_missing_device_is_named_with_those_that_exist():
    text = str(_no_device("cuda:4", 2))
    assert "no such CUDA device" in text and "expected: cpu, or cuda:0 to cuda:1" in text and "got:      cuda:4" in text
    assert "expected: cpu, or cuda:0\n" in str(_no_device("cuda:1", 1))
    text = str(_no_device("cuda", 0))
    assert "expected: auto or cpu" in text and "torch is built " in text
