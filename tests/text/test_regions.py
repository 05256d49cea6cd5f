"""Tokens of long texts are those of the whole, however it is cut."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer

from globalopt.reference import reference_folder
from globalopt.text import regions
from globalopt.text.reading import Text


class Spaced:
    """A tokenizer that begins every string with a space, as Llama's does: no text may be cut for it."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        self.asked.append(len(text))
        return {"input_ids": list((" " + text).encode())}

    def num_special_tokens_to_add(self) -> int:
        return 0


def test_a_long_text_is_tokenised_in_pieces_with_the_same_tokens(monkeypatch):
    text = Text.of("".join(f"line {i} of\u00a0it . \n \n" for i in range(400)), "a.txt")
    monkeypatch.setattr(regions, "AROUND", 64)
    tokenizer = AutoTokenizer.from_pretrained(reference_folder())
    spaced: Any = Spaced()
    for each in (tokenizer, spaced):
        whole = regions.tokenise(each, text)
        with monkeypatch.context() as patch:
            patch.setattr(regions, "PIECE", 500)
            assert torch.equal(regions.tokenise(each, text), whole)
            cut = regions._pieces(each, text.text)
        assert "".join(cut) == text.text
        assert (len(cut) > 9) == (each is tokenizer)
    assert max(spaced.asked) == len(text.text)


def test_a_text_without_an_end_of_a_line_stays_whole(monkeypatch):
    monkeypatch.setattr(regions, "PIECE", 50)
    tokenizer = AutoTokenizer.from_pretrained(reference_folder())
    assert regions._pieces(tokenizer, "word " * 100) == ["word " * 100]


def test_the_tokens_are_those_of_a_call_also_where_that_is_more_than_the_backend(monkeypatch):
    text, tokenizer = "A short line.\n" * 400, AutoTokenizer.from_pretrained(reference_folder())
    called = tokenizer(text)["input_ids"]
    assert regions.tokenise(tokenizer, Text.of(text, "a.txt")).tolist() == called
    whole = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer),
        "__call__",
        lambda self, part, **options: {"input_ids": [7, *whole(self, part, **options)["input_ids"]]},
    )
    assert regions.tokenise(tokenizer, Text.of(text, "a.txt")).tolist() == [7, *called]


def test_a_setting_of_the_tokenizer_to_cut_or_to_pad_is_not_followed():
    text, tokenizer = "A short line.\n" * 400, AutoTokenizer.from_pretrained(reference_folder())
    called = tokenizer(text)["input_ids"]
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=2**14)
    assert regions.tokenise(tokenizer, Text.of(text, "a.txt")).tolist() == called
