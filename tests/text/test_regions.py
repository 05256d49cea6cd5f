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
