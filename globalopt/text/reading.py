"""Read texts from files, from folders saved by `datasets`, and from the hub.

A `Text` is one long string with its origin and its hash. `globalopt.text.splits` cuts it into windows. Where the rows
of a table are conversations, each is a document, as the chat template of the model's tokenizer writes it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from globalopt.errors import CalibrationError, one_line
from globalopt.text.messages import COLUMNS, Chat

DOCUMENT_JOIN = "\n\n"
"""Separator of documents; the field's perplexities on WikiText-2 and C4 depend on it."""

HUB_CHARACTERS = 20_000_000
"""Characters read from a hub data set, which is streamed: some data sets used for calibration are terabytes."""

ROWS_FOR_KINDS = 1000
"""Most rows that are read to find which columns hold text."""

FILE_KINDS = (".txt", ".jsonl", ".parquet")
"""Suffixes of files that can be read."""

FORMS = "a .txt, .jsonl or .parquet file, a folder saved by datasets, or a hub data set ID[@CONFIG][:SPLIT]"
"""The forms in which a text can be given, for messages."""


_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Text:
    """Hold a text, and where it is from.

    Args:
        text: the documents joined by `DOCUMENT_JOIN`.
        spec: file, folder or data set, as the user gave it.
        sha256: hash of the text in UTF-8.
        documents: how many were joined.
        complete: False when reading stopped at `HUB_CHARACTERS`.

    >>> text = join(["One document.", "Another one."], spec="notes.jsonl")
    >>> text.text.split(DOCUMENT_JOIN), text.documents
    (['One document.', 'Another one.'], 2)
    """

    text: str
    spec: str
    sha256: str
    documents: int
    complete: bool = True

    @classmethod
    def of(cls, text: str, spec: str, documents: int = 1, complete: bool = True) -> Text:
        """Make a text and hash it; half of a surrogate pair becomes U+FFFD.

        Raises:
            CalibrationError: the text is blank.
        """
        if not text.strip():
            raise CalibrationError(f"The text {spec} is empty.")
        # JSON may hold half of a surrogate pair, which neither UTF-8 nor a tokenizer can take.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if _SURROGATE.search(text) else text
        return cls(text, spec, hashlib.sha256(text.encode()).hexdigest(), documents, complete)


# ------------------------------------------------------------------------------------------------- reading


def read_text(spec: str, column: str | None = None, chat: Chat | None = None) -> Text:
    """Read a text from a file, a folder or the hub.

    Args:
        spec: a `.txt`, `.jsonl` or `.parquet` file; a folder written by `datasets.save_to_disk` (of a dictionary of
            splits, `train` or the only one); else a hub data set `ID[@CONFIG][:SPLIT]`, with split `train` by default.
        column: the column that holds the text; by default `text`, else with `chat` one of `messages.COLUMNS` that holds
            conversations, else the only one that holds strings. A row whose text is null is passed over.
        chat: renders conversations; None refuses them.
    Raises:
        CalibrationError: the text is missing, empty, binary or broken, or it has no such column.

    >>> rows = [{"id": 1, "body": "One document."}, {"id": 2, "body": "Another one."}]
    >>> _ = Path("notes.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
    >>> text = read_text("notes.jsonl")
    >>> text.documents, text.text.split(DOCUMENT_JOIN)
    (2, ['One document.', 'Another one.'])
    """
    if not spec.strip():
        raise CalibrationError(f"There is no file without a name; a text is {FORMS}.")
    path = Path(spec)
    kind = path.suffix.lower()
    if path.is_dir():
        return join(_folder_documents(path, column, chat), spec)
    if path.is_file() and kind not in FILE_KINDS:
        raise CalibrationError(f"Cannot tell what {spec} holds from its name; a text is {FORMS}.")
    if kind in FILE_KINDS:
        return _read_file(path, column, chat)
    if spec.startswith((".", "/", "~")):
        raise CalibrationError(f"There is no file or folder '{spec}'; a text is {FORMS}.")
    return join(_hub_documents(spec, column, chat), spec, most=HUB_CHARACTERS)


def _read_file(path: Path, column: str | None, chat: Chat | None) -> Text:
    """Read a text, JSON-lines or parquet file."""
    if path.suffix.lower() == ".parquet":
        check_file(path)
        return join(_parquet_documents(path, column, chat), str(path))
    content = file_content(path)
    if path.suffix.lower() == ".jsonl":
        return join(_jsonl_documents(content, path, column, chat), str(path))
    return Text.of(content, str(path))


def check_file(path: Path) -> None:
    """Raise `CalibrationError` if there is no such file.

    >>> check_file(Path(__file__))
    """
    if not path.is_file():
        raise CalibrationError(f"There is no file '{path}'.")


def file_content(path: Path) -> str:
    """Read a file of UTF-8 text, with or without a byte order mark; `CalibrationError` if it is missing or binary.

    >>> _ = Path("words.txt").write_bytes(b"\\xef\\xbb\\xbfwords")
    >>> file_content(Path("words.txt"))
    'words'
    """
    check_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"Cannot read {path}: {error.strerror}.") from error
    if (at := data.find(b"\0")) >= 0:
        raise CalibrationError(f"{path} is binary: it has a NUL byte at offset {at}; give UTF-8 text.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text: bad byte at offset {error.start}.") from error


def join(documents: Iterable[str], spec: str, most: int | None = None) -> Text:
    """Join documents into a text.

    Args:
        documents: read only as far as needed.
        spec: file, folder or data set, for messages.
        most: stop after the document that reaches this number of characters; None: no limit.

    >>> text = join(["four", "five5", "six666"], spec="notes", most=8)
    >>> text.documents, text.complete
    (2, False)
    """
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


def _jsonl_documents(content: str, path: Path, column: str | None, chat: Chat | None) -> Iterator[str]:
    """Yield the documents of a JSON-lines file."""
    if column is None and (first := next(jsonl_rows(content, path), None)) is not None:
        column = _text_column(_kinds(row for _, row in jsonl_rows(content, path)), None, first[0], chat)
    for where, row in jsonl_rows(content, path):
        column = _text_column(row, column, where, chat)
        yield from _documents(row[column], column, where, chat)


def jsonl_rows(content: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a JSON-lines file, each with its place for messages; `CalibrationError` for a broken line.

    >>> list(jsonl_rows('{"text": "a"}', Path("a.jsonl")))
    [('a.jsonl line 1', {'text': 'a'})]
    """
    # Not by splitlines, which also cuts at U+2028, and this may stand in a JSON string.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise CalibrationError(f"{where} is not JSON: {_sentence(error)}") from error
        if not isinstance(row, dict):
            raise CalibrationError(f"{where} is not a JSON object; each line must be one, with a text column.")
        yield where, row


def _parquet_documents(path: Path, column: str | None, chat: Chat | None) -> Iterator[str]:
    """Yield the documents of a parquet file, batch by batch."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # The schema tells which columns hold text, as the text of the first row may be null.
            kinds = {field.name: _kind(field.type) for field in file.schema_arrow}
            column = _text_column(kinds, column, str(path), chat)
            row = 0
            for batch in file.iter_batches(columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield from _documents(value, column, f"{path} row {row}", chat)
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{path} is not a readable parquet file: {_sentence(error)}") from error


def _kind(kind: Any) -> str | list[Any] | None:
    """Return a value of the kind of an arrow type: a string, a list, or None for any other."""
    from pyarrow import types

    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return ""
    return [] if types.is_list(kind) or types.is_large_list(kind) else None


def _folder_documents(path: Path, column: str | None, chat: Chat | None) -> Iterator[str]:
    """Yield the documents of a folder written by `datasets.save_to_disk`."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationError(
            f"The folder {path} was not saved by datasets.save_to_disk, or is broken: {_sentence(error)}"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded and len(loaded) != 1:
            raise CalibrationError(
                f"{path} holds the splits {', '.join(map(str, loaded))} and none is 'train'; give the folder of one."
            )
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    yield from _row_documents(loaded, column, str(path), chat)


def _hub_documents(spec: str, column: str | None, chat: Chat | None = None) -> Iterator[str]:
    """Yield the documents of a hub data set `ID[@CONFIG][:SPLIT]`, streamed."""
    import datasets
    from datasets.exceptions import DatasetsError

    name, _, split = spec.partition(":")
    name, _, config = name.partition("@")
    try:
        stream = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        yield from _row_documents(stream, column, spec, chat)
    except CalibrationError:
        raise
    # These are raised without a network, and for an unknown data set, configuration or split, or a loading script.
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise CalibrationError(
            f"'{spec}' is no file here, and reading it as a hub data set failed: {_sentence(error)} "
            "Without a network, give a .txt, .jsonl or .parquet file or a folder saved by datasets.save_to_disk."
        ) from error


def _row_documents(rows: Any, column: str | None, where: str, chat: Chat | None) -> Iterator[str]:
    """Yield the text column of every row of a data set."""
    kinds = _kinds(rows)
    if not kinds:
        return
    column = _text_column(kinds, column, where, chat)
    for number, row in enumerate(rows.select_columns([column]), start=1):
        yield from _documents(row[column], column, f"{where} row {number}", chat)


def _kinds(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Find a value of every column of some rows, reading on while one has none: its first rows may be without."""
    found: dict[str, Any] = {}
    for row in itertools.islice(rows, ROWS_FOR_KINDS):
        found.update({name: value for name, value in row.items() if found.get(name) is None})
        if None not in found.values():
            break
    return found


def _text_column(row: Mapping[str, Any], column: str | None, where: str, chat: Chat | None) -> str:
    """Choose the column to read: the one asked for, else `text`, else conversations, else the only one of strings."""
    if column is not None:
        if column not in row:
            raise CalibrationError(f"{where} has no column '{column}'; it has: {', '.join(row)}.")
        return column
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in strings:
        return "text"
    conversations = [name for name in COLUMNS if chat is not None and isinstance(row.get(name), list)]
    # Beside conversations a column of strings is often no text: an ID, or the first message alone.
    if found := conversations or strings[: len(strings) == 1]:
        return found[0]
    raise CalibrationError(f"{where}: name the column of the text with --text-column; it has: {', '.join(row)}.")


def _documents(value: Any, column: str, where: str, chat: Chat | None) -> Iterator[str]:
    """Yield `value`, rendered if it is a conversation, or nothing if a row has none; `CalibrationError` for others."""
    if value is None:
        return
    if isinstance(value, list) and chat is not None:
        yield chat.render(value, f"{where}: column '{column}'")
        return
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: column '{column}' holds {type(value).__name__}, not text.")
    yield value


def _sentence(error: Exception) -> str:
    """Write the message of an error on one line that ends with a full stop."""
    return one_line(error, None).rstrip(".") + "."
