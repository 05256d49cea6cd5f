"""Hold the options of a run as the user typed them, and check them before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from globalopt.analysis.spans import SCALINGS
from globalopt.budgets.serving_limits import check_storages, get_profile, limits_of
from globalopt.errors import UsageError
from globalopt.evaluation.samples import PROMPTS
from globalopt.machine.memory import parse_size
from globalopt.matching.block import Loss, Matching
from globalopt.matching.model import Distillation
from globalopt.objective.of_run import CANDIDATES
from globalopt.refine.blocks import Order
from globalopt.text.beginning import BOS_CHOICES
from globalopt.text.mixtures import Part, parse_mixture
from globalopt.values.budget import Limits
from globalopt.values.embeddings import WORDS
from globalopt.values.rounding_losses import AUTO_STORAGES
from globalopt.values.storage import Storage

SENSITIVITIES = ("fisher", "none")
"""How losses are predicted: from gradients, in nats per token; or from input Grams alone, as output errors."""

PREDICT_FROM = ("anchors", "span")
"""Whether anchor solutions set the level of predicted losses, or the spans alone do."""

PROBE_STEPS = 30
"""Steps of ADMM of the probe solver. What it leaves above the error of the solver of the refinement is much the same in
all layers of a kind, so that the solver gap makes up for it. That holds for twelve steps too, and yet the bundled model
ended 9 % higher at 0.5 with them (three seeds)."""


@dataclass(frozen=True)
class SearchOptions:
    """Hold the options of a search.

    Args:
        budget: fraction kept of the compressible layers, in (0, 1].
        accounting: unit of the budget: "params" or "bytes".
        pattern: of the sparse parts: "unstructured" or N:M, such as "2:4".
        allocator, solver: names.
        allocator_options, solver_options: values as typed, by option; converted by the class of the method.
        sensitivity: one of `SENSITIVITIES`.
        scaling: of the spans; see `compute_span`.
        seed: of labels, windows and allocators.
        predict_from: one of `PREDICT_FROM`.
        candidates: which weights stand for a target in the objective: "anchors", "span" or "auto".
        search_tokens: tokens of forward passes on which the allocator may evaluate the objective.
        serving_profile: name of the place where the model will be served, with limits of its own.
        rank_multiple: ranks are multiples of it; None is the profile's own.
        max_rank: the largest rank of a layer, 0 for sparse parts alone; None is the profile's own.
        correct: whether predicted losses are corrected by the loss of the model at the targets they lead to.
        probe_steps: steps of the probe solver, which computes the anchor solutions; at least 1.
        storage: bits of the stored numbers: "16", "8" or "4/8" for all layers, a menu "8,4/8", or "auto".
        embeddings: bits of the embeddings, which the budget counts too: "16", "8", "6" or "auto"; None: they stay as
            they are and are not counted.
    Raises:
        UsageError: an option is unknown, or at odds with another.

    >>> options = SearchOptions(0.5, pattern="2:4", solver="sparsegpt")
    >>> options.allocator, options.sensitivity, options.limits.rank_multiple
    ('knapsack', 'fisher', 1)
    """

    budget: float
    accounting: str = "params"
    pattern: str = "unstructured"
    allocator: str = "knapsack"
    allocator_options: Mapping[str, str] = field(default_factory=dict)
    solver: str = "3basil"
    solver_options: Mapping[str, str] = field(default_factory=dict)
    sensitivity: str = "fisher"
    scaling: str = "activation"
    seed: int = 0
    predict_from: str = "anchors"
    candidates: str = "auto"
    search_tokens: int = 500_000
    serving_profile: str = "dense"
    rank_multiple: int | None = None
    max_rank: int | None = None
    correct: bool = True
    probe_steps: int = PROBE_STEPS
    storage: str = "16"
    embeddings: str | None = None

    def __post_init__(self) -> None:
        profile = get_profile(self.serving_profile)
        limits = self.limits
        if profile.pattern is not None and self.pattern != profile.pattern:
            raise UsageError(f"--serving-profile {self.serving_profile} is of pattern {profile.pattern} alone.")
        if not limits.sparse and self.pattern != "unstructured":
            raise UsageError(
                f"--serving-profile {self.serving_profile} keeps no sparse parts, and --pattern {self.pattern} is of "
                "these."
            )
        if not limits.sparse and self.scaling != "direct":
            raise UsageError(
                f"--serving-profile {self.serving_profile} takes --span-scaling direct: other spans have few ranks."
            )
        check_word("candidates", self.candidates, CANDIDATES)
        check_word("sensitivity", self.sensitivity, SENSITIVITIES)
        check_word("span-scaling", self.scaling, SCALINGS)
        check_word("predict-from", self.predict_from, PREDICT_FROM)
        if self.probe_steps < 1:
            raise UsageError(f"The probe solver takes at least 1 step; got {self.probe_steps}.")
        check_storages(self.serving_profile, self.storages)
        if len(self.storages) > 1 and self.accounting != "bytes":
            raise UsageError(
                f"--storage {self.storage} is a choice of bits, which are free where parameters are counted. Add "
                "--accounting bytes, or give one storage."
            )
        if self.embeddings is not None:
            check_embeddings(self.embeddings, self.accounting, self.serving_profile)

    @property
    def storages(self) -> tuple[Storage, ...]:
        """Return the storages that a layer may have, most bits first."""
        return parse_storages(self.storage)

    @property
    def limits(self) -> Limits:
        """Return the limits on every layer's target under which the model can be served."""
        return limits_of(self.serving_profile, self.rank_multiple, self.max_rank)


def check_word(option: str, value: str, known: Sequence[str]) -> None:
    """Raise `UsageError` if the value of an option is none of those that are known.

    >>> check_word("predict-from", "anchors", PREDICT_FROM)
    """
    if value not in known:
        raise UsageError(f"--{option} is one of {', '.join(known)}; got '{value}'.")


def parse_storages(text: str) -> tuple[Storage, ...]:
    """Parse a menu of storages, "8,4/8" or "auto", most bits first; `UsageError` if it is something else.

    >>> [str(storage) for storage in parse_storages("4/8,16")]
    ['16', '4/8']
    """
    if text == "auto":
        return AUTO_STORAGES
    return tuple(sorted({Storage.parse(word.strip()) for word in text.split(",")}, reverse=True))


def check_embeddings(bits: str, accounting: str, profile: str) -> None:
    """Raise `UsageError` if the bits of embeddings are none, or are at odds with the unit of the budget or the profile.

    >>> check_embeddings("8", "bytes", "dense")
    """
    check_word("embeddings", bits, WORDS)
    if accounting != "bytes":
        raise UsageError(
            f"--embeddings {bits} is counted in bytes, and --accounting is {accounting}. Leave out --accounting."
        )
    if bits != "16" and not get_profile(profile).codes:
        raise UsageError(
            f"--serving-profile {profile} holds numbers of 16 bits alone. Give --embeddings 16, or use another profile."
        )


def unit_of(accounting: str | None, storage: str, embeddings: str | None = None) -> str:
    """Return the unit of a budget: bytes where nothing was said and numbers have few bits, or embeddings are counted.

    >>> unit_of(None, "16"), unit_of(None, "4/8"), unit_of("params", "8")
    ('params', 'bytes', 'params')
    """
    return accounting or ("params" if storage == "16" and embeddings is None else "bytes")


REFERENCE = "reference"
"""Name of the bundled model."""


@dataclass(frozen=True)
class ModelOptions:
    """Hold the options of loading a model.

    Args:
        model: folder or hub id; None is the bundled reference model.
        dtype: floating-point type to compute in, or "auto".
        device: name of a torch device, or "auto".
        trust_remote_code: whether code from the model's repository may run.
        allow_low_coverage: whether a model may have few of its parameters in compressible layers.
        max_memory: size of the process's memory as typed, such as "8GiB"; None is what the machine has.
        in_memory: whether the model was given as an object; `model` is then a name for reports alone.
        gguf_file: name of a GGUF file in the folder or on the hub, which the model is read from.
    Raises:
        UsageError: `max_memory` is no size, or a file was chosen of no model.

    >>> ModelOptions("meta-llama/Llama-3.2-1B", max_memory="2GiB").limit
    2147483648
    """

    model: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    allow_low_coverage: bool = False
    max_memory: str | None = None
    in_memory: bool = False
    gguf_file: str | None = None

    def __post_init__(self) -> None:
        if self.gguf_file is not None and self.model is None:
            raise UsageError(f"--gguf-file {self.gguf_file} is a file of a model: give its folder or hub id too.")
        if self.max_memory is not None:
            parse_size(self.max_memory)

    @property
    def limit(self) -> int | None:
        """Return the bytes of memory that the process may use, or None where none were given."""
        return None if self.max_memory is None else parse_size(self.max_memory)


LEAST = {"nsamples": 1, "seqlen": 2, "eval_windows": 1, "batch_size": 1, "samples": 0}
"""The least value of every number of `TextOptions`."""


@dataclass(frozen=True)
class TextOptions:
    """Hold the options of the text and of its windows.

    Args:
        calibration: file, folder, hub data set, `reference` or `self`, or a mixture `TEXT:WEIGHT,TEXT:WEIGHT`; None is
            the bundled text, for the reference model only.
        eval_text: text of the test split; None holds out a part of the calibration text.
        text_column: column of a table that holds the text; None finds it.
        nsamples: number of calibration windows.
        seqlen: tokens per window, at least 2.
        eval_windows: windows of validation, and of test.
        batch_size: windows of a forward pass.
        bos: whether every window begins as the tokenizer begins a text: one of `BOS_CHOICES`.
        samples: prompts that both models go on with, after the evaluation; 0 writes no text.
        prompts: file of prompts that the dense model goes on with where it writes its own text; None is without.
        evaluate: whether the result of a run is measured beside the dense model, and `samples` are written.
    Raises:
        UsageError: a number is too small.

    >>> texts = TextOptions(nsamples=64)
    >>> texts.nsamples * texts.seqlen
    16384
    """

    calibration: str | None = None
    eval_text: str | None = None
    text_column: str | None = None
    nsamples: int = 128
    seqlen: int = 256
    eval_windows: int = 128
    batch_size: int = 8
    bos: str = "auto"
    samples: int = PROMPTS
    prompts: str | None = None
    evaluate: bool = True

    def __post_init__(self) -> None:
        if self.eval_windows == 0:
            raise UsageError(
                "--eval-windows must be at least 2; got 0. To leave the evaluation out, add --no-evaluate: a search "
                "reads its selection text all the same."
            )
        check_word("bos", self.bos, BOS_CHOICES)
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} must be at least {least}; got {getattr(self, name)}.")

    @property
    def parts(self) -> tuple[Part, ...]:
        """Return the calibration texts with their weights; the bundled one where none was named.

        Raises:
            UsageError: the mixture cannot be read, or there are prompts for a model that writes no text.
        """
        found = parse_mixture(REFERENCE if self.calibration is None else self.calibration)
        if self.prompts is not None and not any(part.own for part in found):
            raise UsageError(
                f"--prompts {self.prompts} is for --calibration self, where the model writes its own text. Leave it "
                "out, or add self."
            )
        return found


MATCHES = ("none", "block", "model")
"""What is matched to the dense model: nothing, every block, or every block and then the whole model."""


@dataclass(frozen=True)
class RefineOptions:
    """Hold the options of a refinement.

    Args:
        order: when the Grams of a block are taken; see `refine.blocks.Order`.
        match: "none"; "block": blocks are matched one after the other; "model": then the whole model too.
        match_options, distill_options: fields of `Matching` and of `Distillation`, with values as typed.
    Raises:
        UsageError: an option is unknown, out of its range, or at odds with another.

    >>> RefineOptions(match="block", match_options={"epochs": "3"}).matching(fisher=True).epochs
    3
    """

    order: str = Order.BLOCK
    match: str = "none"
    match_options: Mapping[str, str] = field(default_factory=dict)
    distill_options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_word("sequential", self.order, list(Order))
        check_word("match", self.match, MATCHES)
        if self.match_options and self.match == "none":
            raise UsageError("--match-set is for --match block or model.")
        if self.distill_options and self.match != "model":
            raise UsageError("--distill-set is for --match model.")
        self.matching(fisher=True)
        Distillation.read(self.distill_options)

    @property
    def distillation(self) -> Distillation | None:
        """Return how the whole model is matched, or None."""
        return Distillation.read(self.distill_options) if self.match == "model" else None

    def matching(self, fisher: bool) -> Matching | None:
        """Return how blocks are matched, or None.

        Args:
            fisher: whether a backward sweep gives output Grams; if not, errors are relative to the token's energy
                instead of weighted by the output Gram.
        """
        if self.match == "none":
            return None
        found = Matching.read(self.match_options)
        if not fisher and found.loss.weighted:
            if "loss" in self.match_options:
                raise UsageError(
                    f"Matching with loss={found.loss} needs the backward sweep that --sensitivity none leaves out."
                )
            return replace(found, loss=Loss.TOKEN)
        return found


"""Refinement without matching."""
