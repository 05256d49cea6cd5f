"""Compress a trained causal language model into sparse plus low-rank layers under one global parameter budget."""

from __future__ import annotations

from globalopt.export.registration import register

register()


def __getattr__(name: str) -> str:
    # Read when asked for: nobody who imports a submodule should pay for a search through installed packages.
    if name == "__version__":
        from importlib.metadata import version

        return version("globalopt")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
