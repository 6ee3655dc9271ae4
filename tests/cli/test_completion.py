"""Completion by click's protocol, as a shell calls it, in a real bash, and its installation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import make_model

import deus_merge
from deus_merge.cli.main import run_command
from deus_merge.recipe.catalog import catalog
from deus_merge.recipe.presets import PRESETS
from deus_merge.recipe.shipped import recipe_names


@pytest.fixture
def completed(monkeypatch, tmp_path, capsys):
    """The values for a command line that ends with what was typed so far: (type, value) pairs."""
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> list[tuple[str, str]]:
        words = line.split(" ")
        monkeypatch.setenv("_DEUS_MERGE_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_command([])
        told = capsys.readouterr()
        assert end.value.code == 0 and not told.err
        return [tuple(row.split(",", 1)) for row in told.out.splitlines() if row]

    return call


def words(found: list[tuple[str, str]]) -> list[str]:
    assert all(kind == "plain" for kind, _ in found)
    return [value for _, value in found]


def test_commands_and_options(completed):
    assert words(completed("deus-merge me")) == ["merge", "methods"]
    assert {"env", "completion", "upscale", "finish"} <= set(words(completed("deus-merge ")))
    assert "--preset" in words(completed("deus-merge upscale --pre"))
    assert words(completed("deus-merge --vers")) == ["--version"]
    hidden = completed("deus-merge upscale --allow-crimes --allow-cr")  # mergekit's; its note is not for now
    assert hidden == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("upscale base out --preset ", list(PRESETS)),
        ("upscale base out --preset l", ["llama_pro", "lesa"]),
        ("demo --preset so", ["solar"]),
        ("upscale base out --insert t", ["top_half"]),
        ("upscale base out --dtype b", ["bfloat16"]),
        ("upscale base out --optimizer m", ["muon"]),
        ("merge opt_deus out --device c", ["cpu", "cuda"]),
        ("compare base --init r", ["random_zero"]),
        ("compare base --init average", ["average", "average_zero"]),
        ("compare base --optimizer ", ["adamw", "muon"]),
        ("calibrate a b --method ", ["kfac", "ridge"]),
        ("export-training out --for a", ["axolotl"]),
        ("methods ", list(dict.fromkeys(name for kind in catalog().values() for name in kind))),
        ("methods ot", ["ot_fuse"]),
        ("merge ", recipe_names()),
        ("plan ti", ["ties"]),
        ("recipes tr", ["training/pretrain.py", "training/sft.py", "training/shared.py"]),
        ("completion f", ["fish"]),
    ],
)
def test_values(completed, line, expected):
    assert words(completed(f"deus-merge {line}")) == expected


def test_models_are_folders_and_gguf_files(completed, tmp_path):
    make_model(tmp_path / "models/base", layers=1)
    for file in ("models/notes.txt", "models/small.gguf"):
        (tmp_path / file).write_text("")
    for line in ("upscale ", "inspect mod", "compare models/", "merge opt_deus out --model models/ba"):
        typed = line.split(" ")[-1]
        assert completed(f"deus-merge {line}") == [("dir", typed)]  # the shell lists folders that begin so
    assert completed("deus-merge inspect models/sm") == [("plain", "models/small.gguf")]


def test_recipes_are_files_and_names(completed, tmp_path):
    (tmp_path / "own").mkdir()
    for file in ("stable.yml", "start.yaml", "own/first.yml", "own/other.txt"):
        (tmp_path / file).write_text("")
    assert words(completed("deus-merge merge sta")) == ["stable.yml", "start.yaml", "stack"]
    assert words(completed("deus-merge plan own/")) == ["own/first.yml"]
    assert completed("deus-merge plan ow") == [("file", "ow")]


def test_in_bash(tmp_path, tiny):
    """The script that `completion bash` prints, sourced by a bash that then completes a line."""
    root = Path(deus_merge.__file__).parents[1]
    program = tmp_path / "bin/deus-merge"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={root} exec {sys.executable} -m deus_merge "$@"\n')
    program.chmod(0o755)
    script = """
eval "$(deus-merge completion bash)"
complete -p deus-merge
COMP_WORDS=(deus-merge upscale base out --preset op) COMP_CWORD=5
_deus_merge_completion deus-merge
printf '%s\\n' "${COMPREPLY[@]}"
"""
    env = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "--norc", "-c", script], env=env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert "-F _deus_merge_completion deus-merge" in lines[0], done.stderr
    assert lines[1:] == [name for name in PRESETS if name.startswith("op")]


@pytest.mark.parametrize(
    ("shell", "script", "start"),
    [
        ("bash", ".local/share/deus-merge/completion.bash", ".bashrc"),
        ("zsh", ".local/share/deus-merge/completion.zsh", ".zshrc"),
        ("fish", ".config/fish/completions/deus-merge.fish", None),
    ],
)
def test_installed_by_one_command_and_once(run, tmp_path, monkeypatch, shell, script, start):
    for variable in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    if start:
        (tmp_path / start).write_text("alias l=ls")  # no end of line
    for _ in range(2):
        told = run("completion", "--install").err
        assert f"written: {tmp_path / script}\n" in told and "new shell" in told
    assert (tmp_path / script).read_text() == run("completion").out == run("completion", shell).out
    assert "_DEUS_MERGE_COMPLETE" in (tmp_path / script).read_text()
    if start:
        assert (tmp_path / start).read_text() == f"alias l=ls\nsource {tmp_path / script}\n"
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {script, *([start] if start else [])}


def test_what_cannot_be_installed(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    told = run("completion", expect=2).err
    assert "expected: bash | zsh | fish" in told and "got:      tcsh" in told and "completion bash --install" in told
    monkeypatch.delenv("SHELL")
    assert "got:      nothing" in run("completion", "--install", expect=2).err
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    told = run("completion", "bash", "--install", expect=2).err
    assert "cannot be written" in told and "got:      Not a directory" in told
