from __future__ import annotations

import importlib
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from globalopt.pipeline import doctor
from globalopt.pipeline.health import NEEDED_DTYPES, Device, Disk, Health, Product
from tests.command import done, run

FAILED = 1
PYPROJECT = tomllib.loads((Path(__file__).parent.parent.parent / "pyproject.toml").read_text())["project"]


def bare(requirement: str) -> str:
    return re.split(r"[<>=\[]", requirement)[0]


@pytest.fixture(scope="module")
def health() -> Health:
    return doctor.examine()


def test_it_looks_at_every_package_that_is_asked_for():
    assert list(doctor.REQUIRED) == [bare(line) for line in PYPROJECT["dependencies"]]
    extras = {name: lines for name, lines in PYPROJECT["optional-dependencies"].items() if name != "test"}
    assert set(doctor.OPTIONAL) == {bare(line) for lines in extras.values() for line in lines}


def test_everything_works_here(health):
    assert health.broken == ()
    assert {part.name for part in health.required if part.version} == set(doctor.REQUIRED)
    assert health.devices[0].name == "cpu"
    assert {p.dtype for p in health.devices[0].products} == set(doctor.DTYPES)
    assert all(p.problem is None for p in health.devices[0].products if p.dtype in NEEDED_DTYPES)
    assert 0 < health.memory_free <= health.memory_total <= psutil.virtual_memory().total
    assert all(disk.free is not None and disk.free > 0 for disk in health.disks)
    assert [check.name for check in health.checks] == ["factorisations", "the bundled model"]


def test_the_command_prints_it(health, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: health)
    shown = done("doctor").stdout
    assert "Everything that is required works." in shown
    assert torch.__version__ in shown
    assert max(map(len, shown.splitlines())) <= 80
    found = json.loads(done("doctor", "--json").stdout)
    assert found["broken"] == []
    assert found["devices"][0]["products"][0]["dtype"] == "float32"


def test_a_broken_required_part_fails_and_is_named(health, monkeypatch):
    real = importlib.import_module

    def broken(name: str, *rest: object):
        if name in ("scipy", "peft"):
            raise ImportError(f"lib{name}.so.6: cannot open shared object file\nmore")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    monkeypatch.setattr(doctor, "_devices", lambda total, free: health.devices)
    monkeypatch.setattr(doctor, "_run_reference", lambda: None)
    made = run("doctor")
    assert made.exit_code == FAILED
    assert "broken: scipy: cannot be imported: libscipy.so.6: cannot open shared object file\n" in made.stdout
    assert "Everything that is required works" not in made.stdout
    # An optional part is no reason to fail.
    assert not any(line.startswith("peft") for line in doctor.examine().broken)
    assert json.loads(run("doctor", "--json").stdout)["broken"] == [
        "scipy: cannot be imported: libscipy.so.6: cannot open shared object file"
    ]


def test_without_torch_the_rest_is_still_said(monkeypatch):
    real = importlib.import_module

    def broken(name: str, *rest: object):
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open shared object file")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    made = run("doctor")
    assert made.exit_code == FAILED
    assert "broken: torch: cannot be imported: libcudart.so.13" in made.stdout
    assert "disk, runs" in made.stdout


def test_a_check_that_raises_is_a_finding(monkeypatch):
    def fails() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(doctor, "_run_reference", fails)
    assert "the bundled model: ZeroDivisionError" in doctor.examine().broken


def test_versions_are_held_against_what_is_asked_for(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.0.1")
    assert doctor._part("scipy", "scipy").problem == "0.0.1 is installed, >=1.14 is needed"


def test_a_dtype_that_computes_wrongly_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "TOLERANCES", dict.fromkeys(doctor.DTYPES, 0.0))
    assert str(doctor._product("cpu", "float32").problem).startswith("wrong by ")
    assert doctor._product("nowhere", "float32").problem


def test_advice(health):
    products = (Product("float32", 0.001, None), Product("bfloat16", 0.05, None), Product("float64", 0.002, None))
    slow = replace(
        health,
        devices=(Device("cpu", "", 1, 1, products),),
        threads=16,
        cores=4,
        disks=(Disk("runs", "/data", 2**40, 2**30, None), Disk("downloads", "/cache", 1, 1, "cannot be written to")),
    )
    said = " ".join(slow.advice)
    assert "16 threads on 4 cores; set OMP_NUM_THREADS=4" in said
    assert "bfloat16 takes 50 times as long as float32" in said
    assert "No accelerator" in said
    assert "/data (runs) has 1.0 GiB left." in said
    assert "/cache (downloads): cannot be written to." in said
    wrong = replace(health, devices=(Device("cpu", "", 1, 1, (Product("float64", None, "wrong by 1"),)),))
    assert wrong.broken == ("float64 on the CPU: wrong by 1",)


def test_a_folder_that_does_not_exist_yet_is_measured_where_it_will_be(tmp_path):
    assert doctor._disk("downloads", tmp_path / "a" / "b").free == doctor._disk("downloads", tmp_path).free
