"""Run the command line in this process, and look at what it left behind."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
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


def results(folder: Path) -> dict[str, bytes]:
    """What must not depend on how a run came about: the budget, and the saved model."""
    found = contents(folder)
    return {name: found[name] for name in found if name == "budget.json" or name.startswith("model/")}


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
