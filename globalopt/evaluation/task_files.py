"""Read zero-shot tasks from local files, JSON lines or parquet, and check every item.

A row has one of these sets of keys, and the model answers it by likelihood:

    query, choices, gold                    the most likely choice after the query (gold: the right index, from 0)
    context_options, continuation, gold     the context after which the continuation is most likely (WinoGrande)
    context, continuation                   right if greedy decoding gives the continuation (LAMBADA)
    sentence1, sentence2, label             "True" or "False": the first entails the second (RTE; label 0: True)

Prompts of the tasks that lm-eval knows are written as lm-eval writes them, so that results compare.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from globalopt.errors import CalibrationError, UsageError, one_line

PAPERS = ("piqa", "hellaswag", "arc_easy", "arc_challenge", "winogrande", "rte", "openbookqa", "boolq")
"""The tasks that papers on sparse and low-rank compression report."""

FILE_KINDS = (".jsonl", ".parquet")
CHOICES, CONTEXTS, COMPLETION, PAIR = "choices", "contexts", "completion", "pair"
FORMS: Mapping[str, tuple[str, ...]] = {
    CHOICES: ("query", "choices", "gold"),
    CONTEXTS: ("context_options", "continuation", "gold"),
    COMPLETION: ("context", "continuation"),
    PAIR: ("sentence1", "sentence2", "label"),
}

_ENDINGS = ("_validation", "_test")
_OTHER_NAMES = {"openbook_qa": "openbookqa"}
_PLAIN_ACCURACY = ("boolq", "rte", "winogrande")
"""Tasks whose choices are of one length, for which lm-eval reports no `acc_norm`."""


def _with_answer(query: str) -> str:
    """Append lm-eval's "Answer:" to a question."""
    return query.removesuffix("\n") + "\nAnswer:"


_PROMPTS: Mapping[str, Callable[[str], str]] = {
    "piqa": _with_answer,
    "arc_easy": _with_answer,
    "arc_challenge": _with_answer,
    "boolq": lambda query: _with_answer(query.removeprefix("Passage: ")),
}


@dataclass(frozen=True)
class TaskFile:
    """Hold a task that was read from a file.

    Args:
        form: `CHOICES`, `CONTEXTS` or `COMPLETION`.
        items: rows with the keys of the form, prompts as the model sees them.
        normed: whether accuracy by length-normalised likelihood (`acc_norm`) is reported too.
        sha256: of the file.

    >>> row = {"context": "The capital of France is", "continuation": " Paris"}
    >>> file = TaskFile("mine", Path("mine.jsonl"), COMPLETION, [row], normed=False, sha256="0" * 64)
    >>> file.name, len(file.items)
    ('mine', 1)
    """

    name: str
    path: Path
    form: str
    items: Sequence[Mapping[str, Any]]
    normed: bool
    sha256: str


def find_task_files(folder: Path) -> dict[str, Path]:
    """Find the task files of a folder, by the names of the tasks.

    Raises:
        UsageError: there is no such folder, or two files are of one task.

    >>> Path("arc_easy_test.jsonl").touch()
    >>> find_task_files(Path("."))
    {'arc_easy': PosixPath('arc_easy_test.jsonl')}
    """
    if not folder.is_dir():
        raise UsageError(f"--tasks-path {folder} is no folder; give one that holds {' or '.join(FILE_KINDS)} files.")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in FILE_KINDS or not path.is_file():
            continue
        name = _task_name(path)
        if name in found:
            raise UsageError(f"{found[name]} and {path} are both of task {name}; leave one.")
        found[name] = path
    return found


def _task_name(path: Path) -> str:
    """Return lm-eval's name of the task of a file."""
    name = path.stem
    for ending in _ENDINGS:
        name = name.removesuffix(ending)
    return _OTHER_NAMES.get(name, name)


def read_task_file(path: Path) -> TaskFile:
    """Read and check a task file.

    Raises:
        CalibrationError: the file is missing, empty or broken, or a row is, which the message names.

    >>> row = {"query": "Question: What is wet?", "choices": ["rain", "fire"], "gold": 0}
    >>> _ = Path("arc_easy.jsonl").write_text(json.dumps(row))
    >>> file = read_task_file(Path("arc_easy.jsonl"))
    >>> file.form, file.items[0]["query"]
    ('choices', 'Question: What is wet?\\nAnswer:')
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"Cannot read {path}: {error.strerror}.") from error
    rows = _parquet_rows(path) if path.suffix.lower() == ".parquet" else _json_rows(path, data)
    name = _task_name(path)
    form, items = "", []
    for where, row in rows:
        form = form or _form(row, where)
        items.append(_ITEMS[form](row, where, name))
    if not items:
        raise CalibrationError(f"{path} holds no items; the file is empty.")
    kind = CHOICES if form == PAIR else form
    return TaskFile(name, path, kind, items, name not in _PLAIN_ACCURACY, hashlib.sha256(data).hexdigest())


def _json_rows(path: Path, data: bytes) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Parse the lines of a file: the place of every row, for messages, and the row."""
    # By the bytes of newlines: a JSON string may hold U+2028 as it is.
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        where = f"{path} line {number}"
        try:
            text = line.decode("utf-8")
            if not text.strip():
                continue
            row = json.loads(text)
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{where} is not UTF-8 text: bad byte at offset {error.start} in it.") from None
        # ValueError: also a whole number of thousands of digits.
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{where} is not JSON: {one_line(error, None)}.") from None
        if not isinstance(row, dict):
            raise CalibrationError(f"{where} is not a JSON object; each line must be one.")
        yield where, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read the rows of a parquet file, each with its place for messages."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = one_line(error, None).rstrip(".")
        raise CalibrationError(f"{path} is not a readable parquet file: {reason}.") from error
    return ((f"{path} row {number}", row) for number, row in enumerate(rows, start=1))


def _form(row: Mapping[str, Any], where: str) -> str:
    """Tell the form of a task by the keys of a row."""
    for form, keys in FORMS.items():
        if all(key in row for key in keys):
            return form
    forms = "; or ".join(", ".join(keys) for keys in FORMS.values())
    raise CalibrationError(f"{where} is no item of a task: it has {', '.join(row) or 'nothing'}; expected {forms}.")


def _choices(row: Mapping[str, Any], where: str, name: str) -> dict[str, Any]:
    """Check a row of the form `CHOICES`."""
    choices = _texts(row, "choices", where)
    prompt = _PROMPTS.get(name, str)(_text(row, "query", where))
    return {"query": prompt, "choices": choices, "gold": _index(row, "gold", len(choices), where)}


def _contexts(row: Mapping[str, Any], where: str, name: str) -> dict[str, Any]:
    """Check a row of the form `CONTEXTS`."""
    contexts = _texts(row, "context_options", where)
    gold = _index(row, "gold", len(contexts), where)
    return {"contexts": contexts, "continuation": _text(row, "continuation", where), "gold": gold}


def _completion(row: Mapping[str, Any], where: str, name: str) -> dict[str, Any]:
    """Check a row of the form `COMPLETION`."""
    context, continuation = (_text(row, key, where) for key in FORMS[COMPLETION])
    # lm-eval puts nothing between the two.
    return {"context": context, "continuation": f" {continuation}"}


def _pair(row: Mapping[str, Any], where: str, name: str) -> dict[str, Any]:
    """Convert a row of the form `PAIR` to one of the form `CHOICES`."""
    first, second = (_text(row, key, where) for key in ("sentence1", "sentence2"))
    prompt = f"{first}\nQuestion: {second} True or False?\nAnswer:"
    return {"query": prompt, "choices": ["True", "False"], "gold": _index(row, "label", 2, where)}


_ITEMS: Mapping[str, Callable[[Mapping[str, Any], str, str], dict[str, Any]]] = {
    CHOICES: _choices,
    CONTEXTS: _contexts,
    COMPLETION: _completion,
    PAIR: _pair,
}


def _value(row: Mapping[str, Any], key: str, where: str) -> Any:
    """Return a value of a row; `CalibrationError` where it is missing."""
    if key not in row:
        raise CalibrationError(f"{where} lacks '{key}'; the rows before it have it.")
    return row[key]


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    """Return a text of a row; `CalibrationError` where it is none, or empty."""
    value = _value(row, key, where)
    if not isinstance(value, str) or not value.strip():
        raise CalibrationError(f"{where}: '{key}' is no text: {json.dumps(value, default=str)[:40]}.")
    return value


def _texts(row: Mapping[str, Any], key: str, where: str) -> list[str]:
    """Return a list of texts of a row; `CalibrationError` where it is none."""
    values = _value(row, key, where)
    if not isinstance(values, list) or len(values) < 2 or not all(isinstance(v, str) and v.strip() for v in values):
        raise CalibrationError(f"{where}: '{key}' must be a list of at least 2 texts, none of them empty.")
    return values


def _index(row: Mapping[str, Any], key: str, count: int, where: str) -> int:
    """Return an index of a row; `CalibrationError` where it is not below `count`."""
    value = _value(row, key, where)
    if type(value) is not int or not 0 <= value < count:
        raise CalibrationError(
            f"{where}: '{key}' is {json.dumps(value, default=str)[:40]}, and must be the index of one of {count} "
            f"choices, 0 to {count - 1}."
        )
    return value
