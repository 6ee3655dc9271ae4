"""The wheel and the sdist have the recipes, and a package from the wheel finds them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """What a build needs, copied, since a build writes beside its sources."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("deus_merge", "recipes", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(sources: Path, what: str, out: Path) -> Path:
    """Build offline, with the setuptools of this environment."""
    if what == "wheel":
        options = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
        command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(out), str(sources)]
    else:
        command = [sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"]
    out.mkdir()
    done = subprocess.run(command, cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = out.iterdir()
    return file


@pytest.mark.slow
def test_a_wheel_has_the_recipes_and_finds_them(sources, tmp_path):
    wheel = build(sources, "wheel", tmp_path / "wheel")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
        record = next(archive.read(name).decode() for name in names if name.endswith("/RECORD"))
    inside = {name.removeprefix("deus_merge/") for name in names if name.startswith("deus_merge/recipes/")}
    assert inside == {name for name in FILES if name.endswith((".yml", ".py"))}
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"deus_merge"}
    assert all(f"deus_merge/{name}," in record for name in inside)
    script = "from deus_merge.cli import main; main()"
    for arguments, expected in ((["recipes", "--json"], None), (["recipes", "solar"], "recipes/solar.yml")):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": ""},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        if expected:
            assert done.stdout == (ROOT / expected).read_text(encoding="utf-8")
        else:
            assert {Path(name).stem for name in FILES} == {Path(name).stem for name in json.loads(done.stdout)}


@pytest.mark.slow
def test_a_wheel_from_the_sdist_is_the_same(sources, tmp_path):
    sdist = build(sources, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    names = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert names >= {name for name in FILES if name.endswith((".yml", ".py"))}
    from_sdist = build(unpacked, "wheel", tmp_path / "from_sdist")
    direct = build(sources, "wheel", tmp_path / "direct")
    with zipfile.ZipFile(from_sdist) as one, zipfile.ZipFile(direct) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


def test_no_file_of_the_folder_is_left_out():
    """Without a build: the patterns of the build step are those files."""
    from_step = {}
    source = (ROOT / "docs/wheel.py").read_text(encoding="utf-8")
    exec(next(line for line in source.splitlines() if line.startswith("RECIPES =")), from_step)
    found = {path.relative_to(ROOT).as_posix() for pattern in from_step["RECIPES"] for path in ROOT.glob(pattern)}
    assert found == {name for name in FILES if "__pycache__" not in name}
