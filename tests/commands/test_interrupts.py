"""Ctrl-C ends the program with 130 and one line, whenever it comes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from globalopt.commands.interrupts import INTERRUPTED, MESSAGE

BREAK = """import os, signal, sys
class Break:
    def find_spec(self, asked, path=None, target=None):
        if asked == {name!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Break())
"""
COMMAND = "sys.argv = ['globalopt', 'list', 'solvers']\nfrom globalopt.__main__ import main\nmain()\n"
HALF_IMPORTED = """from globalopt.commands.interrupts import caught, handle_interrupts
handle_interrupts()
with caught():
    try:
        import json.tool
    except KeyboardInterrupt:
        raise AttributeError('half imported') from None
"""

TWICE = """import signal
from globalopt.commands.interrupts import caught, handle_interrupts
handle_interrupts()
try:
    with caught():
        signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print('caught', flush=True)
signal.raise_signal(signal.SIGINT)
"""


@pytest.mark.parametrize(
    "code",
    [
        BREAK.format(name="typer") + COMMAND,
        BREAK.format(name="rich.console") + COMMAND,
        BREAK.format(name="json.tool") + HALF_IMPORTED,
    ],
    ids=["while the program starts", "before the commands are there", "while a command imports"],
)
def test_ctrl_c_while_modules_are_imported(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (INTERRUPTED, MESSAGE + "\n")


def test_within_a_command_it_is_an_exception_that_the_command_catches():
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "caught\n", MESSAGE + "\n")
