"""Cut the tokens of a text into regions, one for each split, and choose windows inside a region."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from globalopt import reference
from globalopt.errors import CalibrationError, UsageError
from globalopt.text.reading import Text
from globalopt.text.windows import Split
from globalopt.values.own_text import NAME, OwnText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CALIBRATION_SHARE = 3
"""Tokens of a shared text that go to calibration, as a multiple of those that go to each other split."""

LEAST_WINDOWS = 2
"""Smallest number of windows of a split: a mean over fewer has no standard error."""

PIECE = 2**20
"""Fewest characters of a piece of text that is tokenised at once, where it is cut."""
AROUND = 1024
"""Characters before and after a cut, which decide whether tokens reach over it."""
LINE_END = re.compile(r"(?<=\S)\s*\n")


def tokenise(tokenizer: PreTrainedTokenizerBase, text: Text, special: bool = True) -> Tensor:
    """Tokenise the text as one string, (n,) int64 token ids.

    Args:
        special: with the special tokens that the tokenizer adds, once.

    >>> from transformers import AutoTokenizer
    >>> from globalopt.reference import reference_folder
    >>> tokenizer = AutoTokenizer.from_pretrained(reference_folder())
    >>> tokenizer.decode(tokenise(tokenizer, Text.of("A short text.", "a.txt")))
    'A short text.'
    """
    if special and tokenizer.num_special_tokens_to_add():
        return _encoded(tokenizer, text.text, special)
    pieces = _pieces(tokenizer, text.text)
    return torch.cat([_encoded(tokenizer, piece, special) for piece in pieces])


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> Tensor:
    """Tokenise a string, (n,) int64 token ids."""

    def called(part: str) -> list[int]:
        # verbose=False, as the tokenizer would warn of a text longer than the model's context.
        return tokenizer(
            part, truncation=False, return_attention_mask=False, verbose=False, add_special_tokens=special
        )["input_ids"]

    def fast(part: str) -> list[int]:
        # Without the places of the tokens in the text, which nothing reads, it takes .64 of the time.
        return backend.encode_batch_fast([part], add_special_tokens=special)[0].ids

    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    begin = called(text[:AROUND])
    if len(text) <= AROUND:
        found = begin
    elif backend is not None and fast(text[:AROUND]) == begin:
        found = fast(text)
    else:
        # It is none of that library, or does something of its own around it, which shows at the beginning.
        found = called(text)
    return torch.tensor(found, dtype=torch.int64)


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """Cut a long text where its tokens are those of its pieces, one after the other; else leave it whole.

    A tokenizer takes a hundred times the size of a text in memory while it works on it: 1.3 GB for 10 MB.
    """
    pieces, begin = [], 0
    while len(text) - begin > 2 * PIECE:
        found = LINE_END.search(text, begin + PIECE, begin + 2 * PIECE)
        if found is None:
            return [text]
        end = found.start()
        before, after = text[end - AROUND : end], text[end : end + AROUND]
        together = _encoded(tokenizer, before + after)
        if not torch.equal(together, torch.cat([_encoded(tokenizer, before), _encoded(tokenizer, after)])):
            # Such as one that begins every string with a space of its own.
            return [text]
        pieces.append(text[begin:end])
        begin = end
    return [*pieces, text[begin:]]


@dataclass(frozen=True, eq=False)
class Region:
    """Reserve the tokens `[first, end)` of a text for one split.

    Args:
        name: of the split.
        source, text_sha256: the text's spec and hash.
        tokens: those of the whole text.
        first, end: bounds of the region.
        special_tokens: how many the tokenizer added to the whole text.
        prefix: tokens with which every window begins.
        in_order: whether calibration windows too are consecutive, as those of a text that was drawn at random.
        details: how the text itself was made, in JSON values.

    >>> region = Region("test", "a.txt", "9f2c", torch.arange(20), first=5, end=20, special_tokens=0)
    >>> region.capacity(seqlen=4), region.consecutive(seqlen=4, most=2).windows.tolist()
    (3, [[5, 6, 7, 8], [9, 10, 11, 12]])
    """

    name: str
    source: str
    text_sha256: str
    tokens: Tensor
    first: int
    end: int
    special_tokens: int
    prefix: tuple[int, ...] = ()
    in_order: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)

    def capacity(self, seqlen: int) -> int:
        """Return the number of windows that fit without overlap."""
        return (self.end - self.first) // (seqlen - len(self.prefix))

    def fill(self, count: int | None, seqlen: int, seed: int) -> Split:
        """Choose the windows of the split: `count` random ones for calibration, at most `count` consecutive ones else.

        Args:
            count: None is all that fit; not for calibration.
        """
        if self.name == "calibration" and not self.in_order:
            assert count is not None
            return self.random(count, seqlen, seed)
        return self.consecutive(seqlen, count)

    def random(self, nsamples: int, seqlen: int, seed: int) -> Split:
        """Draw `nsamples` windows in random order, uniformly among all placements without overlap.

        Where there are too few tokens for that, windows overlap and only their starts differ.
        """
        generator = torch.Generator().manual_seed(seed)
        body = seqlen - len(self.prefix)
        slack = self.end - self.first - nsamples * body
        if slack >= 0:
            # Choosing n of slack + n places is the same as distributing the slack over the gaps around n windows.
            places = torch.randperm(slack + nsamples, generator=generator)[:nsamples].sort().values
            starts = places + torch.arange(nsamples) * (body - 1)
            starts = starts[torch.randperm(nsamples, generator=generator)]
        else:
            starts = torch.randperm(self.end - self.first - body + 1, generator=generator)[:nsamples]
        return self._split(starts, seqlen, seed)

    def consecutive(self, seqlen: int, most: int | None) -> Split:
        """Cut consecutive windows, at most `most`, and drop the remainder."""
        whole = self.capacity(seqlen)
        count = whole if most is None else min(whole, most)
        return self._split(torch.arange(count) * (seqlen - len(self.prefix)), seqlen, None)

    def _split(self, starts: Tensor, seqlen: int, seed: int | None) -> Split:
        """Make the split of windows that start at `starts`, counted from the beginning of the region."""
        starts = self.first + starts
        text = self.tokens[starts[:, None] + torch.arange(seqlen - len(self.prefix))]
        return Split(
            name=self.name,
            windows=torch.cat([text.new_tensor(self.prefix).expand(len(text), -1), text], 1),
            starts=tuple(starts.tolist()),
            region=(self.first, self.end),
            source=self.source,
            text_sha256=self.text_sha256,
            special_tokens=self.special_tokens,
            seed=seed,
            prefix=self.prefix,
            details=self.details,
        )


def cut_text(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    names: tuple[str, ...],
    nsamples: int,
    seqlen: int,
    vocabulary: int | None = None,
    prefix: tuple[int, ...] = (),
) -> dict[str, Region]:
    """Cut a text's tokens into contiguous regions by name of their splits, `CALIBRATION_SHARE` parts to one.

    Args:
        nsamples: calibration windows that the text must have room for, if they may overlap.
        vocabulary: how many tokens the model knows, which no token id may reach; None when unknown.
    Raises:
        CalibrationError: the text is too short for the windows, or a token id is above the vocabulary.
        UsageError: a window has no room for a token of the text.

    >>> from transformers import AutoTokenizer
    >>> from globalopt.reference import reference_folder
    >>> tokenizer, text = AutoTokenizer.from_pretrained(reference_folder()), Text.of("A short text. " * 200, "a.txt")
    >>> [(name, region.end) for name, region in cut_text(tokenizer, text, ("calibration", "test"), 8, 16).items()]
    [('calibration', 600), ('test', 801)]
    """
    body = seqlen - len(prefix)
    if body < 1:
        raise UsageError(f"--seqlen {seqlen} leaves no room for text after {len(prefix)} tokens of --bos; raise it.")
    tokens = tokenise(tokenizer, text, special=not prefix)
    check_prefix(prefix, vocabulary)
    if vocabulary is not None and len(tokens) and int(tokens.max()) >= vocabulary:
        at = int((tokens >= vocabulary).nonzero()[0])
        raise CalibrationError(
            f"Token {at} of {text.spec} has id {int(tokens[at])}, and the model knows {vocabulary} tokens: its "
            "tokenizer has more. Use the tokenizer it was trained with, or resize the model's embeddings."
        )
    shares = [CALIBRATION_SHARE if name == "calibration" else 1 for name in names]
    least = [nsamples + body - 1 if name == "calibration" else LEAST_WINDOWS * body for name in names]
    needed = max(math.ceil(n * sum(shares) / share) for n, share in zip(least, shares, strict=True))
    if len(tokens) < needed:
        raise CalibrationError(
            f"{text.spec} is too short: it has {len(tokens)} tokens, and {', '.join(names)} with windows of {seqlen} "
            f"need at least {needed}. Give a longer text or a smaller --seqlen."
        )
    special = 0 if prefix else tokenizer.num_special_tokens_to_add()
    ends = [len(tokens) * sum(shares[: i + 1]) // sum(shares) for i in range(len(shares))]
    bounds = zip(names, [0, *ends[:-1]], ends, strict=True)
    return {
        name: Region(name, text.spec, text.sha256, tokens, first, end, special, prefix) for name, first, end in bounds
    }


def cut_reference(
    tokenizer: PreTrainedTokenizerBase,
    names: tuple[str, ...],
    nsamples: int,
    seqlen: int,
    vocabulary: int | None = None,
    prefix: tuple[int, ...] = (),
) -> dict[str, Region]:
    """Make each of the bundled texts one region; arguments and errors are those of `cut_text`.

    >>> from transformers import AutoTokenizer
    >>> from globalopt.reference import reference_folder
    >>> tokenizer = AutoTokenizer.from_pretrained(reference_folder())
    >>> cut_reference(tokenizer, ("selection",), 8, 16)["selection"].source
    'reference:selection'
    """
    found: dict[str, Region] = {}
    for name in names:
        text = Text.of(reference.text_file(name).read_bytes().decode(), f"{reference.NAME}:{name}")
        found |= cut_text(tokenizer, text, (name,), nsamples, seqlen, vocabulary, prefix)
    return found


def cut_own(text: OwnText) -> dict[str, Region]:
    """Make the sequences that a model wrote regions, by name of the splits that they were written for.

    >>> text = OwnText(torch.arange(12).view(4, 3), {"calibration": 3, "test": 1}, prefix=(), seed=0)
    >>> cut_own(text)["test"].consecutive(seqlen=3, most=None).windows.tolist()
    [[9, 10, 11]]
    """
    body = text.seqlen - len(text.prefix)
    tokens = text.windows[:, len(text.prefix) :].flatten()
    found: dict[str, Region] = {}
    first = 0
    for name, count in text.counts.items():
        end = first + count * body
        found[name] = Region(
            name, NAME, text.sha256, tokens, first, end, 0, text.prefix, in_order=True, details=text.record()
        )
        first = end
    return found


def check_prefix(prefix: tuple[int, ...], vocabulary: int | None) -> None:
    """Raise `CalibrationError` if the model does not know a token with which windows begin.

    >>> check_prefix((1,), vocabulary=32000)
    """
    if vocabulary is not None and prefix and max(prefix) >= vocabulary:
        raise CalibrationError(
            f"The tokenizer begins a text with token id {max(prefix)}, and the model knows {vocabulary} tokens. Use "
            "the tokenizer it was trained with, or --bos no."
        )
