"""The wheel holds the whole tree and nothing else, built from a clean copy so that no old metadata can help."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("globalopt", "allocators", "solvers", "reports")
BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    copy = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    build = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    return zipfile.ZipFile(copy / "dist" / build.stdout.splitlines()[-1])


def contents(wheel: zipfile.ZipFile) -> tuple[set[str], dict[str, str]]:
    """Names of the installed files, and the metadata files by name without their folder."""
    names = wheel.namelist()
    metadata = [name for name in names if ".dist-info/" in name]
    texts = {name.partition(".dist-info/")[2]: wheel.read(name).decode() for name in metadata}
    return set(names) - set(metadata), texts


def test_the_wheel_holds_every_file_of_the_tree(wheel):
    tree = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    installed, _ = contents(wheel)
    assert installed == tree
    assert "globalopt/reference/model/model.safetensors" in installed
    assert "globalopt/reference/text/LICENSE.md" in installed


def test_the_wheel_has_its_licences_and_its_command(wheel):
    _, metadata = contents(wheel)
    assert metadata["entry_points.txt"].split("\n")[:2] == ["[console_scripts]", "globalopt = globalopt.__main__:main"]
    assert "Apache License" in metadata["licenses/LICENSE"]
    assert "License-Expression: Apache-2.0" in metadata["METADATA"]
    assert set(metadata["top_level.txt"].split()) == set(FOLDERS)
