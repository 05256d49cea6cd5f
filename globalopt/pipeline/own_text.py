"""Let the dense model write its own calibration text, batch by batch, or read what it wrote before from the cache."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from globalopt.errors import CalibrationError, UsageError
from globalopt.evaluation.writing import Opening, Prompt, write_sequences
from globalopt.machine import ranks
from globalopt.models.identity import model_sha256
from globalopt.models.layers import ModelLayers
from globalopt.models.loading import LoadedModel
from globalopt.pipeline.reporter import Reporter
from globalopt.runs.artefacts import WRITTEN, Stage
from globalopt.runs.cache import Address, Cache
from globalopt.runs.workspace import Workspace
from globalopt.text.prompts import Prompts
from globalopt.values.own_text import OwnText

VERSION = 1
"""Version of the sampling, raised whenever other ids are written."""

TOKENS_AT_ONCE = 8192
"""Tokens of the sequences that are written together, whose keys and values lie in memory. A step reads all weights, and
takes nearly as long for one sequence as for many."""

TOO_LARGE = (
    "--calibration self: the model does not fit in memory, and would be read anew for every token that it writes. "
    "Raise --max-memory, or give a text that was written elsewhere."
)
"""Refusal of a model that is read block by block."""


def at_once(batch_size: int, seqlen: int) -> int:
    """Return how many sequences are written together.

    >>> at_once(batch_size=8, seqlen=256), at_once(batch_size=8, seqlen=2048)
    (32, 8)
    """
    return max(batch_size, TOKENS_AT_ONCE // seqlen)


def write_own_text(
    loaded: LoadedModel,
    layers: ModelLayers,
    counts: Mapping[str, int],
    prompts: Prompts | None,
    prefix: tuple[int, ...],
    seqlen: int,
    batch_size: int,
    seed: int,
    limits: Mapping[str, Any],
    reporter: Reporter,
    cache: Cache | None,
) -> OwnText:
    """Let a model write as many sequences as the splits need.

    Args:
        loaded, layers: the dense model, in memory.
        counts: number of sequences of every split, by its name.
        prompts: that it goes on with, or None. A prompt is for one split alone.
        prefix: tokens with which every window begins.
        seqlen: tokens of every sequence.
        batch_size: least number of sequences written together.
        seed: of the sampling.
        limits: `max_length` and `vocabulary` of the model.
        reporter: shows the stage; of what was written before there is a note.
        cache: keeps what is written, batch by batch; None keeps nothing.
    Raises:
        UsageError: the model is read block by block, or its context has no room for the token that a text begins with.
        CalibrationError: there are too few prompts, or one is too long for a sequence.
        NumericalError: predictions are not finite.

    >>> from globalopt.pipeline.example import example_reporter, example_session
    >>> session = example_session()
    >>> sizes = {"seqlen": 8, "batch_size": 4, "seed": 0, "limits": {"max_length": 32, "vocabulary": 32}}
    >>> text = write_own_text(
    ...     session.loaded, session.layers, {"calibration": 3, "test": 2}, None, (), **sizes,
    ...     reporter=example_reporter(), cache=None,
    ... )
    >>> text.windows.shape, text.begin
    (torch.Size([5, 8]), (1,))
    """
    check_whole(layers)
    opening = Opening.of(
        loaded.model, loaded.tokenizer, prefix, limits["vocabulary"], prompts is not None and prompts.chat
    )
    if limits["max_length"] is not None and seqlen + opening.dropped > limits["max_length"]:
        raise UsageError(
            f"--calibration self: the model reads a BOS before the {seqlen} tokens of a window, and its context is "
            f"{limits['max_length']}. Lower --seqlen by one, or keep the BOS with --bos yes."
        )
    rows = list(range(sum(counts.values())))
    given = [] if prompts is None else _dealt(loaded.tokenizer, prompts, opening, counts, seqlen, seed)
    together = at_once(batch_size, seqlen)
    batches = [rows[first : first + together] for first in range(0, len(rows), together)]
    address = Address(
        Stage.SELF_TEXT,
        VERSION,
        {
            "model": model_sha256(layers, loaded.tokenizer),
            "seed": seed,
            "seqlen": seqlen,
            "counts": [[*pair] for pair in counts.items()],
            "begin": [*opening.begin],
            "kept": opening.kept,
            "stops": sorted(opening.stops),
            "prompts": None if prompts is None else prompts.sha256,
            "together": together,
        },
    )
    with _opened(cache, address, loaded.name) as work:
        there = [i for i in range(len(batches)) if work is not None and work.has(WRITTEN, i)]
        written = {} if work is None else {i: work.get(WRITTEN, i) for i in ranks.told(there)}
        if len(written) == len(batches):
            reporter.note(f"Used again from {'' if cache is None else cache.folder}: {Stage.SELF_TEXT}.")
        else:
            missing = ranks.share([i for i in range(len(batches)) if i not in written])
            steps = seqlen + opening.dropped
            with reporter.stage("self-text", len(missing) * steps, "steps") as advance:
                for number, i in enumerate(missing, start=1):
                    detail, left = f"batch {number} of {len(missing)}", steps

                    def told(detail: str = detail) -> None:
                        nonlocal left
                        left -= 1
                        advance(detail)

                    own = [given[row] for row in batches[i]] if given else ()
                    written[i] = write_sequences(loaded.model, opening, seqlen, batches[i], seed, own, told)
                    for _ in range(left):
                        # Tokens of a prompt are read together.
                        advance(detail)
                    if work is not None:
                        work.put(WRITTEN, i, written[i])
            written = ranks.merged(written)
    windows = torch.cat([written[i] for i in range(len(batches))])
    begin = opening.begin[: opening.dropped]
    return OwnText(windows, dict(counts), prefix, seed, begin, None if prompts is None else prompts.record())


def check_whole(layers: ModelLayers) -> None:
    """Raise `UsageError` if the blocks of a model are read one at a time.

    >>> from globalopt.pipeline.example import example_session
    >>> check_whole(example_session().layers)
    """
    if layers.lazy is not None:
        raise UsageError(TOO_LARGE)


@contextlib.contextmanager
def _opened(cache: Cache | None, address: Address, model: str) -> Iterator[Workspace | None]:
    """Open the folder of a stage in the cache, which no one prunes meanwhile; None without a cache."""
    if cache is None:
        yield None
        return
    with cache.used():
        folder = cache.open(address, model)
        yield Workspace(folder, {address.stage: folder})


def _dealt(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    opening: Opening,
    counts: Mapping[str, int],
    seqlen: int,
    seed: int,
) -> list[list[Prompt]]:
    """Deal prompts out to the splits in proportion to their sequences, and list those of every sequence."""
    if len(prompts.texts) < len(counts):
        raise CalibrationError(
            f"{prompts.file} holds {len(prompts.texts)} prompts, and each of the {len(counts)} splits needs some of "
            "its own. Add prompts."
        )
    ids = [_ids(tokenizer, text, opening) for text in prompts.texts]
    room = seqlen + opening.dropped - len(opening.begin)
    for number, prompt in enumerate(ids, start=1):
        if not 0 < len(prompt) < room:
            raise CalibrationError(
                f"Prompt {number} of {prompts.file} has {len(prompt)} tokens, and a window has room for {room - 1} "
                "before the text that the model writes. Raise --seqlen, or shorten it."
            )
        if max(prompt) >= opening.vocabulary:
            raise CalibrationError(
                f"Prompt {number} of {prompts.file} has token id {max(prompt)}, and the model knows "
                f"{opening.vocabulary} tokens. Use the tokenizer it was trained with."
            )
    random.Random(seed).shuffle(ids)
    found: list[list[Prompt]] = []
    for own, count in zip(_shares(ids, list(counts.values())), counts.values(), strict=True):
        found += [own[row % len(own) :] + own[: row % len(own)] for row in range(count)]
    return found


def _shares(ids: Sequence[Prompt], counts: Sequence[int]) -> Iterator[list[Prompt]]:
    """Divide prompts in proportion to counts, at least one each."""
    spare, total, first, passed = len(ids) - len(counts), sum(counts), 0, 0
    for number, count in enumerate(counts, start=1):
        passed += count
        end = number + spare * passed // total
        yield list(ids[first:end])
        first = end


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, opening: Opening) -> Prompt:
    """Tokenise a prompt, without the tokens with which every document begins."""
    ids = tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    begin = opening.begin
    return ids[len(begin) :] if begin and ids[: len(begin)] == begin else ids
