"""`python -m globalopt` is the `globalopt` command."""

from __future__ import annotations

from globalopt.cli import main

main()
