"""Text in, disjoint token windows out.

A `Text` is one long string with its origin and hash. The windows of a split lie inside one region of its tokens, and
`Splits` refuses regions that overlap, so nothing can be fitted, chosen and measured on the same tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from globalopt.errors import CalibrationError

if TYPE_CHECKING:
    pass


DOCUMENT_JOIN = "\n\n"
"""What stands between documents; the field's perplexities on WikiText-2 and C4 depend on it."""

HUB_CHARACTERS = 20_000_000
"""Characters read from a hub data set, which is streamed: some of those people calibrate on are terabytes."""

FILE_KINDS = (".txt", ".jsonl", ".parquet")

FORMS = "a .txt, .jsonl or .parquet file, a folder saved by datasets, or a hub data set ID[@CONFIG][:SPLIT]"


@dataclass(frozen=True)
class Text:
    """A text and where it is from.

    Args:
        text: the documents joined by `DOCUMENT_JOIN`.
        spec: what the user named it by.
        sha256: of the text in UTF-8.
        documents: how many were joined.
        complete: False when reading stopped at `HUB_CHARACTERS`.
    """

    text: str
    spec: str
    sha256: str
    documents: int
    complete: bool = True

    @classmethod
    def of(cls, text: str, spec: str, documents: int = 1, complete: bool = True) -> Text:
        """Make a text and hash it; `CalibrationError` when it is blank."""
        if not text.strip():
            raise CalibrationError(f"The text {spec} is empty.")
        return cls(text, spec, hashlib.sha256(text.encode()).hexdigest(), documents, complete)


# ------------------------------------------------------------------------------------------------- reading


def read_text(spec: str, column: str | None = None) -> Text:
    """Read a text from a file, a folder or the hub.

    Args:
        spec: a `.txt`, `.jsonl` or `.parquet` file; a folder written by `datasets.save_to_disk` (of a dictionary of
            splits, `train` or the only one); else a hub data set `ID[@CONFIG][:SPLIT]`, split `train` unless said.
        column: which column holds the text; without it `text`, else the only one that holds strings.
    Raises:
        CalibrationError: the text is missing, empty, binary or broken, or its column is not there.
    """
    if not spec.strip():
        raise CalibrationError(f"There is no file without a name; a text is {FORMS}.")
    path = Path(spec)
    kind = path.suffix.lower()
    if path.is_dir():
        return join(_folder_documents(path, column), spec)
    if path.is_file() and kind not in FILE_KINDS:
        raise CalibrationError(f"Cannot tell what {spec} holds from its name; a text is {FORMS}.")
    if kind in FILE_KINDS:
        return _read_file(path, column)
    if spec.startswith((".", "/", "~")):
        raise CalibrationError(f"There is no file or folder '{spec}'; a text is {FORMS}.")
    return join(_hub_documents(spec, column), spec, most=HUB_CHARACTERS)


def _read_file(path: Path, column: str | None) -> Text:
    if not path.is_file():
        raise CalibrationError(f"There is no file '{path}'.")
    if path.suffix.lower() == ".parquet":
        return join(_parquet_documents(path, column), str(path))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"Cannot read {path}: {error.strerror}.") from error
    if (at := data.find(b"\0")) >= 0:
        raise CalibrationError(f"{path} is binary: it has a NUL byte at offset {at}; give UTF-8 text.")
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text: bad byte at offset {error.start}.") from error
    if path.suffix.lower() == ".jsonl":
        return join(_jsonl_documents(content, path, column), str(path))
    return Text.of(content, str(path))


def join(documents: Iterable[str], spec: str, most: int | None = None) -> Text:
    """Join documents into a text; with `most`, stop after the document that reaches so many characters."""
    held: list[str] = []
    characters = 0
    complete = True
    for document in documents:
        if most is not None and characters >= most:
            complete = False
            break
        held.append(document)
        characters += len(document)
    return Text.of(DOCUMENT_JOIN.join(held), spec, len(held), complete)


def _jsonl_documents(content: str, path: Path, column: str | None) -> Iterator[str]:
    # Not splitlines: a JSON string may hold U+2028 as it is.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise CalibrationError(f"{where} is not JSON: {_one_line(error)}") from error
        if not isinstance(row, dict):
            raise CalibrationError(f"{where} is not a JSON object; each line must be one, with a text column.")
        column = _text_column(row, column, where)
        yield _string(row[column], column, where)


def _parquet_documents(path: Path, column: str | None) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # An empty string stands for the text columns, so that a null in the first row hides none.
            kinds = {field.name: "" if _is_string(field.type) else None for field in file.schema_arrow}
            column = _text_column(kinds, column, str(path))
            row = 0
            for batch in file.iter_batches(columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield _string(value, column, f"{path} row {row}")
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{path} is not a readable parquet file: {_one_line(error)}") from error


def _is_string(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)


def _folder_documents(path: Path, column: str | None) -> Iterator[str]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationError(
            f"The folder {path} was not saved by datasets.save_to_disk, or is broken: {_one_line(error)}"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded and len(loaded) != 1:
            raise CalibrationError(
                f"{path} holds the splits {', '.join(map(str, loaded))} and none is 'train'; give the folder of one."
            )
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    yield from _row_documents(loaded, column, str(path))


def _hub_documents(spec: str, column: str | None) -> Iterator[str]:
    import datasets
    from datasets.exceptions import DatasetsError

    name, _, split = spec.partition(":")
    name, _, config = name.partition("@")
    try:
        stream = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        yield from _row_documents(stream, column, spec)
    except CalibrationError:
        raise
    # What datasets raises: no network or no such data set; no such configuration or split; a loading script.
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise CalibrationError(
            f"'{spec}' is no file here, and reading it as a hub data set failed: {_one_line(error)} "
            "Without a network, give a .txt, .jsonl or .parquet file or a folder saved by datasets.save_to_disk."
        ) from error


def _row_documents(rows: Any, column: str | None, where: str) -> Iterator[str]:
    first = next(iter(rows), None)
    if first is None:
        return
    column = _text_column(first, column, where)
    for number, row in enumerate(rows.select_columns([column]), start=1):
        yield _string(row[column], column, f"{where} row {number}")


def _text_column(row: Mapping[str, Any], column: str | None, where: str) -> str:
    """The column to read: the one asked for, else `text`, else the only one of `row` that holds a string."""
    if column is not None:
        if column not in row:
            raise CalibrationError(f"{where} has no column '{column}'; it has: {', '.join(row)}.")
        return column
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise CalibrationError(f"{where}: name the column of the text with --text-column; it has: {', '.join(row)}.")


def _string(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: column '{column}' holds {type(value).__name__}, not text.")
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") + "."
