"""Stand in for processes of `globalopt` that a benchmark starts: the same commands, within the process of the test."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tests.command import run


class InProcess:
    """Has of the module `subprocess` what a benchmark uses of it; only `sys.executable -m globalopt` is run."""

    PIPE, DEVNULL = subprocess.PIPE, subprocess.DEVNULL

    @staticmethod
    def run(words: Sequence[str], stderr: Any = None, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run the command line with these words; what it says goes to `stderr`, what it prints is returned."""
        assert list(words[:3]) == [sys.executable, "-m", "globalopt"], words
        ended = run(*words[3:])
        if stderr is not None:
            stderr.write(ended.stderr)
        return subprocess.CompletedProcess(list(words), ended.exit_code, ended.stdout, ended.stderr)
