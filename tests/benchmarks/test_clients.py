"""The comparison of clients, and its own programs in this environment, on a tiny run."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.export.runs import made_run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def clients(monkeypatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("clients")
    for name in ("clients", "client_programs"):
        sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore")  # what peft calls is deprecated
def test_exports_are_made_and_missing_clients_are_named(clients, tmp_path, capsys):
    run, text = made_run(tmp_path / "run", kinds=("both", "sparse", "2:4")), tmp_path / "text.txt"
    text.write_text("the cat sat on a mat " * 20)
    words = [str(run), "--environments", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--text", str(text)]
    assert clients.main([*words, "--clients", "peft"]) == 0
    found = {each["check"]: each for each in json.loads((tmp_path / "out" / "clients.json").read_text())}
    assert {name: each["found"] for name, each in found.items()} == {
        "peft adapter": "not installed",
        "peft peft-merged adapter": "not installed",
    }
    assert "not installed" in capsys.readouterr().out
    # Its programs, in this process.
    programs = importlib.import_module("client_programs")
    tokens = np.load(tmp_path / "out" / "tokens.npy")
    expected = programs.transformers(run / "model", tokens, False)
    for name, form in {
        "packed": "packed",
        "packed-again": "packed",
        "peft": "adapter",
        "peft-merged": "adapter",
    }.items():
        found = programs.PROGRAMS[name](tmp_path / "out" / "exports" / form, tokens, False)
        assert clients.judge(form, *clients.compare(found, expected)) == "same"


def test_what_a_client_says_is_judged_by_what_it_is(clients):
    expected = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]]))
    assert clients.judge("dense", *clients.compare(expected + 1e-9, expected)) == "same"
    other = np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.7, 0.1]]))
    assert clients.judge("packed", *clients.compare(other, expected)) == "another model"
    some = np.where(expected > -1, expected, np.nan)
    assert clients.compare(some, expected) == (0.0, None)
    assert clients.judge("dense", *clients.compare(some + 0.1, expected)) == "another model"
    assert clients.judge("dense", *clients.compare(np.full((2, 3), np.nan), expected)) == "same"


def test_a_refusal_is_one_and_a_model_where_none_is_expected_is_wrong(clients, tmp_path):
    tokens, folder = tmp_path / "tokens.npy", tmp_path / "nothing"
    np.save(tokens, np.arange(4))
    check = clients.Check(clients.HERE, "transformers", "dense", clients.NO)
    result = clients.run(check, tmp_path, folder, tokens, np.zeros((4, 8)))
    assert (result.found, result.right) == ("refused", True)
    assert str(folder) in result.said
    assert not clients.Result("x", clients.NO, clients.SAME).right
    assert clients.Result("x", clients.EITHER, clients.SAME).right
    assert not clients.Result("x", clients.EITHER, "another model").right


def test_every_check_is_of_a_client_and_a_program(clients):
    programs = importlib.import_module("client_programs").PROGRAMS
    for check in clients.CHECKS:
        assert check.client in clients.CLIENTS
        assert check.program in programs
    assert len({check.name for check in clients.CHECKS}) == len(clients.CHECKS)
