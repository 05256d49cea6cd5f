"""Task files: forms, prompts, and what is wrong with them in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from globalopt.errors import CalibrationError, UsageError
from globalopt.evaluation.task_files import CHOICES, COMPLETION, CONTEXTS, find_task_files, read_task_file

GOOD = {"query": "Question: is it?\n", "choices": ["yes", "no"], "gold": 1}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_prompts_are_those_of_lm_eval(tmp_path):
    def query(name: str, text: str) -> str:
        return read_task_file(write(tmp_path / f"{name}.jsonl", {**GOOD, "query": text})).items[0]["query"]

    assert query("piqa", "Question: how?\n") == "Question: how?\nAnswer:"
    assert query("arc_easy", "Question: how?") == "Question: how?\nAnswer:"
    assert query("boolq", "Passage: It is.\nQuestion: is it?") == "It is.\nQuestion: is it?\nAnswer:"
    assert query("openbook_qa", "Predators eat") == "Predators eat"
    assert query("own", "As it is\n") == "As it is\n"


def test_forms(tmp_path):
    choices = read_task_file(write(tmp_path / "piqa.jsonl", GOOD, GOOD))
    assert (choices.name, choices.form, choices.normed, len(choices.items)) == ("piqa", CHOICES, True, 2)
    row = {"context_options": ["so Ann", "so Bea"], "continuation": "won.", "gold": 0}
    contexts = read_task_file(write(tmp_path / "winogrande.jsonl", row))
    assert (contexts.form, contexts.normed) == (CONTEXTS, False)
    assert contexts.items == [{"contexts": ["so Ann", "so Bea"], "continuation": "won.", "gold": 0}]
    completion = read_task_file(write(tmp_path / "lambada_openai.jsonl", {"context": "It is", "continuation": "so"}))
    assert (completion.form, completion.items[0]["continuation"]) == (COMPLETION, " so")


def test_rte_from_parquet(tmp_path):
    path = tmp_path / "rte_validation.parquet"
    table = {"sentence1": ["It rains.", "It snows."], "sentence2": ["It is wet.", "It is hot."], "label": [0, 1]}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    file = read_task_file(path)
    assert (file.name, file.form, file.normed) == ("rte", CHOICES, False)
    assert file.items[1] == {
        "query": "It snows.\nQuestion: It is hot. True or False?\nAnswer:",
        "choices": ["True", "False"],
        "gold": 1,
    }


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({**GOOD, "gold": 2}, "'gold' is 2, and must be the index of one of 2 choices, 0 to 1"),
        ({**GOOD, "gold": -1}, "'gold' is -1"),
        ({**GOOD, "gold": True}, "'gold' is true"),
        ({**GOOD, "gold": "1"}, "'gold' is \"1\""),
        ({"query": "q", "choices": ["a", "b"]}, "lacks 'gold'"),
        ({**GOOD, "choices": ["only"]}, "at least 2 texts"),
        ({**GOOD, "choices": ["a", " "]}, "none of them empty"),
        ({**GOOD, "query": None}, "'query' is no text: null"),
        ([1], "not a JSON object"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, says):
    path = write(tmp_path / "piqa.jsonl", GOOD, row)
    with pytest.raises(CalibrationError, match=r"piqa\.jsonl line 2") as caught:
        read_task_file(path)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "holds no items"),
        (b"\n \n", "holds no items"),
        (b'{"query": 1', "line 1 is not JSON"),
        (b'\n{"query": "\xff"}', "line 2 is not UTF-8 text: bad byte at offset 11"),
        (b'{"a": 1}', "line 1 is no item of a task: it has a"),
        (b"{}", "it has nothing"),
        (b"[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_a_broken_file_is_named(tmp_path, data, says):
    path = tmp_path / "piqa.jsonl"
    path.write_bytes(data)
    with pytest.raises(CalibrationError, match=r"piqa\.jsonl") as caught:
        read_task_file(path)
    assert says in str(caught.value)


def test_a_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "rte.parquet").write_bytes(b"PAR1")
    with pytest.raises(CalibrationError, match="not a readable parquet file"):
        read_task_file(tmp_path / "rte.parquet")


def test_line_separators_inside_of_a_string_end_no_line(tmp_path):
    path = tmp_path / "own.jsonl"
    row = {**GOOD, "query": "one\u2028two"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8-sig")
    assert read_task_file(path).items[0]["query"] == "one\u2028two"


def test_finding_files(tmp_path):
    for name in ("piqa.jsonl", "openbook_qa.jsonl", "rte_validation.parquet", "notes.txt"):
        (tmp_path / name).touch()
    assert {name: path.name for name, path in find_task_files(tmp_path).items()} == {
        "piqa": "piqa.jsonl",
        "openbookqa": "openbook_qa.jsonl",
        "rte": "rte_validation.parquet",
    }
    (tmp_path / "rte.jsonl").touch()
    with pytest.raises(UsageError, match="both of task rte"):
        find_task_files(tmp_path)
    with pytest.raises(UsageError, match="is no folder"):
        find_task_files(tmp_path / "none")
