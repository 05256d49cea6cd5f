"""How a refinement goes: what a user chooses, and the matching of the whole model that may end it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from globalopt.errors import UsageError
from globalopt.layers import ModelLayers
from globalopt.matching import Loss, Matching
from globalopt.model_matching import Distillation, match_model, teachers
from globalopt.refine import Order, Refinement, checked, for_solver
from globalopt.stages import check_word
from globalopt.store import Run
from globalopt.workbench import Bench

MATCHES = ("none", "block", "model")


@dataclass(frozen=True)
class RefineOptions:
    """How a refinement goes; option texts are kept as typed until they are converted.

    Args:
        order: `refine.Order`.
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
        self.matching("fisher")
        Distillation.read(self.distill_options)

    def check(self, layers: ModelLayers) -> None:
        """`UsageError` if the model cannot be matched as asked."""
        if self.match == "model" and layers.lazy is not None:
            raise UsageError(
                "--match model trains the whole model at once, and it does not fit in memory. Use --match block, or "
                "raise --max-memory."
            )

    @property
    def distillation(self) -> Distillation | None:
        """How the whole model is matched."""
        return Distillation.read(self.distill_options) if self.match == "model" else None

    def matching(self, sensitivity: str) -> Matching | None:
        """How blocks are matched. Without a backward sweep there are no nats, and errors are relative to the token."""
        if self.match == "none":
            return None
        found = Matching.read(self.match_options)
        if sensitivity == "none" and found.loss.weighted:
            if "loss" in self.match_options:
                raise UsageError(
                    f"Matching with loss={found.loss} needs the backward sweep that --sensitivity none leaves out."
                )
            return replace(found, loss=Loss.TOKEN)
        return found


AS_FITTED = RefineOptions()


def match_whole(bench: Bench, run: Run, plan: Refinement, options: Distillation) -> None:
    """Match the refined model to the dense one if that is not done yet, and put what came of it in place."""
    layers, path = bench.layers, run.matched_path(None)
    if not path.exists():
        with bench.stage("match", options.epochs, "epochs") as advance:
            batches = bench.batches(bench.splits.calibration, options.windows)
            dense = teachers(bench.dense(), batches)
            values = {spec.name: run.read_layer(spec)[0] for spec in layers.specs}
            started = time.perf_counter()
            trained, match = match_model(layers, batches, dense, values, options, plan.seed, run.training_path, advance)
            found = trained.values()
            for spec in layers.specs:
                checked(found[spec.name], for_solver(plan.targets[spec.name], spec, plan.solver, plan.budget))
            facts = {**asdict(match), "loss": "kl", "seconds": time.perf_counter() - started}
            run.write_matched(path, found, trained.norm_values(), facts)
    run.training_path.unlink(missing_ok=True)
    values, norms, _ = run.read_matched(path, layers.specs)
    for name, value in values.items():
        layers.set_weight(name, value.dense())
    for name, norm in norms.items():
        layers.set_parameter(name, norm)
