"""Make the windows of a run from the texts that its options name: files, bundled ones, the model's own, mixtures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from globalopt.errors import UsageError
from globalopt.models.layers import ModelLayers
from globalopt.models.loading import LoadedModel
from globalopt.pipeline.options import TextOptions
from globalopt.pipeline.own_text import check_whole, write_own_text
from globalopt.pipeline.reporter import Reporter
from globalopt.runs.cache import Cache
from globalopt.text.beginning import prefix_of
from globalopt.text.messages import Chat
from globalopt.text.mixtures import Part, share_out
from globalopt.text.prompts import Prompts, read_prompts
from globalopt.text.reading import Text, read_text
from globalopt.text.regions import Region, check_prefix, cut_own, cut_reference, cut_text
from globalopt.text.splits import CUT, NAMES, assemble, check_sizes, refuse_same
from globalopt.text.windows import Splits
from globalopt.values.own_text import OwnText


@dataclass(frozen=True, eq=False)
class Source:
    """Hold the texts of a run as they were read.

    Args:
        spec: the calibration text or mixture, as the user gave it.
        parts: every text of it; None is the bundled one, or one that the model has yet to write.
        evaluation: another text for the test split, or None.
        prompts: that the model goes on with where it writes a text, or None.

    >>> Source("a.txt", ((Part("a.txt"), Text.of("Some text.", "a.txt")),), None, None).names
    ('calibration', 'selection', 'validation', 'test')
    """

    spec: str
    parts: tuple[tuple[Part, Text | None], ...]
    evaluation: Text | None = None
    prompts: Prompts | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Return the splits that the calibration text is cut into."""
        return NAMES if self.evaluation is None else CUT

    @property
    def own(self) -> bool:
        """Tell whether the model writes a part of the text."""
        return any(part.own for part, _ in self.parts)


def read_source(
    texts: TextOptions,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Text | None = None,
    evaluation: Text | None = None,
) -> Source:
    """Read the texts that options name, all but those that are bundled or that the model writes.

    Args:
        tokenizer: writes conversations and prompts with its chat template.
        calibration, evaluation: texts in memory, in place of those that the options name.
    Raises:
        CalibrationError: a text or the prompts are missing, empty or broken.
        UsageError: see `TextOptions.parts`.

    >>> from globalopt.pipeline.example import example_tokenizer
    >>> read_source(TextOptions(calibration="reference:3,self:1"), example_tokenizer()).own
    True
    """
    chat, named = Chat.of(tokenizer, texts.bos), texts.parts
    if calibration is not None:
        parts: tuple[tuple[Part, Text | None], ...] = ((Part(calibration.spec), calibration),)
    else:
        parts = tuple(
            (part, None if part.own or part.bundled else read_text(part.spec, texts.text_column, chat))
            for part in named
        )
    # The bundled text has a test part of its own, which stays the one of runs on it alone.
    alone = len(parts) == 1 and parts[0][0].bundled
    if evaluation is None and texts.eval_text and not alone:
        evaluation = read_text(texts.eval_text, texts.text_column, chat)
    prompts = None if texts.prompts is None else read_prompts(texts.prompts, chat)
    spec = texts.calibration if calibration is None and texts.calibration else parts[0][0].spec
    return Source(spec, parts, evaluation, prompts)


@dataclass(frozen=True, eq=False)
class Cuts:
    """Hold the texts of a run cut into regions, one for every split, but for a text that the model has yet to write.

    Args:
        source: the texts.
        regions: of every part, by name of the split; None of the text that the model has yet to write.
        test: of another text for the test split, or None.
        counts: number of windows that the model writes for every split; empty if it writes none.
        prefix: tokens with which every window begins.
        sizes: arguments of `make_splits`.

    >>> Cuts(Source("self", ((Part("self"), None),)), (None,), None, {"calibration": 8}, (), {}).test is None
    True
    """

    source: Source
    regions: tuple[Mapping[str, Region] | None, ...]
    test: Region | None
    counts: Mapping[str, int]
    prefix: tuple[int, ...]
    sizes: Mapping[str, Any]


def cut(
    source: Source,
    loaded: LoadedModel,
    layers: ModelLayers,
    sizes: Mapping[str, Any],
    written: OwnText | None = None,
) -> Cuts:
    """Cut the texts that are there, so that one that is too short is refused before the model writes another.

    Args:
        loaded, layers: the model.
        sizes: arguments of `make_splits`.
        written: what the model wrote in an earlier run; None lets it write.
    Raises:
        CalibrationError: a text is too short, is another one too, or has a token that the model does not know.
        UsageError: a size is out of its range, or the model cannot write, or wrote in other windows.

    >>> from globalopt.pipeline.example import example_session, example_text
    >>> from globalopt.pipeline.session import sizes
    >>> from globalopt.text.reading import join
    >>> session, text = example_session(), join(example_text(), "a.txt")
    >>> of_text = sizes(session.loaded, session.text_options, seed=0)
    >>> cuts = cut(Source("a.txt", ((Part("a.txt"), text),)), session.loaded, session.layers, of_text)
    >>> cuts.counts, list(cuts.regions[0])
    ({}, ['calibration', 'selection', 'validation', 'test'])
    """
    nsamples, seqlen, eval_windows, vocabulary = (
        sizes[name] for name in ("nsamples", "seqlen", "eval_windows", "vocabulary")
    )
    check_sizes(nsamples, seqlen, eval_windows, sizes["max_length"])
    prefix = prefix_of(loaded.tokenizer, sizes["bos"])
    if source.evaluation is not None:
        refuse_same(source.evaluation, [text.sha256 for _, text in source.parts if text is not None])
    parts = [part for part, _ in source.parts]
    windows = {name: share_out(name, nsamples if name == NAMES[0] else eval_windows, parts) for name in source.names}
    counts: dict[str, int] = {}
    found: list[Mapping[str, Region] | None] = []
    for i, (part, text) in enumerate(source.parts):
        own = {name: shares[i] for name, shares in windows.items()}
        if part.own and written is not None:
            found.append(cut_own(_as_asked(written, own, seqlen, prefix)))
        elif part.own:
            check_whole(layers)
            check_prefix(prefix, vocabulary)
            counts = own
            found.append(None)
        else:
            sized = (source.names, own[NAMES[0]], seqlen, vocabulary, prefix)
            found.append(
                cut_reference(loaded.tokenizer, *sized) if text is None else cut_text(loaded.tokenizer, text, *sized)
            )
    test = None
    if source.evaluation is not None:
        test = cut_text(loaded.tokenizer, source.evaluation, ("test",), 1, seqlen, vocabulary, prefix)["test"]
    return Cuts(source, tuple(found), test, counts, prefix, sizes)


def fill(
    cuts: Cuts, loaded: LoadedModel, layers: ModelLayers, batch_size: int, reporter: Reporter, cache: Cache | None
) -> tuple[Splits, OwnText | None]:
    """Choose the windows of all splits, after the model has written its part of the text.

    Args:
        loaded, layers: the dense model.
        batch_size: windows of a forward pass.
        reporter: shows the writing.
        cache: keeps what is written; None keeps nothing.
    Returns:
        the splits, and what the model wrote, if it did.

    >>> from globalopt.pipeline.example import example_reporter, example_session
    >>> from globalopt.pipeline.session import sizes
    >>> session = example_session()
    >>> of_text = sizes(session.loaded, session.text_options, seed=0)
    >>> cuts = cut(Source("self", ((Part("self"), None),)), session.loaded, session.layers, of_text)
    >>> splits, text = fill(cuts, session.loaded, session.layers, 8, example_reporter(), None)
    >>> splits.calibration.windows.shape, splits.test.source, len(text.windows)
    (torch.Size([4, 16]), 'self', 10)
    """
    source, sizes = cuts.source, cuts.sizes
    text, regions = None, list(cuts.regions)
    if cuts.counts:
        text = write_own_text(
            loaded,
            layers,
            cuts.counts,
            source.prompts,
            cuts.prefix,
            sizes["seqlen"],
            batch_size,
            sizes["seed"],
            {name: sizes[name] for name in ("max_length", "vocabulary")},
            reporter,
            cache,
        )
        regions[regions.index(None)] = cut_own(text)
    parts = [(part, region) for (part, _), region in zip(source.parts, regions, strict=True) if region is not None]
    arguments = [sizes[name] for name in ("nsamples", "seqlen", "seed", "eval_windows")]
    return assemble(source.spec, parts, cuts.test, *arguments), text


def _as_asked(text: OwnText, counts: Mapping[str, int], seqlen: int, prefix: tuple[int, ...]) -> OwnText:
    """Return what a run wrote; `UsageError` if other windows are asked for."""
    if text.seqlen != seqlen or text.prefix != prefix or not counts.keys() <= text.counts.keys():
        raise UsageError(
            f"The model wrote its own text in windows of {text.seqlen} tokens for {', '.join(text.counts)}. Leave out "
            "--seqlen, --bos and --eval-text, or give another text with --calibration."
        )
    return text
