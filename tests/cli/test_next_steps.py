"""The commands that a run suggests can be pasted, whatever the folder's name is."""

from __future__ import annotations

import shlex

import pytest
from huggingface_hub.utils import validate_repo_id

from deus_merge.report.page.next_steps import repository_name


def commands(err: str) -> dict[str, list[str]]:
    lines = err.split("next:\n")[1].splitlines()
    return {line.split()[0]: shlex.split(line)[1:] for line in lines}


@pytest.mark.parametrize("name", ["deeper", "it's ./ my $HOME model; ls", "-rf"])
def test_commands_can_be_pasted(run, tiny, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    name = name.replace("/", "_")
    found = commands(run("upscale", tiny, *(["--", name] if name[0] == "-" else [name])).err)
    assert list(found) == ["verify", "report", "train", "upload"]
    for step in ("verify", "report", "train"):
        assert found[step][0] == "deus-merge"
        run(*found[step][1:])
    assert (tmp_path / name / "report.html").exists()
    program, verb, repository, folder = found["upload"]
    assert (program, verb) == ("hf", "upload") and (tmp_path / folder).samefile(tmp_path / name)
    validate_repo_id(repository)


def test_who_has_what_next(run, tiny, tmp_path):
    assert "next:" not in run("upscale", tiny, tmp_path / "one", "--quiet").err
    assert "next:" not in run("upscale", tiny, tmp_path / "two", "--json").err
    assert "next:" not in run("upscale", tiny, tmp_path / "three", "--dry-run").err
    assert list(commands(run("strip", tmp_path / "one", tmp_path / "base").err)) == ["upload"]  # it has no manifest
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {tiny}}}]\n")
    assert list(commands(run("merge", recipe, tmp_path / "copy").err)) == ["verify", "report", "upload"]


@pytest.mark.parametrize("name", ["a--b", "a..b", ".hidden", "x" * 200, "größe", "…", "a.git", "-a-"])
def test_names_on_the_hub(name):
    validate_repo_id(repository_name(name))
