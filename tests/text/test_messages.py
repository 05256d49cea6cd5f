"""Conversations are read as the model's chat template writes them, and a window never begins with two BOS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers

from globalopt.errors import CalibrationError
from globalopt.text.messages import Chat
from globalopt.text.prompts import read_prompts
from globalopt.text.reading import read_text
from globalopt.text.regions import tokenise
from globalopt.text.splits import make_splits
from tests.text.test_text import begun, make_word_tokenizer, write_jsonl, write_parquet

TEMPLATE = "{{ bos_token }} {% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
TALKS = [
    [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}],
    [{"role": "user", "content": "w4"}],
]
RENDERED = " user w1 w2 assistant w3 \n\n user w4 "


def chatty(template: str = TEMPLATE, tokenizer: Any = None) -> transformers.PreTrainedTokenizerBase:
    found = tokenizer or make_word_tokenizer()
    found.chat_template = template
    return found


def forms(folder: Path, column: str, talks: list[Any]) -> list[str]:
    """The same conversations as a file of lines, a parquet file and a saved data set, each beside an ID."""
    rows = [{"id": f"row {i}", column: talk} for i, talk in enumerate(talks)]
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    ids = [row["id"] for row in rows]
    lines, table = folder / "a.jsonl", folder / "a.parquet"
    return [write_jsonl(lines, rows), write_parquet(table, id=ids, **{column: talks}), str(folder / "saved")]


@pytest.mark.parametrize("column", ["messages", "conversations", "talks"])
def test_every_form_of_the_same_conversations_is_the_same_text(tmp_path: Path, column: str) -> None:
    chat = Chat.of(chatty(), "auto")
    asked = None if column != "talks" else column
    texts = [read_text(form, asked, chat) for form in forms(tmp_path, column, TALKS)]
    assert [text.text for text in texts] == [RENDERED] * 3
    assert {text.documents for text in texts} == {2}


def test_messages_under_other_keys_and_keys_without_a_value_are_understood(tmp_path: Path) -> None:
    chat = Chat.of(chatty(), "auto")
    talk = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]
    file = write_jsonl(tmp_path / "a.jsonl", [{"conversations": talk}, {"conversations": None}])
    assert read_text(file, None, chat).text == " user w1 assistant w2 "
    tools = [{"role": "user", "content": "w1", "tool_calls": None}]
    template = "{% for m in messages %}{{ m | length }} {% endfor %}"
    assert Chat.of(chatty(template), "auto").render(tools, "x") == "2 "


def test_a_column_named_text_and_one_asked_for_come_before_messages(tmp_path: Path) -> None:
    chat = Chat.of(chatty(), "auto")
    rows = [{"text": "w1", "id": "w2", "messages": TALKS[0]}]
    assert read_text(write_jsonl(tmp_path / "a.jsonl", rows), None, chat).text == "w1"
    assert read_text(write_jsonl(tmp_path / "a.jsonl", rows), "id", chat).text == "w2"
    # Without a tokenizer, as a text of strings is read.
    with pytest.raises(CalibrationError, match="column 'messages' holds list, not text"):
        read_text(write_jsonl(tmp_path / "a.jsonl", rows), "messages")


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        (
            TALKS[0],
            r"a.jsonl line 1: column 'messages' holds messages, and the tokenizer .* has no chat template .*--text",
        ),
        ([], "holds no messages"),
        (["hello"], "a message without a role and a content: str"),
        ([{"who": "me", "said": "w1"}], "a message without a role and a content: .'said', 'who'."),
    ],
)
def test_what_is_wrong_with_a_conversation_is_said_in_one_line(tmp_path: Path, talk: Any, message: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": talk}])
    with pytest.raises(CalibrationError, match=message) as error:
        read_text(file, None, Chat.of(make_word_tokenizer(), "auto"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('No system role.') }}", "{{ messages[0]['content'] + 1 }}", "{% if"]
)
def test_a_template_that_fails_is_one_line(template: str) -> None:
    with pytest.raises(CalibrationError, match=r"the chat template of .* does not take these messages") as error:
        Chat.of(chatty(template), "auto").render(TALKS[0], "a.jsonl line 1")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("begins", "prefix"), [("<s> $A", (0,)), ("$A", ()), ("[gMASK] <s> $A", (5003, 0))])
@pytest.mark.parametrize("bos", ["auto", "yes", "no"])
def test_no_window_begins_with_two_beginnings(tmp_path: Path, begins: str, prefix: tuple[int, ...], bos: str) -> None:
    whole = "[gMASK]<s>" if len(prefix) == 2 else "<s>"
    tokenizer = chatty(TEMPLATE.replace("{{ bos_token }}", whole), begun(begins))
    talks = [[{"role": "user", "content": f"w{i}"}] for i in range(200)]
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks])
    text = read_text(file, None, Chat.of(tokenizer, bos))
    splits = make_splits(tokenizer, text, None, 30, 8, seed=0, eval_windows=None, bos=bos)
    put = prefix or ((0,) if bos == "yes" else ())
    for split in splits:
        assert split.prefix == (() if bos == "no" else put)
        for window, start in zip(split.windows.tolist(), split.starts, strict=True):
            # A BOS that the tokenizer does not put itself is the template's own, and stays. Without one in front of
            # every window, the text as a whole still has its own.
            if put and not (bos == "no" and start < len(put)):
                assert 0 not in window[len(split.prefix) :]
    if put and bos == "no":
        assert tokenise(tokenizer, text)[: len(put) + 1].tolist().count(0) == 1


def test_prompts_are_lines_or_rows_in_the_template_of_the_tokenizer(tmp_path: Path) -> None:
    template = TEMPLATE + "{% if add_generation_prompt %}assistant{% endif %}"
    plain, chat = (Chat.of(tokenizer, "auto") for tokenizer in (make_word_tokenizer(), chatty(template)))
    lines = tmp_path / "a.txt"
    lines.write_text("w1 w2\n\n  w3\n")
    assert read_prompts(str(lines), plain).texts == ("w1 w2", "w3")
    assert read_prompts(str(lines), chat).texts == (" user w1 w2 assistant", " user w3 assistant")
    rows = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "w1"}, {"messages": TALKS[1], "prompt": None}])
    assert read_prompts(rows, chat).texts == (" user w1 assistant", " user w4 assistant")
    record = json.loads(json.dumps(read_prompts(rows, chat).record()))
    assert (record["file"], record["number"], record["chat"]) == (rows, 2, True)
    with pytest.raises(CalibrationError, match=r"line 2 holds messages, and the tokenizer .* has no chat template"):
        read_prompts(rows, plain)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "w1", "Cannot read prompts from '.*a.csv'; give a .txt file"),
        ("a.txt", " \n\n", "holds no prompts"),
        ("a.jsonl", '{"text": "w1"}', "line 1 has no `prompt` or `messages`; it has: text"),
        ("a.jsonl", '{"prompt": " "}', "line 1 has no `prompt`"),
        ("a.jsonl", '{"prompt"', "line 1 is not JSON"),
        ("none.txt", None, "There is no file"),
    ],
)
def test_what_is_wrong_with_prompts_is_said_in_one_line(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(CalibrationError, match=message) as error:
        read_prompts(str(path), Chat.of(make_word_tokenizer(), "auto"))
    assert "\n" not in str(error.value)
