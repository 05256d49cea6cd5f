"""Run the command line in this process, and look at what it left behind."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from typer.testing import CliRunner, Result

from globalopt.cli import app

WINDOWS = ("--nsamples", "8", "--seqlen", "16", "--eval-windows", "2")


def run(*arguments: object) -> Result:
    """Run `globalopt` with `arguments`; an exception that the command line did not expect is raised here."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def done(*arguments: object) -> Result:
    """Run a command that must end with exit code 0."""
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def refused(code: int, *arguments: object) -> str:
    """Run a command that must fail with `code`; the one line it says, without "error: "."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("error: ").strip()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def results(folder: Path) -> dict[str, Any]:
    """What must not depend on how a run came about, as values: the budget, and the saved model.

    The model's card names the command, and so the folders of the run.
    """
    found = contents(folder)
    found.pop("model/README.md", None)
    return {name: _value(name, found[name]) for name in found if name == "budget.json" or name.startswith("model/")}


def _value(name: str, body: bytes) -> Any:
    if name.endswith(".safetensors"):
        return load(body)
    return json.loads(body) if name.endswith(".json") else body


def assert_alike(found: Any, expected: Any, place: str = "") -> None:
    """Assert that two results computed apart are the same: all but floats equal, those up to rounding.

    Where memory begins differs from one computation to the next, and some processors sum in another order then.
    """
    assert type(found) is type(expected), place
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_alike(found[key], value, f"{place}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), place
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_alike(one, other, f"{place}/{i}")
    elif isinstance(expected, torch.Tensor):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), place
        distance = torch.linalg.vector_norm(found.double() - expected.double())
        assert distance <= 1e-3 * torch.linalg.vector_norm(expected.double()), place
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6), place
    else:
        assert found == expected, place


def interrupt(patch: pytest.MonkeyPatch, owner: Any, what: Any, at: int) -> None:
    """Interrupt the `at`-th call of a function of `owner` by name, or the `at`-th writing of a row of artefacts."""
    calls = itertools.count(1)
    name = what if isinstance(what, str) else "put"
    function = getattr(owner, name)

    def interrupting(*arguments: Any) -> Any:
        if (name == what or what in arguments) and next(calls) == at:
            raise KeyboardInterrupt
        return function(*arguments)

    patch.setattr(owner, name, interrupting)


def no_partial_files(folder: Path) -> bool:
    return not any(path.name.startswith(".") for path in folder.rglob("*"))


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_text(path: Path, words: int = 900) -> Path:
    """A text of simple words; a character is a token of the tiny tokenizer."""
    vocabulary = ["the", "cat", "sat", "on", "a", "mat", "and", "one", "dog", "ran", "far", "from", "home"]
    chosen = random.Random(0).choices(vocabulary, k=words)
    path.write_text(" ".join(chosen), encoding="utf-8")
    return path
