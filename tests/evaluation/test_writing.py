"""A model writes what it predicts: by its own distribution, by a seed, and on and on where a document ends."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from globalopt.errors import NumericalError
from globalopt.evaluation import writing
from globalopt.evaluation.writing import Opening, write_sequences
from tests.tiny_models import VOCAB, tiny_model, tiny_tokenizer

BOS, EOS = 1, 2
OPENING = Opening((BOS,), True, (), frozenset({EOS}), VOCAB)


def opening(**changed: Any) -> Opening:
    return Opening(**{**vars(OPENING), **changed})


def test_a_sequence_depends_on_the_seed_and_on_its_number_alone() -> None:
    model = tiny_model("llama")
    whole = write_sequences(model, OPENING, 12, range(6), seed=0)
    assert whole.shape == (6, 12)
    assert whole.dtype == torch.int64
    assert torch.equal(write_sequences(model, OPENING, 12, [2, 3], seed=0), whole[2:4])
    assert not torch.equal(write_sequences(model, OPENING, 12, range(6), seed=1), whole)
    assert len({tuple(row) for row in whole.tolist()}) == 6


@torch.no_grad()
def test_tokens_are_drawn_from_the_whole_distribution() -> None:
    model = tiny_model("llama")
    found = Counter(write_sequences(model, opening(stops=frozenset()), 2, range(2000), seed=0)[:, 1].tolist())
    expected = model(input_ids=torch.tensor([[BOS]])).logits[0, -1].softmax(-1)
    assert len(found) > 20
    for token, chance in enumerate(expected.tolist()):
        assert abs(found[token] - 2000 * chance) <= 5 * (2000 * chance * (1 - chance)) ** 0.5 + 1


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    drawn = {
        int(writing._drawn(logits, torch.tensor([chance]))) for chance in (0.0, 0.4999, 0.5, 0.99, 1 - 2**-24, 1.0)
    }
    assert drawn == {0, 2}
    with pytest.raises(NumericalError, match="predictions are not finite"):
        writing._drawn(torch.tensor([[torch.nan, 1.0]]), torch.tensor([0.5]))


def sequences(script: list[int], used: Opening, length: int, prompts: Any = ()) -> list[int]:
    """What is written by a model that always draws the tokens of a script."""
    page, tokens = writing._Page(used, 0, 0, prompts), iter(script)
    written = page.take(1)
    while len(written) < length + used.dropped:
        waiting = bool(page.waiting)
        written.append(page.next(-1 if waiting else next(tokens)))
    return written[used.dropped :]


def test_where_a_document_ends_the_next_one_begins_in_the_same_sequence() -> None:
    assert sequences([5, EOS, 6, 7], OPENING, 6) == [BOS, 5, EOS, BOS, 6, 7]
    # Read before the sequence, and not kept there; kept between documents.
    assert sequences([5, EOS, 6, 7], opening(kept=False), 5) == [5, EOS, BOS, 6, 7]
    # One token both ends a document and begins the next.
    assert sequences([5, EOS, 6, 7], opening(begin=(EOS,), kept=False), 4) == [5, EOS, 6, 7]
    first, *rest = sequences([5, EOS, 6], opening(begin=(), first=(90, 91)), 5)
    assert (first in (90, 91), rest[0], rest[1], rest[2] in (90, 91), rest[3]) == (True, 5, EOS, True, 6)
    written = sequences([5, EOS, 6], OPENING, 9, [(30, 31), (30, 31)])
    assert written == [BOS, 30, 31, 5, EOS, BOS, 30, 31, 6]


def test_prompts_of_different_lengths_stand_at_the_beginnings_of_their_sequences() -> None:
    prompts = [[(30,)], [(40, 41, 42, 43)], [(50, 51)]]
    found = write_sequences(tiny_model("llama"), OPENING, 10, range(3), 0, prompts).tolist()
    assert [row[: 1 + len(own[0])] for row, own in zip(found, prompts, strict=True)] == [
        [BOS, *own[0]] for own in prompts
    ]
    alone = write_sequences(tiny_model("llama"), OPENING, 10, [1], 0, prompts[1:2]).tolist()
    assert alone[0][:6] == found[1][:6]


def test_every_token_is_told_of() -> None:
    told: list[None] = []
    write_sequences(tiny_model("llama"), OPENING, 7, range(2), 0, advance=lambda: told.append(None))
    assert len(told) == 6


def test_documents_begin_and_end_as_tokenizer_and_config_say() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert Opening.of(model, tokenizer, (BOS,), VOCAB) == OPENING
    found = Opening.of(model, tokenizer, (), VOCAB)
    assert (found.begin, found.kept, found.dropped) == ((BOS,), False, 1)
    # A template has a beginning of its own.
    found = Opening.of(model, tokenizer, (), VOCAB, templated=True)
    assert (found.begin, found.kept, found.first) == ((), True, ())
    model.generation_config = SimpleNamespace(eos_token_id=[7, 8])  # pyright: ignore[reportAttributeAccessIssue]
    model.config.eos_token_id = 9
    assert Opening.of(model, tokenizer, (), VOCAB).stops == {EOS, 7, 8, 9}
    model.config.eos_token_id = None
    tokenizer.bos_token = None
    model.config.bos_token_id = 5
    assert Opening.of(model, tokenizer, (), VOCAB).begin == (5,)
    for unknown in (None, VOCAB):
        model.config.bos_token_id = unknown
        found = Opening.of(model, tokenizer, (), VOCAB)
        assert (found.begin, found.kept) == ((), True)
        assert found.first
        assert not {0, EOS, 3, 7, 8} & {*found.first}
        assert max(found.first) < len(tokenizer)
