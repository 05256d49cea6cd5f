"""Cut texts into calibration, selection, validation and test windows that do not overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from globalopt import reference
from globalopt.errors import CalibrationError, UsageError
from globalopt.text.beginning import prefix_of
from globalopt.text.mixtures import Part, mixed
from globalopt.text.reading import Text
from globalopt.text.regions import LEAST_WINDOWS, Region, cut_reference, cut_text
from globalopt.text.windows import Split, Splits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = ("calibration", "selection", "validation", "test")
"""The splits, in order."""

CUT = NAMES[:3]
"""The splits of a text beside another one for the test split."""


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
    >>> from globalopt.reference import reference_folder
    >>> tokenizer, text = AutoTokenizer.from_pretrained(reference_folder()), Text.of("A short text. " * 200, "a.txt")
    >>> splits = make_splits(tokenizer, text, None, nsamples=8, seqlen=16, seed=0, eval_windows=4)
    >>> [(split.name, *split.windows.shape) for split in splits]
    [('calibration', 8, 16), ('selection', 4, 16), ('validation', 4, 16), ('test', 4, 16)]
    """
    check_sizes(nsamples, seqlen, eval_windows, max_length)
    prefix = prefix_of(tokenizer, bos)
    if evaluation is not None:
        refuse_same(evaluation, [calibration.sha256])
    regions = cut_text(
        tokenizer, calibration, NAMES if evaluation is None else CUT, nsamples, seqlen, vocabulary, prefix
    )
    test = None
    if evaluation is not None:
        test = cut_text(tokenizer, evaluation, ("test",), nsamples, seqlen, vocabulary, prefix)["test"]
    parts = [(Part(calibration.spec), regions)]
    return assemble(calibration.spec, parts, test, nsamples, seqlen, seed, eval_windows)


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
    check_sizes(nsamples, seqlen, eval_windows, max_length)
    regions = cut_reference(tokenizer, NAMES, nsamples, seqlen, vocabulary, prefix_of(tokenizer, bos))
    parts = [(Part(reference.NAME), regions)]
    return assemble(reference.NAME, parts, None, nsamples, seqlen, seed, eval_windows)


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
    >>> from globalopt.reference import reference_folder
    >>> tokenizer, text = AutoTokenizer.from_pretrained(reference_folder()), Text.of("A short text. " * 200, "a.txt")
    >>> consecutive_split(tokenizer, text, "test", seqlen=16, eval_windows=3).starts
    (0, 16, 32)
    """
    check_sizes(1, seqlen, eval_windows, max_length)
    regions = cut_text(tokenizer, text, (name,), 1, seqlen, vocabulary, prefix_of(tokenizer, bos))
    return regions[name].consecutive(seqlen, eval_windows)


def assemble(
    spec: str,
    parts: Sequence[tuple[Part, Mapping[str, Region]]],
    test: Region | None,
    nsamples: int,
    seqlen: int,
    seed: int,
    eval_windows: int | None,
) -> Splits:
    """Choose the windows of all splits, of one text or of a mixture of several.

    Args:
        spec: the text or mixture, as the user gave it.
        parts: every text of the mixture, with its regions by name of their splits.
        test: region of another text for the test split; None takes it from the parts.
        nsamples, seqlen, seed, eval_windows: as in `make_splits`.
    Raises:
        CalibrationError: two parts are the same text, or a part has too few windows; names the part.

    >>> import torch
    >>> def regions(source):
    ...     places = {name: (12 * i, 12 * i + 12) for i, name in enumerate(NAMES)}
    ...     return {name: Region(name, source, source, torch.arange(48), *p, 0) for name, p in places.items()}
    >>> parts = [(Part(source, weight), regions(source)) for source, weight in (("a.txt", 0.75), ("b.txt", 0.25))]
    >>> splits = assemble("a.txt:3,b.txt:1", parts, None, nsamples=4, seqlen=3, seed=0, eval_windows=4)
    >>> [(weight, len(split.windows)) for weight, split in splits.validation.parts]
    [(0.75, 3), (0.25, 1)]
    """
    for number, (part, regions) in enumerate(parts):
        for other, before in parts[:number]:
            if any(regions[name].text_sha256 == before[name].text_sha256 for name in regions):
                raise CalibrationError(
                    f"Parts '{other.spec}' and '{part.spec}' of the mixture hold the same text; give it once."
                )
    found: dict[str, Split] = {}
    for name in NAMES:
        count = nsamples if name == "calibration" else eval_windows
        if name == "test" and test is not None:
            found[name] = test.fill(count, seqlen, seed)
        elif len(parts) == 1:
            found[name] = parts[0][1][name].fill(count, seqlen, seed)
        else:
            found[name] = mixed(spec, [(part, regions[name]) for part, regions in parts], count, seqlen, seed)
    return Splits(**found)


def refuse_same(evaluation: Text, hashes: Sequence[str]) -> None:
    """Raise `CalibrationError` if the evaluation text is one of those calibrated on, by their hashes.

    >>> refuse_same(Text.of("Some text.", "a.txt"), ["9f2c"])
    """
    if evaluation.sha256 in hashes:
        raise CalibrationError(
            f"The evaluation text {evaluation.spec} is the calibration text; leave it out and a part of the "
            "calibration text is held out."
        )


def check_sizes(nsamples: int, seqlen: int, eval_windows: int | None, max_length: int | None) -> None:
    """Check the sizes of windows; `UsageError` naming the option that is out of its range.

    >>> check_sizes(nsamples=8, seqlen=16, eval_windows=None, max_length=512)
    """
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
