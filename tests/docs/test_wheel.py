"""The wheel and the sdist have what they should, and what a newcomer installs from the wheel works."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import deus_merge

ROOT = Path(__file__).parents[2]
FILES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """What a build needs, copied, since a build writes beside its sources."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("deus_merge", "recipes", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix != ".log":
            shutil.copy(path, folder)
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
    assert inside == {name for name in FILES if name.endswith((".yml", ".py", ".ipynb"))}
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


@pytest.fixture(scope="module")
def fresh(sources, tmp_path_factory) -> Path:
    """The ``bin`` of an environment in which the wheel is installed, and whose other packages are those of this one."""
    folder = tmp_path_factory.mktemp("fresh")
    wheel = build(sources, "wheel", folder / "wheel")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv/bin/python"
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    Path(site, "main.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(wheel)], check=True)
    return folder / "venv/bin"


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_in_an_empty_folder(fresh, tmp_path):
    environment = {"PATH": str(fresh), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path / "home")}

    def say(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        return done.stdout

    package = Path(say(str(fresh / "python"), "-c", "import deus_merge; print(deus_merge.__file__)").strip()).parent
    assert package.is_relative_to(fresh.parent), "the package of the wheel, not that of the sources"
    out = say(str(fresh / "deus-merge"), "demo", "--tiny")
    assert "6 -> 9 layers" in out and "FAILED" not in out
    said = {line.partition(":")[0].strip(): line.partition(":")[2] for line in out.splitlines()}
    assert said["base"] == said["up-scaled"], "both models continue the sentence in the same way"
    assert (tmp_path / "demo/tiny-opt_deus/report.html").is_file()


@pytest.mark.slow
def test_metadata_and_licences(fresh, tmp_path):
    script = """
import importlib.metadata, json
found = importlib.metadata.distribution("deus-merge")
print(json.dumps({"meta": found.metadata.json, "files": [str(file) for file in found.files]}))
"""
    done = subprocess.run(
        [fresh / "python", "-c", script], cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    meta, files = found["meta"], found["files"]
    assert meta["version"] == deus_merge.__version__ and meta["license_expression"] == "Apache-2.0"
    assert meta["author"] == "deus_merge contributors" and "mergekit" in ",".join(meta["keywords"]).split(",")
    minor = {int(number) for number in re.findall(r":: 3\.(\d+)", "\n".join(meta["classifier"]))}
    workflow = (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")
    tested = {int(number) for number in re.findall(r'"3\.(\d+)"', workflow)}
    assert minor == tested and meta["requires_python"] == f">=3.{min(minor)}"
    assert "deus_merge/py.typed" in files and "deus_merge/models/tiny/TRAINING.md" in files
    licences = {Path(name).name for name in files if "/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


def test_the_notice_names_all_data():
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    package = ROOT / "deus_merge"
    code = {".py", ".pyc", ".typed", ".html"}
    data = {path.parent for path in package.rglob("*") if path.is_file() and path.suffix not in code}
    assert data and all(f"- {folder.relative_to(ROOT).as_posix()}:" in notice for folder in data - {package})


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    released = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert released[0] == "Unreleased" and released[1] == deus_merge.__version__ == citation["version"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and citation["license"] == "Apache-2.0"


def test_forms_and_the_workflow_are_valid():
    """The keys that the forms of issues need, and a workflow that runs the tests as CONTRIBUTING.md says."""
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 4
    for form in (yaml.safe_load(file.read_text(encoding="utf-8")) for file in forms if file.stem != "config"):
        assert form["name"] and form["description"] and form["body"]
        ids = [field["id"] for field in form["body"]]
        assert len(set(ids)) == len(ids)
        assert all(field["type"] in ("input", "textarea") and field["attributes"]["label"] for field in form["body"])
    job = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make test PYTHON=python"]


@pytest.mark.slow
def test_a_wheel_from_the_sdist_is_the_same(sources, tmp_path):
    sdist = build(sources, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    names = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert names >= {name for name in FILES if name.endswith((".yml", ".py", ".ipynb"))}
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").iterdir() if path.is_file()}
    assert names >= pages | {"CHANGELOG.md", "README.md", "LICENSE", "NOTICE", "CONTRIBUTING.md", "deus_merge/py.typed"}
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
