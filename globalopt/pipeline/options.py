"""Options of a run as a user gives them, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from globalopt.analysis.spans import SCALINGS
from globalopt.budgets.serving_limits import get_profile, limits_of
from globalopt.errors import UsageError
from globalopt.machine.memory import parse_size
from globalopt.matching.block import Loss, Matching
from globalopt.matching.model import Distillation
from globalopt.objective.of_run import CANDIDATES
from globalopt.refine.blocks import Order
from globalopt.values.budget import Limits

SENSITIVITIES = ("fisher", "none")

PREDICT_FROM = ("anchors", "span")


@dataclass(frozen=True)
class SearchOptions:
    """What `search` is asked for; option texts are kept as typed until their table converts them."""

    budget: float
    accounting: str = "params"
    pattern: str = "unstructured"
    allocator: str = "auto"
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

    @property
    def limits(self) -> Limits:
        """What every layer must be within, so that it can be served."""
        return limits_of(self.serving_profile, self.rank_multiple)


def check_word(option: str, value: str, known: Sequence[str]) -> None:
    """Raise `UsageError` if the value of an option is none of those that are known.

    >>> check_word("predict-from", "anchors", PREDICT_FROM)
    """
    if value not in known:
        raise UsageError(f"--{option} is one of {', '.join(known)}; got '{value}'.")


REFERENCE = "reference"
"""Name of the bundled model."""


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded.

    Args:
        model: None is the bundled reference model.
        max_memory: as typed.
        in_memory: it was given as an object, and `model` only says what it is called.
    """

    model: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    allow_low_coverage: bool = False
    max_memory: str | None = None
    in_memory: bool = False

    def __post_init__(self) -> None:
        if self.max_memory is not None:
            parse_size(self.max_memory)

    @property
    def limit(self) -> int | None:
        """Bytes the process may have in memory, where that was said."""
        return None if self.max_memory is None else parse_size(self.max_memory)


@dataclass(frozen=True)
class TextOptions:
    """Which text, and how it is cut into windows. `calibration` None is the bundled text (reference model only)."""

    calibration: str | None = None
    eval_text: str | None = None
    text_column: str | None = None
    nsamples: int = 128
    seqlen: int = 256
    eval_windows: int = 128
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("nsamples", "seqlen", "eval_windows", "batch_size"):
            least = 2 if name == "seqlen" else 1
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} must be at least {least}; got {getattr(self, name)}.")


MATCHES = ("none", "block", "model")


@dataclass(frozen=True)
class RefineOptions:
    """How a refinement goes; option texts are kept as typed until they are converted.

    Args:
        order: `refine.blocks.Order`.
        match: "none"; "block": blocks are matched one after the other; "model": the whole model too, after them.
        match_options, distill_options: of `Matching` and of `Distillation`.
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
        """How the whole model is matched."""
        return Distillation.read(self.distill_options) if self.match == "model" else None

    def matching(self, fisher: bool) -> Matching | None:
        """How blocks are matched. Without a backward sweep there are no nats, and errors are relative to the token."""
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


AS_FITTED = RefineOptions()
