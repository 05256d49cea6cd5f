"""Let a model write text: sample sequences from its own predictions, from the beginning of a document on.

Tokens are drawn from the whole distribution at temperature 1. A sequence is filled: where the model ends a document by
a stop token, the next document begins in the same sequence.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from globalopt.errors import NumericalError
from globalopt.evaluation.decoding import continued

Prompt = tuple[int, ...]
"""Token ids of a prompt, without those with which every document begins."""


@dataclass(frozen=True)
class Opening:
    """Say how the documents that a model writes begin and end.

    Args:
        begin: tokens in front of every document, such as a BOS.
        kept: whether those in front of a sequence are part of it.
        first: tokens of which one, each as likely, begins a document without `begin` and without a prompt.
        stops: tokens that end a document.
        vocabulary: how many tokens the model knows.

    >>> Opening(begin=(1,), kept=False, first=(), stops=frozenset({2}), vocabulary=128).dropped
    1
    """

    begin: tuple[int, ...]
    kept: bool
    first: tuple[int, ...]
    stops: frozenset[int]
    vocabulary: int

    @property
    def dropped(self) -> int:
        """Return the number of tokens that the model reads before a sequence and that are not part of it."""
        return 0 if self.kept else len(self.begin)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prefix: tuple[int, ...],
        vocabulary: int,
        templated: bool = False,
    ) -> Opening:
        """Find how the documents of a model begin and end.

        They begin with `prefix` if windows do; else with the BOS token of the tokenizer or of the model's config, which
        is then no part of a sequence; else, in a model without a BOS, with any token that is not special. A document
        ends with an end token of the tokenizer, of the config or of the generation config.

        Args:
            prefix: tokens with which every window begins.
            templated: whether prompts were written by a chat template, which has a beginning of its own.

        >>> from globalopt.pipeline.example import example_tokenizer
        >>> from globalopt.reference.tiny import tiny_llama
        >>> opening = Opening.of(tiny_llama(), example_tokenizer(), prefix=(), vocabulary=32)
        >>> opening.begin, opening.kept, sorted(opening.stops)
        ((1,), False, [2])
        """
        config: Any = model.config.get_text_config(decoder=True)
        places = [tokenizer, config, getattr(model, "generation_config", None)]
        stops = {token for place in places for token in _tokens(getattr(place, "eos_token_id", None))}
        begins = [token for place in places[:2] for token in _tokens(getattr(place, "bos_token_id", None))]
        known = [token for token in begins if token < vocabulary]
        begin = prefix or (() if templated else tuple(known[:1]))
        first: tuple[int, ...] = ()
        if not begin and not templated:
            special = {*tokenizer.all_special_ids, *stops}
            first = tuple(token for token in range(min(vocabulary, len(tokenizer))) if token not in special)
        return cls(begin, bool(prefix) or not begin, first, frozenset(stops), vocabulary)


def write_sequences(
    model: PreTrainedModel,
    opening: Opening,
    length: int,
    rows: Sequence[int],
    seed: int,
    prompts: Sequence[Sequence[Prompt]] = (),
    advance: Callable[[], None] = lambda: None,
) -> Tensor:
    """Sample sequences, (len(rows), length) int64 token ids.

    A sequence depends on the seed and on its own number, and on the others only by the rounding of a batch.

    Args:
        model: in evaluation mode, with all weights in memory.
        opening: how documents begin and end.
        length: tokens of every sequence.
        rows: numbers of the sequences, different for different ones.
        seed: of the sampling.
        prompts: those of every sequence: it begins with the first one, and later documents in it with any of them.
            Empty: documents begin without a prompt.
        advance: called after every token of the batch.
    Raises:
        NumericalError: predictions are not finite.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> opening = Opening(begin=(1,), kept=True, first=(), stops=frozenset({2}), vocabulary=32)
    >>> one = write_sequences(tiny_llama(), opening, 6, rows=[0, 1], seed=0)
    >>> one.shape, one[:, 0].tolist(), torch.equal(one, write_sequences(tiny_llama(), opening, 6, [0, 1], seed=0))
    (torch.Size([2, 6]), [1, 1], True)
    """
    pages = [_Page(opening, seed, row, prompts[i] if prompts else ()) for i, row in enumerate(rows)]
    read = min(len(page.waiting) for page in pages)
    starts = torch.tensor([page.take(read) for page in pages])
    whole = length + opening.dropped
    # A number for every place, so that a sequence does not depend on how many tokens of others are read at once.
    chances = torch.stack([page.chances(whole) for page in pages])
    place = read

    def choose(logits: Tensor) -> Tensor:
        nonlocal place
        drawn = _drawn(logits[:, : opening.vocabulary], chances[:, place]).tolist()
        place += 1
        advance()
        return torch.tensor([page.next(token) for page, token in zip(pages, drawn, strict=True)])

    return torch.cat([starts, continued(model, starts, whole - read, choose)], 1)[:, opening.dropped :]


class _Page:
    """Hold what is to be written into one sequence next, and the chance by which its tokens are drawn."""

    def __init__(self, opening: Opening, seed: int, row: int, prompts: Sequence[Prompt]) -> None:
        own = int.from_bytes(hashlib.sha256(f"{seed} {row}".encode()).digest()[:7])
        self._opening = opening
        self._prompts = prompts
        self._chance = random.Random(own)
        self._generator = torch.Generator().manual_seed(own)
        self.waiting = self._document(prompts[0] if prompts else ())

    def _document(self, prompt: Prompt) -> list[int]:
        """Begin a document; of one without any beginning, draw its first token."""
        found = [*self._opening.begin, *prompt]
        return found or [self._chance.choice(self._opening.first)]

    def take(self, count: int) -> list[int]:
        """Return the first tokens that wait, which are read at once."""
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return taken

    def chances(self, places: int) -> Tensor:
        """Draw numbers in [0, 1), one for every place of the sequence."""
        return torch.rand(places, generator=self._generator)

    def next(self, drawn: int) -> int:
        """Return the next token: one that waits, else the one that was drawn; a stop token lets a document wait."""
        if self.waiting:
            return self.waiting.pop(0)
        if drawn in self._opening.stops:
            self.waiting = self._document(self._chance.choice(self._prompts) if self._prompts else ())
            if self.waiting[0] == drawn:
                # One token that ends a document and begins the next.
                del self.waiting[0]
        return drawn


def _drawn(logits: Tensor, chances: Tensor) -> Tensor:
    """Draw a token per row (n,) from the softmax of logits (n, vocabulary), by numbers (n,) in [0, 1)."""
    sums = logits.float().softmax(-1).cumsum(-1)
    total = sums[:, -1:]
    if not bool(torch.isfinite(total).all()):
        raise NumericalError("The model's own predictions are not finite, so that no text can be sampled from them.")
    # Rounded up to the sum itself, a point would lie behind the last token.
    point = torch.minimum(chances[:, None].to(sums.device) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, point, right=True)[:, 0]


def _tokens(value: Any) -> list[int]:
    """List the token ids of a config's field, which is a number, several, or nothing."""
    return [value] if isinstance(value, int) else list(value or ())
