"""Cut texts into calibration, selection, validation and test windows that do not overlap.

The windows of a split lie inside one region of a text's tokens, and `Splits` refuses regions that overlap, so that
nothing can be fitted, chosen and measured on the same tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from globalopt import reference
from globalopt.errors import CalibrationError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from globalopt.text.reading import Text

CALIBRATION_SHARE = 3
"""Tokens of a shared text that go to calibration, as a multiple of those that go to each other split."""

BOS_CHOICES = ("auto", "yes", "no")
"""Whether every window begins as the tokenizer begins a text: "auto" does as the tokenizer does."""

LEAST_WINDOWS = 2
"""Smallest number of windows of a split: a mean over fewer has no standard error."""


@dataclass(frozen=True, eq=False)
class Split:
    """Hold the token windows of one purpose.

    Args:
        name: "calibration", "selection", "validation" or "test".
        windows: (n, seqlen) int64 token ids.
        starts: where what each window has of the text starts in its token sequence.
        region: the tokens `[first, end)` of the text that this split may use.
        source, text_sha256: the text's spec and hash.
        special_tokens: how many the tokenizer added to the whole text.
        seed: of random windows; None for consecutive ones.
        prefix: tokens, such as a BOS, with which every window begins, in front of `seqlen - len(prefix)` tokens of the
            text. They are given, never predicted.
    Raises:
        CalibrationError: the windows are not (n, seqlen) int64 of at least two tokens, or one lies outside the region.

    >>> windows = torch.arange(8).view(2, 4)
    >>> split = Split("test", windows, (0, 4), region=(0, 9), source="a.txt", text_sha256="9f2c", special_tokens=0)
    >>> split.seqlen, split.overlapping
    (4, False)
    """

    name: str
    windows: Tensor
    starts: tuple[int, ...]
    region: tuple[int, int]
    source: str
    text_sha256: str
    special_tokens: int
    seed: int | None = None
    prefix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.windows.dim() != 2 or self.windows.dtype != torch.int64 or len(self.starts) != len(self.windows):
            raise CalibrationError(
                f"Split {self.name}: windows must be (n, seqlen) int64 with n starts; got {self.windows.dtype} "
                f"{tuple(self.windows.shape)} and {len(self.starts)} starts."
            )
        if min(self.windows.shape) < 1 or self.seqlen < 2 or self.body < 1:
            raise CalibrationError(f"Split {self.name}: {tuple(self.windows.shape)} windows predict no token.")
        first, end = self.region
        if min(self.starts) < first or max(self.starts) + self.body > end:
            raise CalibrationError(f"Split {self.name}: a window lies outside of its tokens {first} to {end}.")

    @property
    def seqlen(self) -> int:
        """Return the number of tokens of a window."""
        return self.windows.shape[1]

    @property
    def body(self) -> int:
        """Return the number of tokens of the text in a window."""
        return self.seqlen - len(self.prefix)

    @property
    def given(self) -> int:
        """Return the number of first tokens of a window that are not predicted: the prefix, or one token."""
        return max(1, len(self.prefix))

    @property
    def overlapping(self) -> bool:
        """Tell whether two windows share a token."""
        ordered = sorted(self.starts)
        return any(b - a < self.body for a, b in itertools.pairwise(ordered))

    @cached_property
    def sha256(self) -> str:
        """Hash the token ids, row after row, as little-endian 64-bit integers."""
        return hashlib.sha256(self.windows.contiguous().numpy().astype("<i8").tobytes()).hexdigest()

    def record(self) -> dict[str, Any]:
        """Describe how the split was made, in JSON values; the starts of consecutive windows follow from the region."""
        return {
            "source": self.source,
            "text_sha256": self.text_sha256,
            "sha256": self.sha256,
            "windows": len(self.windows),
            "seqlen": self.seqlen,
            "region": list(self.region),
            "special_tokens": self.special_tokens,
            "prefix": list(self.prefix),
            "seed": self.seed,
            "starts": None if self.seed is None else list(self.starts),
            "overlapping": self.overlapping,
        }


@dataclass(frozen=True)
class Splits:
    """Hold four disjoint splits: one to fit on, one to search on, one to compare variants on, and one only to report.

    Raises:
        CalibrationError: two splits share tokens of the same text.

    >>> def split(name, first):
    ...     windows, starts = torch.arange(8).view(2, 4), (first, first + 4)
    ...     return Split(name, windows, starts, (first, first + 8), "a.txt", "9f2c", special_tokens=0)
    >>> Splits(split("calibration", 0), split("selection", 8), split("validation", 16), split("test", 20))
    Traceback (most recent call last):
        ...
    globalopt.errors.CalibrationError: The validation and test splits share tokens of a.txt; give different texts.
    """

    calibration: Split
    selection: Split
    validation: Split
    test: Split

    def __post_init__(self) -> None:
        for one, other in itertools.combinations(self, 2):
            shared = one.text_sha256 == other.text_sha256
            if shared and one.region[0] < other.region[1] and other.region[0] < one.region[1]:
                raise CalibrationError(
                    f"The {one.name} and {other.name} splits share tokens of {one.source}; give different texts."
                )

    def __iter__(self) -> Iterator[Split]:
        """Iterate over the four splits."""
        return iter((self.calibration, self.selection, self.validation, self.test))

    def record(self) -> dict[str, dict[str, Any]]:
        """Describe how every split was made, in JSON values by name."""
        return {split.name: split.record() for split in self}


# ------------------------------------------------------------------------------------------------- cutting


def make_splits(
    tokenizer: PreTrainedTokenizerBase,
    calibration: Text,
    evaluation: Text | None,
    nsamples: int,
    seqlen: int,
    seed: int,
    eval_windows: int | None,
    max_length: int | None = None,
    vocabulary: int | None = None,
    bos: str = "no",
) -> Splits:
    """Cut a text into splits, by tokens: three fifths calibration, a fifth selection, a fifth validation.

    `evaluation` becomes the test split; without it a sixth of the calibration text does, and the others share the
    rest in the same proportion. Calibration windows are random, and overlap only where the text is too short to avoid
    it; the windows of the other splits are consecutive.

    Args:
        tokenizer: of the model.
        calibration: the text to cut.
        evaluation: another text, for the test split; or None.
        nsamples: calibration windows.
        seqlen: tokens of every window.
        seed: of the random windows.
        eval_windows: most windows of each other split, at least 2; None for all.
        max_length: the model's context, which `seqlen` may not exceed; None when unknown.
        vocabulary: how many tokens the model knows, which no token id may reach; None when unknown.
        bos: one of `BOS_CHOICES`; see `prefix_of`.
    Raises:
        CalibrationError: a text is too short, or both are the same, or a token id is above the vocabulary.
        UsageError: an argument is out of its range.

    >>> from transformers import AutoTokenizer
    >>> from globalopt.models.loading import reference_folder
    >>> tokenizer, text = AutoTokenizer.from_pretrained(reference_folder()), Text.of("A short text. " * 200, "a.txt")
    >>> splits = make_splits(tokenizer, text, None, nsamples=8, seqlen=16, seed=0, eval_windows=4)
    >>> [(split.name, *split.windows.shape) for split in splits]
    [('calibration', 8, 16), ('selection', 4, 16), ('validation', 4, 16), ('test', 4, 16)]
    """
    _check(nsamples, seqlen, eval_windows, max_length)
    prefix = prefix_of(tokenizer, bos)
    if evaluation is not None and evaluation.sha256 == calibration.sha256:
        raise CalibrationError(
            f"The evaluation text {evaluation.spec} is the calibration text; leave it out and a part of the "
            "calibration text is held out."
        )
    names = ("calibration", "selection", "validation")
    if evaluation is None:
        regions = _cut(tokenizer, calibration, (*names, "test"), nsamples, seqlen, vocabulary, prefix)
    else:
        regions = _cut(tokenizer, calibration, names, nsamples, seqlen, vocabulary, prefix)
        regions += _cut(tokenizer, evaluation, ("test",), nsamples, seqlen, vocabulary, prefix)
    return Splits(**{region.name: region.fill(nsamples, seqlen, seed, eval_windows) for region in regions})


def reference_splits(
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int,
    seqlen: int,
    seed: int,
    eval_windows: int | None,
    max_length: int | None = None,
    vocabulary: int | None = None,
    bos: str = "no",
) -> Splits:
    """Cut the bundled texts into splits, one text each; arguments and errors are those of `make_splits`.

    >>> class Bytes:  # a tokenizer that is faster than a real one
    ...     def __call__(self, text, **options):
    ...         return {"input_ids": list(text.encode())}
    ...     def num_special_tokens_to_add(self):
    ...         return 0
    >>> splits = reference_splits(Bytes(), nsamples=2, seqlen=8, seed=0, eval_windows=2)
    >>> [split.source for split in splits]
    ['reference:calibration', 'reference:selection', 'reference:validation', 'reference:test']
    """
    _check(nsamples, seqlen, eval_windows, max_length)
    prefix = prefix_of(tokenizer, bos)
    splits = {}
    for name in reference.SPLITS:
        text = Text.of(reference.text_file(name).read_bytes().decode(), f"{reference.NAME}:{name}")
        (region,) = _cut(tokenizer, text, (name,), nsamples, seqlen, vocabulary, prefix)
        splits[name] = region.fill(nsamples, seqlen, seed, eval_windows)
    return Splits(**splits)


def consecutive_split(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    name: str,
    seqlen: int,
    eval_windows: int | None = None,
    max_length: int | None = None,
    vocabulary: int | None = None,
    bos: str = "no",
) -> Split:
    """Cut the first `eval_windows` windows (None: all) of a whole text, one after the other, and drop the remainder.

    This is the perplexity protocol of GPTQ, SparseGPT and their successors.

    Args:
        tokenizer: of the model.
        text: the text to cut.
        name: of the split.
        seqlen, eval_windows, max_length, vocabulary, bos: as in `make_splits`.
    Raises:
        CalibrationError: the text has fewer than 2 windows, or a token id is above the vocabulary.
        UsageError: an argument is out of its range.

    >>> from transformers import AutoTokenizer
    >>> from globalopt.models.loading import reference_folder
    >>> tokenizer, text = AutoTokenizer.from_pretrained(reference_folder()), Text.of("A short text. " * 200, "a.txt")
    >>> consecutive_split(tokenizer, text, "test", seqlen=16, eval_windows=3).starts
    (0, 16, 32)
    """
    _check(1, seqlen, eval_windows, max_length)
    (region,) = _cut(tokenizer, text, (name,), 1, seqlen, vocabulary, prefix_of(tokenizer, bos))
    return region.consecutive(seqlen, eval_windows)


def prefix_of(tokenizer: PreTrainedTokenizerBase, choice: str) -> tuple[int, ...]:
    """Return the tokens with which every window begins.

    Args:
        choice: "no": none, then only the text as a whole begins as the tokenizer says; "auto": those that the tokenizer
            puts in front of every text, if any; "yes": those, or else the tokenizer's BOS token.
    Raises:
        UsageError: "yes", and the tokenizer has no BOS token; or there is no such choice.

    >>> from transformers import AutoTokenizer
    >>> from globalopt.models.loading import reference_folder
    >>> tokenizer = AutoTokenizer.from_pretrained(reference_folder())
    >>> prefix_of(tokenizer, "auto"), tokenizer.decode(prefix_of(tokenizer, "yes"))
    ((), '<s>')
    """
    if choice not in BOS_CHOICES:
        raise UsageError(f"--bos is {' or '.join(BOS_CHOICES)}; got {choice}.")
    if choice == "no":
        return ()
    encoded, bare = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
    places = range(1, len(encoded) - len(bare) + 1)
    found = next((i for i in places if encoded[i : i + len(bare)] == bare), 0) if bare != encoded[: len(bare)] else 0
    if found or choice == "auto":
        return tuple(encoded[:found])
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        raise UsageError("--bos yes needs a tokenizer with a BOS token, and this one has none; use --bos no.")
    return (bos,)


def tokenise(tokenizer: PreTrainedTokenizerBase, text: Text, special: bool = True) -> Tensor:
    """Tokenise the text as one string, (n,) int64 token ids.

    Args:
        special: with the special tokens that the tokenizer adds, once.

    >>> from transformers import AutoTokenizer
    >>> from globalopt.models.loading import reference_folder
    >>> tokenizer = AutoTokenizer.from_pretrained(reference_folder())
    >>> tokenizer.decode(tokenise(tokenizer, Text.of("A short text.", "a.txt")))
    'A short text.'
    """
    # verbose=False, as the tokenizer would warn of a text longer than the model's context.
    encoded = tokenizer(
        text.text, truncation=False, return_attention_mask=False, verbose=False, add_special_tokens=special
    )
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class _Region:
    """Reserve the tokens `[first, end)` of a text for one split; `tokens` are those of the whole text.

    Every window begins with the tokens `prefix`.
    """

    name: str
    text: Text
    tokens: Tensor
    first: int
    end: int
    special_tokens: int
    prefix: tuple[int, ...] = ()

    def fill(self, nsamples: int, seqlen: int, seed: int, eval_windows: int | None) -> Split:
        """Choose the windows of the split: random ones for calibration, consecutive ones for all others."""
        if self.name == "calibration":
            return self.random(nsamples, seqlen, seed)
        return self.consecutive(seqlen, eval_windows)

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

    def consecutive(self, seqlen: int, eval_windows: int | None) -> Split:
        """Cut consecutive windows, at most `eval_windows`, and drop the remainder."""
        body = seqlen - len(self.prefix)
        whole = (self.end - self.first) // body
        count = whole if eval_windows is None else min(whole, eval_windows)
        return self._split(torch.arange(count) * body, seqlen, None)

    def _split(self, starts: Tensor, seqlen: int, seed: int | None) -> Split:
        """Make the split of windows that start at `starts`, counted from the beginning of the region."""
        starts = self.first + starts
        text = self.tokens[starts[:, None] + torch.arange(seqlen - len(self.prefix))]
        return Split(
            name=self.name,
            windows=torch.cat([text.new_tensor(self.prefix).expand(len(text), -1), text], 1),
            starts=tuple(starts.tolist()),
            region=(self.first, self.end),
            source=self.text.spec,
            text_sha256=self.text.sha256,
            special_tokens=self.special_tokens,
            seed=seed,
            prefix=self.prefix,
        )


def _cut(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    names: tuple[str, ...],
    nsamples: int,
    seqlen: int,
    vocabulary: int | None = None,
    prefix: tuple[int, ...] = (),
) -> list[_Region]:
    """Cut a text's tokens into contiguous regions, one per name, `CALIBRATION_SHARE` parts to one.

    Raises:
        CalibrationError: the text is too short for the windows, or a token id is above the vocabulary.
        UsageError: a window has no room for a token of the text.
    """
    body = seqlen - len(prefix)
    if body < 1:
        raise UsageError(f"--seqlen {seqlen} leaves no room for text after {len(prefix)} tokens of --bos; raise it.")
    tokens = tokenise(tokenizer, text, special=not prefix)
    if vocabulary is not None and prefix and max(prefix) >= vocabulary:
        raise CalibrationError(
            f"The tokenizer begins a text with token id {max(prefix)}, and the model knows {vocabulary} tokens. Use "
            "the tokenizer it was trained with, or --bos no."
        )
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
    return [_Region(name, text, tokens, first, end, special, prefix) for name, first, end in bounds]


def _check(nsamples: int, seqlen: int, eval_windows: int | None, max_length: int | None) -> None:
    """Check the sizes of windows; `UsageError` naming the option that is out of its range."""
    if nsamples < 1:
        raise UsageError(f"--nsamples must be at least 1; got {nsamples}.")
    if seqlen < 2:
        raise UsageError(f"--seqlen must be at least 2, a token and the one it predicts; got {seqlen}.")
    if max_length is not None and seqlen > max_length:
        raise UsageError(f"--seqlen {seqlen} is above the model's context of {max_length} tokens; lower it.")
    if eval_windows is not None and eval_windows < LEAST_WINDOWS:
        raise UsageError(
            f"--eval-windows must be at least {LEAST_WINDOWS}, or there is no standard error; got {eval_windows}."
        )
