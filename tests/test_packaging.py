"""What is built for others: all that the package reads is in it, and it runs from anywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_repository import PACKAGE, ROOT, tracked_files

import rsllm

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
BUILD = "import sys; from setuptools import build_meta as b; b.build_{}(sys.argv[1])"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of a copy of what is tracked."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for path in tracked_files():
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for kind in ("wheel", "sdist"):
        command = [sys.executable, "-c", BUILD.format(kind), str(target)]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return target


def test_wheel_and_sdist_hold_what_the_package_reads(built: Path) -> None:
    files = [path for path in tracked_files() if PACKAGE in path.parents]
    needed = {path.relative_to(ROOT).as_posix() for path in files if path.name != "README.md"}
    assert {Path(file).suffix for file in needed} >= {".py", ".toml", ".jinja", ".css", ".typed"}
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        entry = archive.read(f"rsllm-{rsllm.__version__}.dist-info/entry_points.txt").decode()
    assert needed - held == set()
    assert "rsllm = rsllm.cli:main" in entry
    assert not [file for file in held if file.startswith(("tests/", "experiments/"))]
    with tarfile.open(sdist) as tar:
        below = {name.partition("/")[2] for name in tar.getnames()}
    assert needed - below == set()
    assert {"README.md", "LICENSE", "pyproject.toml"} <= below


def test_the_wheel_runs_in_an_empty_folder(built: Path, tmp_path: Path) -> None:
    place, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            archive.extract(member, place)  # of our own making

    def answer(*words: str) -> str:
        code = f"import sys, rsllm.cli as c; print(c.__file__); sys.exit(c.main({list(words)}))"
        command, own = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(place)}
        done = subprocess.run(command, cwd=empty, env=own, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        where, _, said = done.stdout.partition("\n")
        assert where == str(place / "rsllm" / "cli.py")
        return said

    assert "recommend" in answer("--help")
    paths = {one["path"] for one in json.loads(answer("settings", "data.table", "--json"))}
    assert "data.table.user" in paths
    assert list(empty.iterdir()) == []


def test_how_to_cite_names_this_version_and_licence() -> None:
    facts = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert facts["version"] == rsllm.__version__
    assert facts["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= facts.keys()


def test_constraints_name_a_version_of_every_dependency_that_it_allows() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in pinned.items()}
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for requirement in map(Requirement, needed):
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} and {version}"
