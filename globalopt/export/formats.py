"""Export a run in one of the formats of `globalopt export`, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from globalopt.errors import UnknownNameError
from globalopt.export.adapter import ADAPTER, BASE, export_adapter
from globalopt.export.dense import export_dense
from globalopt.export.factors import export_factors
from globalopt.export.packed import export_packed

FORMATS: Mapping[str, Callable[[Path, Path, bool], None]] = {
    "dense": export_dense,
    "adapter": export_adapter,
    "packed": export_packed,
    "factors": export_factors,
}

_LOADING: Mapping[str, str] = {
    "dense": "AutoModelForCausalLM.from_pretrained({folder!r})",
    "adapter": "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {adapter!r})",
    "packed": "import globalopt; AutoModelForCausalLM.from_pretrained({folder!r})",
    "factors": "globalopt.export.factors.read_factors(Path({folder!r}))",
}


def loading(name: str, folder: Path) -> str:
    """Write the Python expression that loads an export of format `name`.

    >>> loading("dense", Path("exported"))
    "AutoModelForCausalLM.from_pretrained('exported')"
    """
    return _LOADING[name].format(folder=str(folder), base=str(folder / BASE), adapter=str(folder / ADAPTER))


def export(run: Path, name: str, folder: Path, trust_remote_code: bool = False) -> int:
    """Export a finished run in the format `name` to `folder`, which appears whole or not at all.

    Returns:
        The size of its files in bytes.
    Raises:
        UnknownNameError: there is no such format.
        ArtefactError: the run is missing, unfinished or broken; `folder` holds something or cannot be written.
        UsageError: the format cannot hold this run.

    >>> from globalopt.export.example import example_run
    >>> size = export(example_run(), "packed", Path("exported"))
    >>> size == sum(path.stat().st_size for path in Path("exported").iterdir())
    True
    """
    if name not in FORMATS:
        raise UnknownNameError("format", name, FORMATS)
    FORMATS[name](run, folder, trust_remote_code)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
