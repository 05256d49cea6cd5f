"""Export a run in one of the formats of `globalopt export`, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from globalopt.errors import UnknownNameError, UsageError
from globalopt.export.adapter import ADAPTER, BASE, PADDED, export_adapter
from globalopt.export.dense import export_dense
from globalopt.export.factors import export_factors
from globalopt.export.packed import export_packed
from globalopt.runs.folder import Run

FORMATS: Mapping[str, Callable[[Path, Path, bool], None]] = {
    "dense": export_dense,
    "adapter": export_adapter,
    "packed": export_packed,
    "factors": export_factors,
}

_WEIGHTS = "*.safetensors"

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


def export(run: Path, name: str, folder: Path, trust_remote_code: bool = False, ranks: str = PADDED) -> int:
    """Export a finished run in the format `name` to `folder`, which appears whole or not at all.

    Args:
        ranks: of format adapter: "padded" or "own", see `export_adapter`.
    Returns:
        The size of its files in bytes.
    Raises:
        UnknownNameError: there is no such format.
        ArtefactError: the run is missing, unfinished or broken; `folder` holds something or cannot be written.
        UsageError: the format cannot hold this run, or has no `ranks`.

    >>> from globalopt.export.example import example_run
    >>> size = export(example_run(), "packed", Path("exported"))
    >>> size == sum(path.stat().st_size for path in Path("exported").iterdir())
    True
    """
    if name not in FORMATS:
        raise UnknownNameError("format", name, FORMATS)
    if name == "adapter":
        export_adapter(run, folder, trust_remote_code, ranks)
    elif ranks != PADDED:
        raise UsageError(f"--ranks {ranks} is of --format adapter; format {name} takes none.")
    else:
        FORMATS[name](run, folder, trust_remote_code)
    return size_of(folder)


def larger_than_dense(run: Path, folder: Path) -> str:
    """Say that the weights of an export are larger than those of the run's ordinary checkpoint; "" where they are not.

    >>> from globalopt.export.example import example_run
    >>> run = example_run(Path("another run"))
    >>> _ = export(run, "factors", Path("factors"))
    >>> larger_than_dense(run, Path("factors")).split(":")[0], larger_than_dense(run, run / "model")
    ('the weights are larger than those of --format dense', '')
    """
    dense, size = size_of(Run.open(run).saved_model, _WEIGHTS), size_of(folder, _WEIGHTS)
    words = f"{size / 1e6:,.2f} MB against {dense / 1e6:,.2f} MB"
    return f"the weights are larger than those of --format dense: {words}" if size > dense else ""


def decoded_in(run: Path, name: str) -> str:
    """Say that format `name` writes numbers in 16 bits that the run stores in fewer; "" where it does not.

    >>> from globalopt.export.example import example_run
    >>> decoded_in(example_run(Path("in 16 bits")), "dense")
    ''
    """
    summary = Run.open(run).summary()
    layers = sum(layer.storage != "16" for layer in summary.layers) if name in ("dense", "adapter") else 0
    embeddings = sum(each.bits < 16 for each in summary.embeddings) if name != "packed" else 0
    counts = [f"{count} {what}" for count, what in ((layers, "layers"), (embeddings, "embeddings")) if count]
    if not counts:
        return ""
    said = " and ".join(counts)
    return f"the numbers of {said} are written decoded, in 16 bits or more; --format packed keeps their codes"


def size_of(folder: Path, pattern: str = "*") -> int:
    """Sum the sizes of the files below `folder` whose names match `pattern`, in bytes.

    >>> Path("some").mkdir()
    >>> _ = Path("some/text.txt").write_text("text")
    >>> size_of(Path("some"))
    4
    """
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())
