"""Texts are read whole or refused in one line; windows never leave their split."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from globalopt.errors import CalibrationError, UsageError
from globalopt.text import reading
from globalopt.text.beginning import prefix_of
from globalopt.text.reading import Text, read_text
from globalopt.text.regions import cut_text, tokenise
from globalopt.text.splits import consecutive_split, make_splits, reference_splits
from globalopt.text.windows import Split, Splits

ROWS = ["The first document.", "A second one, with ümlauts and \u2028 inside.", "And the third."]
JOINED = "\n\n".join(ROWS)


def words(count: int) -> Text:
    """A text of `count` different words, one token each for `word_tokenizer`."""
    return Text.of(" ".join(f"w{i}" for i in range(count)), f"{count} words")


def make_word_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """One token per word, `<s>` in front, and a context of 16 tokens."""
    vocabulary = {"<s>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(5000)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.TokenizersBackend(tokenizer_object=backend, bos_token="<s>", model_max_length=16)


@pytest.fixture(scope="module")
def word_tokenizer() -> transformers.PreTrainedTokenizerBase:
    return make_word_tokenizer()


def write_jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, **columns: Sequence[object]) -> str:
    pyarrow.parquet.write_table(pyarrow.table({name: list(values) for name, values in columns.items()}), path)
    return str(path)


# ------------------------------------------------------------------------------------------------- reading


def test_txt_is_read_as_it_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfOne\r\n\r\nTwo \xc3\xbc\n")
    text = read_text(str(path))
    assert text.text == "One\r\n\r\nTwo ü\n"
    assert (text.spec, text.documents, text.complete) == (str(path), 1, True)
    assert text.sha256 == hashlib.sha256("One\r\n\r\nTwo ü\n".encode()).hexdigest()


def test_every_form_of_the_same_rows_is_the_same_text(tmp_path):
    forms = [
        write_jsonl(tmp_path / "a.jsonl", [{"id": i, "text": row} for i, row in enumerate(ROWS)]),
        write_parquet(tmp_path / "a.parquet", id=[0, 1, 2], text=ROWS),
    ]
    rows = datasets.Dataset.from_dict({"id": [0, 1, 2], "text": ROWS})
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "dict")
    forms += [str(tmp_path / "saved"), str(tmp_path / "dict"), str(tmp_path / "dict" / "train")]
    texts = [read_text(form) for form in forms]
    assert [text.text for text in texts] == [JOINED] * 5
    assert {text.documents for text in texts} == {3}
    assert len({text.sha256 for text in texts}) == 1


def test_the_column_is_text_or_the_only_strings_or_the_one_asked_for(tmp_path):
    both = [{"text": "t", "body": "b"}]
    assert read_text(write_jsonl(tmp_path / "both.jsonl", both)).text == "t"
    assert read_text(write_jsonl(tmp_path / "both.jsonl", both), "body").text == "b"
    assert read_text(write_jsonl(tmp_path / "one.jsonl", [{"n": 1, "story": "s"}])).text == "s"
    assert read_text(write_parquet(tmp_path / "one.parquet", n=[1, 2], story=["s", "t"])).text == "s\n\nt"


@pytest.mark.parametrize("at", [0, 2])
def test_a_row_without_text_is_passed_over(tmp_path, at):
    rows: list[str | None] = [*ROWS]
    rows.insert(at, None)
    for name in ("text", "story"):
        kept = [{"id": i, name: row} for i, row in enumerate(rows)]
        datasets.Dataset.from_list(kept).save_to_disk(tmp_path / name)
        forms = [write_jsonl(tmp_path / "a.jsonl", kept), str(tmp_path / name)]
        forms.append(write_parquet(tmp_path / "a.parquet", **{"id": range(4), name: rows}))
        for form in forms:
            text = read_text(form)
            assert (text.text, text.documents) == (JOINED, 3)
            assert read_text(form, name) == text


def test_half_of_a_surrogate_pair_is_replaced_and_a_whole_one_is_joined(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "cut \\ud83d here, \\ude00"}\n{"text": "whole \\ud83d\\ude00"}\n')
    assert read_text(str(path)).text == "cut \ufffd here, \ufffd\n\nwhole \U0001f600"


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.txt", b"", None, "is empty"),
        ("a.txt", b" \n\t\n", None, "is empty"),
        ("a.txt", b"abc\0def", None, "binary: it has a NUL byte at offset 3"),
        ("a.txt", b"abc\xff\xfe", None, "not UTF-8 text: bad byte at offset 3"),
        ("a.csv", b"a,b\n", None, "Cannot tell what .*a.csv holds"),
        ("a.jsonl", b"", None, "is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', None, "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n["b"]\n', None, "line 3 is not a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"texd": "b"}\n', None, "line 2 has no column 'text'; it has: texd"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', None, "line 2: column 'text' holds int, not text"),
        ("a.jsonl", b'{"text": null}\n{"text": null}\n', "text", "is empty"),
        ("a.jsonl", b'{"x": "a", "y": "b"}\n', None, "line 1: name the column of the text with --text-column"),
        ("a.jsonl", b'{"text": "a"}\n', "body", "line 1 has no column 'body'; it has: text"),
        ("a.parquet", b"PAR1 but not really", None, "a.parquet is not a readable parquet file"),
        ("a.parquet", b"", None, "a.parquet is not a readable parquet file"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path, name, content, column, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as error:
        read_text(str(path), column)
    assert "\n" not in str(error.value)


def test_what_is_wrong_with_rows_is_said_in_one_line(tmp_path):
    numbers = write_parquet(tmp_path / "numbers.parquet", n=[1, 2])
    with pytest.raises(CalibrationError, match="--text-column; it has: n"):
        read_text(numbers)
    with pytest.raises(CalibrationError, match="row 1: column 'n' holds int, not text"):
        read_text(numbers, "n")
    (tmp_path / "plain").mkdir()
    with pytest.raises(CalibrationError, match="was not saved by datasets"):
        read_text(str(tmp_path / "plain"))
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"one": rows, "two": rows}).save_to_disk(tmp_path / "dict")
    with pytest.raises(CalibrationError, match="splits one, two and none is 'train'"):
        read_text(str(tmp_path / "dict"))


@pytest.mark.parametrize("spec", ["nowhere.txt", "./nowhere", "/nowhere/at/all", " "])
def test_a_missing_file_is_not_looked_for_on_the_hub(spec, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(CalibrationError, match="There is no file"):
        read_text(spec)


def test_without_a_network_the_local_forms_are_named():
    with pytest.raises(CalibrationError, match=r"'someone/something'.*Without a network, give a \.txt") as error:
        read_text("someone/something@config:test")
    assert "\n" not in str(error.value)


def test_a_hub_data_set_is_streamed_and_cut(tmp_path, monkeypatch):
    # load_dataset reads a folder of files just as it reads a repository of the hub.
    (tmp_path / "repository").mkdir()
    write_jsonl(tmp_path / "repository" / "train.jsonl", [{"n": i, "text": row} for i, row in enumerate(ROWS)])
    write_jsonl(tmp_path / "repository" / "test.jsonl", [{"n": 0, "text": "held out"}])
    monkeypatch.chdir(tmp_path)
    spec = "./repository"
    assert list(reading._hub_documents(spec, None)) == ROWS
    assert list(reading._hub_documents(f"{spec}:test", None)) == ["held out"]
    with pytest.raises(CalibrationError, match="nosuch"):
        list(reading._hub_documents(f"{spec}:nosuch", None))
    with pytest.raises(CalibrationError, match="nosuch"):
        list(reading._hub_documents(f"{spec}@nosuch", None))
    with pytest.raises(CalibrationError, match="no column 'body'"):
        list(reading._hub_documents(spec, "body"))
    cut = reading.join(iter(ROWS), "x", most=len(ROWS[0]) + 1)
    assert (cut.text, cut.documents, cut.complete) == ("\n\n".join(ROWS[:2]), 2, False)
    assert reading.join(iter(ROWS), "x", most=10**6) == Text.of(JOINED, "x", 3)


# ------------------------------------------------------------------------------------------------- cutting


def tokens_of(split: Split) -> set[int]:
    return {start + i for start in split.starts for i in range(split.seqlen)}


@pytest.mark.parametrize("separate", [False, True])
def test_windows_are_the_texts_tokens_and_no_token_is_in_two_splits(word_tokenizer, separate):
    evaluation = Text.of(" ".join(f"w{i}" for i in range(2000, 2100)), "other") if separate else None
    splits = make_splits(word_tokenizer, words(1000), evaluation, 20, 8, seed=3, eval_windows=None)
    own = torch.tensor([0, *range(2, 1002)])
    other = torch.tensor([0, *range(2002, 2102)])
    for split in splits:
        tokens = other if separate and split.name == "test" else own
        expected = torch.stack([tokens[start : start + 8] for start in split.starts])
        torch.testing.assert_close(split.windows, expected, rtol=0, atol=0)
        assert min(tokens_of(split)) >= split.region[0]
        assert max(tokens_of(split)) < split.region[1]
    of_one_text = list(splits)[: 3 if separate else 4]
    for one, two in itertools.combinations(of_one_text, 2):
        assert not tokens_of(one) & tokens_of(two)
    sizes = [split.region[1] - split.region[0] for split in of_one_text]
    assert sizes == ([600, 200, 201] if separate else [500, 167, 167, 167])


@pytest.mark.parametrize(("length", "nsamples", "seqlen"), [(40, 5, 8), (41, 5, 8), (500, 7, 16), (10, 1, 10)])
def test_random_windows_do_not_overlap_while_they_fit(word_tokenizer, length, nsamples, seqlen):
    for seed in range(20):
        (region,) = cut_text(word_tokenizer, words(length - 1), ("calibration",), nsamples, seqlen).values()
        split = region.random(nsamples, seqlen, seed)
        assert len(tokens_of(split)) == nsamples * seqlen
        assert not split.overlapping


def test_random_windows_are_uniform_over_their_placements(word_tokenizer):
    # Two windows of two tokens in five: at {0, 2}, {0, 3} or {1, 3}, in either order.
    (region,) = cut_text(word_tokenizer, words(4), ("calibration",), 2, 2).values()
    seen = Counter(region.random(2, 2, seed).starts for seed in range(1200))
    assert set(seen) == {(0, 2), (2, 0), (0, 3), (3, 0), (1, 3), (3, 1)}
    assert all(abs(count - 200) < 5 * (1200 * 1 / 6 * 5 / 6) ** 0.5 for count in seen.values())


def test_random_windows_overlap_only_when_they_must_and_then_differ(word_tokenizer):
    split = make_splits(word_tokenizer, words(99), None, 30, 8, seed=0, eval_windows=2).calibration
    assert split.overlapping
    assert len(set(split.starts)) == 30


def test_seeds_change_the_calibration_windows_alone(word_tokenizer):
    def make(seed):
        return make_splits(word_tokenizer, words(1000), None, 20, 8, seed=seed, eval_windows=None)

    one, again, other = make(0), make(0), make(1)
    assert [split.sha256 for split in one] == [split.sha256 for split in again]
    assert one.calibration.sha256 != other.calibration.sha256
    assert [split.sha256 for split in one][1:] == [split.sha256 for split in other][1:]


def test_consecutive_windows_drop_the_remainder_and_stop_at_the_cap(word_tokenizer):
    every = consecutive_split(word_tokenizer, words(42), "test", 8)
    assert every.starts == (0, 8, 16, 24, 32)
    assert every.windows.flatten().tolist() == [0, *range(2, 41)]
    capped = consecutive_split(word_tokenizer, words(42), "test", 8, eval_windows=2)
    assert capped.windows.tolist() == every.windows[:2].tolist()


def test_special_tokens_are_added_once_and_long_texts_pass_without_a_warning(caplog):
    # A tokenizer of its own: each warns once in its life.
    word_tokenizer = make_word_tokenizer()
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            tokens = tokenise(word_tokenizer, words(100))
    finally:
        transformers.logging.disable_propagation()
        transformers.logging.set_verbosity_error()
    assert tokens.tolist() == [0, *range(2, 102)]
    assert not caplog.records
    split = consecutive_split(word_tokenizer, words(100), "test", 8)
    assert split.record()["special_tokens"] == 1


BEGINS = {
    "bos": ("<s> $A", (0,)),
    "bos and eos": ("<s> $A </s>", (0,)),
    "two tokens": ("[gMASK] <s> $A", (5003, 0)),
    "eos": ("$A </s>", ()),
    "nothing": ("$A", ()),
}


def begun(template: str, **special: str) -> transformers.PreTrainedTokenizerBase:
    """The word tokenizer, with another template of a text."""
    tokenizer = make_word_tokenizer()
    tokenizer.add_tokens(["</s>", "[gMASK]"], special_tokens=True)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>", "[gMASK]")]
    backend: Any = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


@pytest.mark.parametrize(("template", "prefix"), BEGINS.values(), ids=BEGINS)
def test_every_window_begins_as_the_tokenizer_begins_a_text(template, prefix):
    tokenizer = begun(template)
    assert prefix_of(tokenizer, "auto") == prefix
    assert prefix_of(tokenizer, "yes") == (prefix or (0,))
    assert prefix_of(tokenizer, "no") == ()
    made = make_splits(tokenizer, words(1000), None, 20, 8, seed=3, eval_windows=None, bos="auto")
    plain = make_splits(tokenizer, words(1000), None, 20, 8, seed=3, eval_windows=None, bos="no")
    for split, other in zip(made, plain, strict=True):
        assert split.windows.shape[1] == split.seqlen == 8
        assert split.record()["prefix"] == list(prefix)
        assert (split.sha256 == other.sha256) == (not prefix)
        assert not split.overlapping
        for window, start in zip(split.windows.tolist(), split.starts, strict=True):
            assert tuple(window[: len(prefix)]) == prefix
            if prefix:
                # The text alone, without the special tokens of a whole text.
                assert window[len(prefix) :] == list(range(start + 2, start + 2 + 8 - len(prefix)))
    for one, two in itertools.combinations(made, 2):
        assert not {s + i for s in one.starts for i in range(one.body)} & {
            s + i for s in two.starts for i in range(two.body)
        }


def test_a_beginning_that_cannot_be_had_is_refused(word_tokenizer):
    without = begun("$A")
    without.bos_token = None
    assert prefix_of(without, "auto") == ()
    with pytest.raises(UsageError, match="--bos yes needs a tokenizer with a BOS token"):
        consecutive_split(without, words(100), "test", 8, bos="yes")
    with pytest.raises(UsageError, match="--bos is auto or yes or no; got maybe"):
        consecutive_split(word_tokenizer, words(100), "test", 8, bos="maybe")
    with pytest.raises(UsageError, match="--seqlen 2 leaves no room for text after 2 tokens"):
        consecutive_split(begun("[gMASK] <s> $A"), words(100), "test", 2, bos="auto")
    with pytest.raises(CalibrationError, match="begins a text with token id 5003, and the model knows 2000"):
        consecutive_split(begun("[gMASK] <s> $A"), words(100), "test", 8, vocabulary=2000, bos="auto")


def test_the_record_is_json_and_says_how_to_make_the_split_again(word_tokenizer):
    splits = make_splits(word_tokenizer, words(1000), None, 20, 8, seed=3, eval_windows=4)
    record = json.loads(json.dumps(splits.record()))
    assert list(record) == ["calibration", "selection", "validation", "test"]
    assert record["calibration"]["seed"] == 3
    assert record["calibration"]["starts"] == list(splits.calibration.starts)
    assert record["test"] == {
        "source": "1000 words",
        "text_sha256": words(1000).sha256,
        "sha256": hashlib.sha256(splits.test.windows.numpy().tobytes()).hexdigest(),
        "windows": 4,
        "seqlen": 8,
        "region": [834, 1001],
        "special_tokens": 1,
        "prefix": [],
        "seed": None,
        "starts": None,
        "overlapping": False,
    }


def test_a_short_text_is_refused_with_the_tokens_there_are_and_the_tokens_needed(word_tokenizer):
    # Two windows of 8 in a sixth of the text: 96 tokens, one of them <s>.
    make_splits(word_tokenizer, words(95), None, 4, 8, seed=0, eval_windows=None)
    with pytest.raises(CalibrationError, match=r"has 95 tokens, .* need at least 96"):
        make_splits(word_tokenizer, words(94), None, 4, 8, seed=0, eval_windows=None)
    # 100 different windows of 8 need 107 tokens in half of the text.
    make_splits(word_tokenizer, words(213), None, 100, 8, seed=0, eval_windows=None)
    with pytest.raises(CalibrationError, match=r"has 213 tokens, .* need at least 214"):
        make_splits(word_tokenizer, words(212), None, 100, 8, seed=0, eval_windows=None)
    with pytest.raises(CalibrationError, match=r"11 words .* has 12 tokens, and test .* need at least 16"):
        make_splits(word_tokenizer, words(1000), words(11), 4, 8, seed=0, eval_windows=None)


def test_a_token_that_the_model_does_not_know_is_refused_wherever_it_stands(word_tokenizer):
    arguments: dict[str, Any] = {"nsamples": 4, "seqlen": 8, "seed": 0, "eval_windows": 2}
    make_splits(word_tokenizer, words(1000), None, **arguments, vocabulary=1002)
    with pytest.raises(CalibrationError, match=r"Token 1000 of 1000 words has id 1001, and the model knows 1001 "):
        make_splits(word_tokenizer, words(1000), None, **arguments, vocabulary=1001)
    with pytest.raises(CalibrationError, match="the model knows 50 tokens"):
        consecutive_split(word_tokenizer, words(100), "test", 8, 2, vocabulary=50)


def test_one_text_cannot_be_calibrated_and_evaluated_on(word_tokenizer):
    with pytest.raises(CalibrationError, match="is the calibration text"):
        make_splits(word_tokenizer, words(1000), words(1000), 4, 8, seed=0, eval_windows=None)
    splits = make_splits(word_tokenizer, words(1000), None, 4, 8, seed=0, eval_windows=None)
    whole = consecutive_split(word_tokenizer, words(1000), "test", 8)
    with pytest.raises(CalibrationError, match="The calibration and test splits share tokens"):
        Splits(splits.calibration, splits.selection, splits.validation, whole)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("nsamples", 0, "--nsamples"),
        ("seqlen", 1, "--seqlen must be at least 2"),
        ("seqlen", 17, "--seqlen 17 is above the model's context of 16"),
        ("eval_windows", 1, "--eval-windows"),
    ],
)
def test_arguments_out_of_range_are_usage_errors(word_tokenizer, argument, value, message):
    arguments = {"nsamples": 4, "seqlen": 8, "seed": 0, "eval_windows": None, "max_length": 16, argument: value}
    with pytest.raises(UsageError, match=message):
        make_splits(word_tokenizer, words(1000), None, **arguments)
    with pytest.raises(UsageError, match=message):
        reference_splits(word_tokenizer, **arguments)


def test_a_split_refuses_windows_outside_of_its_region():
    windows = torch.zeros(2, 4, dtype=torch.int64)
    made = {"name": "test", "source": "x", "text_sha256": "y", "special_tokens": 0}
    Split(windows=windows, starts=(4, 8), region=(4, 12), **made)
    with pytest.raises(CalibrationError, match="outside"):
        Split(windows=windows, starts=(4, 9), region=(4, 12), **made)
    with pytest.raises(CalibrationError, match="outside"):
        Split(windows=windows, starts=(3, 8), region=(4, 12), **made)
    with pytest.raises(CalibrationError, match="n starts"):
        Split(windows=windows, starts=(4,), region=(4, 12), **made)
    with pytest.raises(CalibrationError, match="predict no token"):
        Split(windows=windows[:, :1], starts=(4, 8), region=(4, 12), **made)


def test_the_bundled_texts_are_four_splits(reference_tokenizer):
    splits = reference_splits(reference_tokenizer, nsamples=32, seqlen=128, seed=0, eval_windows=8, max_length=512)
    assert [split.name for split in splits] == ["calibration", "selection", "validation", "test"]
    assert [tuple(split.windows.shape) for split in splits] == [(32, 128), (8, 128), (8, 128), (8, 128)]
    assert len({split.text_sha256 for split in splits}) == 4
    assert splits.test.source == "reference:test"
