"""Make environments for programs of others, and run Python in them.

Every program has an environment of its own, ENVIRONMENTS/NAME, made with pip; torch is pinned by constraints.txt.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from globalopt.errors import UsageError
from globalopt.runs.files import read_json

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
HERE = "globalopt"
"""The environment that runs the benchmark."""


def python_of(name: str, environments: Path) -> Path:
    """Return the interpreter of an environment, whether it was made or not."""
    return Path(sys.executable) if name == HERE else environments / name / "bin" / "python"


def install(name: str, environments: Path, packages: Sequence[str], without: Sequence[str] = ()) -> None:
    """Make an environment with packages, and remove those of their requirements that are named in `without`."""
    venv.create(environments / name, with_pip=True)
    pip = [str(python_of(name, environments)), "-m", "pip"]
    steps = [[*pip, "install", "-q", "-c", str(CONSTRAINTS), *packages]]
    steps += [[*pip, "uninstall", "-q", "-y", *without]] if without else []
    for step in steps:
        done = subprocess.run(step, check=False, capture_output=True, text=True)
        if done.returncode:
            raise UsageError(
                f"The environment {environments / name} cannot be made ({last_line(done.stderr)}). Delete it and try "
                "again."
            )


@dataclass(frozen=True)
class Cost:
    """Hold what a process took: CPU seconds (user and system), wall seconds and peak resident bytes."""

    cpu: float
    wall: float
    peak: int


def run_python(
    name: str, environments: Path, words: Sequence[object], variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the Python of an environment with `words`, and capture what it says.

    Args:
        variables: of the environment, beside those of this process.
    """
    command = [str(word) for word in (python_of(name, environments), *words)]
    return _run(command, name, variables)


def measure_python(
    name: str,
    environments: Path,
    words: Sequence[object],
    variables: Mapping[str, str],
    out: Path,
) -> tuple[subprocess.CompletedProcess[str], Cost]:
    """Run the Python of an environment as `run_python` does, and measure it from outside.

    Args:
        out: file for the costs.
    Returns:
        What it said, and what it took.
    """
    measuring = [sys.executable, "-IS", Path(__file__).with_name("measured.py"), out]
    command = [str(word) for word in (*measuring, python_of(name, environments), *words)]
    out.unlink(missing_ok=True)
    done = _run(command, name, variables)
    return done, Cost(**read_json(out))


def _run(command: Sequence[str], name: str, variables: Mapping[str, str] | None) -> subprocess.CompletedProcess[str]:
    """Run a command in the variables of an environment."""
    # No program may look a name up on the hub.
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    if name != HERE:
        env.pop("PYTHONPATH", None)
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**env, **(variables or {})})


def last_line(said: str) -> str:
    """Return the last line of what a program said, which names the error."""
    return (said.strip().splitlines() or ["no message"])[-1]
