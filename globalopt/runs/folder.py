"""The run folder: its manifest and its artefacts. The only module that knows names of artefacts."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from globalopt.errors import ArtefactError
from globalopt.runs.files import digest, read_facts, read_json, read_tensors, write_json, write_tensors
from globalopt.values.scores import Scorecard
from globalopt.values.results import Details, Family, LayerCurves, MatchResult, Samples, Summary, WindowLosses
from globalopt.values.decomposition import Trace
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.decomposition import Decomposition
from globalopt.values.problem import ErrorSurface, Profile
from globalopt.values.metric import Gram
from globalopt.values.span import Span
from globalopt.values.budget import Target

T = TypeVar("T")

SCHEMA = 1
MANIFEST = "manifest.json"
FILES = ("summary.json", "windows.json", "eval.json", "samples.json", "family.json", "budget.json", MANIFEST)
FOLDERS = (
    "report",
    "budgets",
    "model",
    "layers",
    "outputs",
    "search",
    "sensitivity",
    "matched",
    "measured",
    "weighing",
    "fits",
    "ratios",
    "profiles",
    "curves",
    "spans",
    "grams",
)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Keys of `new` whose values differ in `old`; of nested records the inner keys."""
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            yield from _differences(before, value)
        elif before != value:
            yield key


def _key(spec: LayerSpec) -> dict[str, Any]:
    return {"name": spec.name, "d_out": spec.d_out, "d_in": spec.d_in}


def _parts(value: Decomposition) -> dict[str, Tensor]:
    """What a decomposition is made of, by the names of its fields."""
    parts = {"S": value.S, "U": value.U, "V": value.V}
    return parts if value.signs is None else {**parts, "signs": value.signs}


def _words(target: Target) -> list[Any]:
    return [target.rank, target.nnz, str(target.pattern) if target.pattern else None]


def _target(rank: int, nnz: int, pattern: str | None) -> Target:
    return Target(rank, nnz, NM.parse(pattern) if pattern else None)


def _write_numbers(path: Path, spec: LayerSpec, name: str, numbers: Sequence[tuple[Target, float]]) -> None:
    write_json(path, {**_key(spec), name: [[*_words(target), number] for target, number in numbers]})


def _read_numbers(path: Path, name: str) -> dict[Target, float]:
    try:
        return {_target(*words[:3]): float(words[3]) for words in read_json(path)[name]}
    except (KeyError, TypeError, ValueError, IndexError):
        raise ArtefactError(f"{path} is broken. Delete it and run the command again.") from None


def _read(
    path: Path, key: Mapping[str, Any], tensor_names: Iterable[str], fact_names: Iterable[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, facts = read_tensors(path)
    found = {name: facts.get(name) for name in key}
    if found != key:
        raise ArtefactError(f"{path} holds {found}, expected {dict(key)}. Delete it and run the command again.")
    if missing := [*(set(tensor_names) - tensors.keys()), *(set(fact_names) - facts.keys())]:
        raise ArtefactError(f"{path} lacks {', '.join(sorted(missing))}. Delete it and run the command again.")
    return tensors, facts


class Run:
    """A run folder: artefacts by name, under a manifest that says what made them.

    `fingerprint` covers everything that decides the results. A folder with the same fingerprint is gone on with;
    one with another is refused.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.manifest = dict(manifest)

    @classmethod
    def start(cls, folder: Path, identity: Mapping[str, Any], facts: Mapping[str, Any], fresh: bool = False) -> Run:
        """Open `folder` for a run, making or resuming it.

        Args:
            identity: JSON-able; decides results (model, text, options, seed). Its digest is the fingerprint.
            facts: JSON-able; recorded, but may differ on resume (versions, command line).
            fresh: delete an earlier run in the folder first.
        Raises:
            ArtefactError: the folder holds another run, or files that are no run at all.
        """
        fingerprint = digest(identity)
        path = folder / MANIFEST
        cls.check_folder(folder)
        if fresh and path.exists():
            cls(folder, {}).delete()
        if path.exists():
            manifest = cls.read_manifest(folder)
            if manifest["fingerprint"] != fingerprint:
                changed = ", ".join(sorted(_differences(manifest["identity"], identity))) or "options"
                raise ArtefactError(
                    f"{folder} holds another run (different {changed}). "
                    "Choose another --out, or --fresh to delete it and start over."
                )
            return cls(folder, manifest)
        manifest = {"schema": SCHEMA, "fingerprint": fingerprint, "identity": dict(identity), "facts": dict(facts)}
        write_json(path, manifest)
        return cls(folder, manifest)

    @classmethod
    def check_folder(cls, folder: Path) -> None:
        """`ArtefactError` if no run can be in `folder`: it is a file, or holds files that are not a run's."""
        if not folder.exists():
            return
        if not folder.is_dir():
            raise ArtefactError(f"--out {folder} is a file. Choose a folder.")
        if (folder / MANIFEST).exists():
            cls.read_manifest(folder)
        elif any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ArtefactError(f"{folder} is not empty and holds no run. Choose another --out.")

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Open an existing run for reading."""
        if not (folder / MANIFEST).exists():
            raise ArtefactError(
                f"{folder} holds no run (no {MANIFEST}). Give the folder that `globalopt search` wrote."
            )
        return cls(folder, cls.read_manifest(folder))

    @staticmethod
    def read_manifest(folder: Path) -> dict[str, Any]:
        manifest = read_json(folder / MANIFEST)
        kinds = {"schema": int, "fingerprint": str, "identity": dict}
        if not isinstance(manifest, dict) or any(not isinstance(manifest.get(k), kind) for k, kind in kinds.items()):
            raise ArtefactError(f"{folder / MANIFEST} is no manifest of a run. Choose another folder.")
        if manifest["schema"] > SCHEMA:
            raise ArtefactError(
                f"{folder} was written by a newer version (schema {manifest['schema']}, this one reads {SCHEMA}). "
                "Upgrade globalopt."
            )
        return manifest

    def delete(self) -> None:
        """Remove the run's artefacts, the manifest last; files that are not ours stay."""
        try:
            for name in (*FOLDERS, *FILES):
                path = self.folder / name
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as cause:
            raise ArtefactError(f"Cannot delete the run in {self.folder}: {cause.strerror or cause}.") from cause

    @property
    def budget_path(self) -> Path:
        return self.folder / "budget.json"

    @property
    def family_path(self) -> Path:
        return self.folder / "family.json"

    def family_budget_path(self, kept: float) -> Path:
        return self.folder / "budgets" / f"{kept:g}.json"

    @property
    def model_folder(self) -> Path:
        return self.folder / "model"

    @property
    def saved_model(self) -> Path:
        """The compressed model; `ArtefactError` if the run has not come that far."""
        self._refuse_family()
        if not self.model_folder.is_dir():
            raise ArtefactError(f"{self.folder} has no model yet: the run did not finish. Run its command again.")
        return self.model_folder

    @property
    def summary_path(self) -> Path:
        return self.folder / "summary.json"

    @property
    def report_folder(self) -> Path:
        return self.folder / "report"

    def span_path(self, spec: LayerSpec) -> Path:
        return self.folder / "spans" / f"{spec.name}.safetensors"

    def gram_path(self, site: str) -> Path:
        return self.folder / "grams" / f"{site}.safetensors"

    def sensitivity_path(self, spec: LayerSpec) -> Path:
        return self.folder / "sensitivity" / f"{spec.name}.safetensors"

    def fits_path(self, spec: LayerSpec) -> Path:
        return self.folder / "fits" / f"{spec.name}.safetensors"

    def weighing_path(self, spec: LayerSpec) -> Path:
        return self.folder / "weighing" / f"{spec.name}.json"

    def ratios_path(self, spec: LayerSpec) -> Path:
        return self.folder / "ratios" / f"{spec.name}.json"

    def measured_path(self, spec: LayerSpec) -> Path:
        return self.folder / "measured" / f"{spec.name}.json"

    def profile_path(self, spec: LayerSpec) -> Path:
        return self.folder / "profiles" / f"{spec.name}.json"

    def curves_path(self, spec: LayerSpec) -> Path:
        return self._curves_path(spec.name)

    def _curves_path(self, layer: str) -> Path:
        return self.folder / "curves" / f"{layer}.json"

    @property
    def study_path(self) -> Path:
        """The journal of the search."""
        return self.folder / "search" / "study.log"

    @property
    def teacher_path(self) -> Path:
        """What is kept of the dense model's predictions in a search."""
        return self.folder / "search" / "teacher.json"

    def outputs_path(self, spec: LayerSpec) -> Path:
        return self.folder / "outputs" / f"{spec.name}.safetensors"

    def layer_path(self, spec: LayerSpec) -> Path:
        return self._layer_path(spec.name)

    def _layer_path(self, layer: str) -> Path:
        return self.folder / "layers" / f"{layer}.safetensors"

    def write_span(self, spec: LayerSpec, span: Span) -> None:
        tensors = {"U": span.U, "s": span.s, "Vh": span.Vh, "S": span.S, "scale": span.scale, "rows": span.rows}
        write_tensors(self.span_path(spec), tensors, {**_key(spec), "stats": dict(span.stats)})

    def read_span(self, spec: LayerSpec) -> Span:
        tensors, facts = _read(self.span_path(spec), _key(spec), ("U", "s", "Vh", "S", "scale", "rows"), ("stats",))
        return Span(**tensors, stats=facts["stats"])

    def write_gram(self, site: str, gram: Gram) -> None:
        write_tensors(self.gram_path(site), {"G": gram.matrix}, {"site": site, "tokens": gram.tokens})

    def read_gram(self, site: str) -> Gram:
        tensors, facts = _read(self.gram_path(site), {"site": site}, ("G",), ("tokens",))
        return Gram(tensors["G"], facts["tokens"])

    def write_fits(self, spec: LayerSpec, anchors: Sequence[Sequence[Target]], residuals: Tensor) -> None:
        """What fits at the rows `anchors` lost of the layer, `residuals` (anchors, d_out, d_in); kept in bfloat16."""
        facts = {**_key(spec), "anchors": [[_words(target) for target in row] for row in anchors]}
        write_tensors(self.fits_path(spec), {"residuals": residuals.bfloat16()}, facts)

    def read_fits(self, spec: LayerSpec) -> tuple[tuple[tuple[Target, ...], ...], Tensor]:
        tensors, facts = _read(self.fits_path(spec), _key(spec), ("residuals",), ("anchors",))
        return tuple(tuple(_target(*words) for words in row) for row in facts["anchors"]), tensors["residuals"]

    def write_weighing(self, spec: LayerSpec, plain: float, weighted: float) -> None:
        """The layer's loss, fitted in its input Gram alone and with its output Gram too, nats per token."""
        write_json(self.weighing_path(spec), {**_key(spec), "plain": plain, "weighted": weighted})

    def chosen_outputs(self, spec: LayerSpec) -> Gram | None:
        """The output Gram the layer is better fitted in, or None."""
        return self.read_outputs(spec) if self.weighs_outputs(spec) else None

    def weighs_outputs(self, spec: LayerSpec) -> bool:
        """Whether the layer is better fitted with its output Gram; also where that was never asked."""
        path = self.weighing_path(spec)
        if not path.exists():
            return True
        record = read_json(path)
        try:
            return float(record["weighted"]) <= float(record["plain"])
        except (KeyError, TypeError, ValueError):
            raise ArtefactError(f"{path} is broken. Delete it and run the command again.") from None

    def write_measured(self, spec: LayerSpec, losses: Sequence[tuple[Target, float]]) -> None:
        """The layer's measured `losses`, nats per token, each with nothing else replaced."""
        _write_numbers(self.measured_path(spec), spec, "losses", losses)

    def read_measured(self, spec: LayerSpec) -> dict[Target, float]:
        return _read_numbers(self.measured_path(spec), "losses")

    def write_ratios(self, spec: LayerSpec, ratios: Mapping[Target, float]) -> None:
        """What the solver leaves of the errors of the layer's quick fits: see `fit_ratio`."""
        _write_numbers(self.ratios_path(spec), spec, "ratios", tuple(ratios.items()))

    def read_ratios(self, spec: LayerSpec) -> dict[Target, float]:
        return _read_numbers(self.ratios_path(spec), "ratios")

    def write_profile(self, spec: LayerSpec, profile: Profile) -> None:
        outliers = {str(threshold): share for threshold, share in profile.outliers.items()}
        write_json(self.profile_path(spec), {**_key(spec), "outliers": outliers, "alpha": profile.alpha})

    def read_profile(self, spec: LayerSpec) -> Profile:
        path = self.profile_path(spec)
        record = read_json(path)
        try:
            return Profile({int(m): float(share) for m, share in record["outliers"].items()}, float(record["alpha"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ArtefactError(f"{path} is broken. Delete it and run the command again.") from None

    def write_curves(self, spec: LayerSpec, curves: LayerCurves) -> None:
        write_json(self.curves_path(spec), asdict(curves))

    def read_curves(self, layer: str) -> LayerCurves | None:
        """The curves of a layer by its name; None where none were written."""
        path = self._curves_path(layer)
        return _validated(path, LayerCurves) if path.exists() else None

    def read_trace(self, layer: str) -> Trace:
        """How the solver's objective fell, of a layer by its name; empty where that was not written down."""
        path = self._layer_path(layer)
        return _checked(path, Trace, read_facts(path).get("trace", ())) if path.exists() else ()

    def write_outputs(self, spec: LayerSpec, outputs: Gram) -> None:
        """The layer's output Gram `A`."""
        write_tensors(self.outputs_path(spec), {"A": outputs.matrix}, {**_key(spec), "tokens": outputs.tokens})

    def read_outputs(self, spec: LayerSpec) -> Gram:
        tensors, facts = _read(self.outputs_path(spec), _key(spec), ("A",), ("tokens",))
        return Gram(tensors["A"], facts["tokens"])

    def block_outputs_path(self, block: int) -> Path:
        return self.folder / "outputs" / f"block.{block}.safetensors"

    def write_block_outputs(self, block: int, outputs: Gram) -> None:
        """The output Gram `A` of the hidden states behind a block."""
        write_tensors(self.block_outputs_path(block), {"A": outputs.matrix}, {"block": block, "tokens": outputs.tokens})

    def read_block_outputs(self, block: int) -> Gram:
        tensors, facts = _read(self.block_outputs_path(block), {"block": block}, ("A",), ("tokens",))
        return Gram(tensors["A"], facts["tokens"])

    def write_sensitivity(self, surface: ErrorSurface, outputs: Gram | None, overlap: Tensor | None = None) -> None:
        """The layer's options with their errors; its output Gram `A`, and the overlap of its fits, where there are."""
        facts = {
            **_key(surface.spec),
            "tokens": outputs.tokens if outputs else 0,
            "options": [[*_words(t), error] for t, error in zip(surface.targets, surface.error, strict=True)],
        }
        tensors = {"A": outputs.matrix} if outputs else {}
        if overlap is not None:
            tensors["overlap"] = overlap
        write_tensors(self.sensitivity_path(surface.spec), tensors, facts)

    def read_sensitivity(self, spec: LayerSpec) -> tuple[ErrorSurface, Gram | None]:
        tensors, facts = _read(self.sensitivity_path(spec), _key(spec), (), ("tokens", "options"))
        targets = tuple(_target(*option[:3]) for option in facts["options"])
        surface = ErrorSurface(spec, targets, tuple(option[3] for option in facts["options"]))
        return surface, Gram(tensors["A"], facts["tokens"]) if "A" in tensors else None

    def read_overlap(self, spec: LayerSpec) -> Tensor:
        """(anchors, anchors) float64 of the layer's fits: see `objective.candidates.FittedLayer`."""
        return _read(self.sensitivity_path(spec), _key(spec), ("overlap",))[0]["overlap"]

    def write_layer(self, spec: LayerSpec, value: Decomposition, facts: Mapping[str, Any]) -> None:
        write_tensors(self.layer_path(spec), _parts(value), {**_key(spec), **facts})

    def read_fitted(self, spec: LayerSpec) -> tuple[Decomposition, dict[str, Any]]:
        """A layer as its solver left it."""
        tensors, facts = _read(self.layer_path(spec), _key(spec), ("S", "U", "V"))
        return Decomposition(tensors["S"], tensors["U"], tensors["V"], tensors.get("signs")), facts

    def read_layer(self, spec: LayerSpec) -> tuple[Decomposition, dict[str, Any]]:
        """A layer as the model is saved with it: matched where that was done, with the facts of its solver."""
        fitted, facts = self.read_fitted(spec)
        for path in (self.matched_path(None), self.matched_path(spec.block)):
            if path.exists():
                return self.read_matched(path, [spec])[0][spec.name], facts
        return fitted, facts

    def matched_path(self, block: int | None) -> Path:
        """What matching made of a block; of the whole model if `block` is None."""
        return self.folder / "matched" / ("model.safetensors" if block is None else f"block.{block}.safetensors")

    @property
    def training_path(self) -> Path:
        """Where the matching of the whole model is, epoch by epoch."""
        return self.folder / "matched" / "training.safetensors"

    def write_matched(
        self, path: Path, values: Mapping[str, Decomposition], norms: Mapping[str, Tensor], facts: Mapping[str, Any]
    ) -> None:
        """Layers by name, and parameters of norms by theirs."""
        tensors = {f"norm:{name}": norm for name, norm in norms.items()}
        for name, value in values.items():
            tensors.update({f"{part}:{name}": tensor for part, tensor in _parts(value).items()})
        write_tensors(path, tensors, {"layers": sorted(values), **facts})

    def read_matched(
        self, path: Path, specs: Sequence[LayerSpec]
    ) -> tuple[dict[str, Decomposition], dict[str, Tensor], dict[str, Any]]:
        """The layers `specs` by name, the norms by parameter name, and the facts."""
        wanted = [f"{part}:{spec.name}" for spec in specs for part in ("S", "U", "V")]
        tensors, facts = _read(path, {}, wanted, ("layers",))
        values = {
            spec.name: Decomposition(
                tensors[f"S:{spec.name}"],
                tensors[f"U:{spec.name}"],
                tensors[f"V:{spec.name}"],
                tensors.get(f"signs:{spec.name}"),
            )
            for spec in specs
        }
        norms = {name.removeprefix("norm:"): t for name, t in tensors.items() if name.startswith("norm:")}
        return values, norms, facts

    def read_matches(self, blocks: int) -> tuple[MatchResult, ...]:
        """What matching did, of `blocks` blocks and of the model, where it was done."""
        keys = ("loss", "before", "after", "epochs", "kept_epoch", "seconds")
        found = []
        for block in (*range(blocks), None):
            if (path := self.matched_path(block)).exists():
                facts = _read(path, {}, (), keys)[1]
                found.append(MatchResult(block, **{key: facts[key] for key in keys}))
        return tuple(found)

    def write_summary(self, summary: Summary) -> None:
        write_json(self.summary_path, asdict(summary))

    def read_summary(self) -> Summary:
        """The finished run's summary; `ArtefactError` if the run has not finished or the file is broken."""
        self._refuse_family()
        if not self.summary_path.exists():
            raise ArtefactError(
                f"{self.folder} has no summary: the run did not finish. Run its command again to go on."
            )
        return _validated(self.summary_path, Summary)

    @property
    def window_losses_path(self) -> Path:
        return self.folder / "windows.json"

    def write_window_losses(self, losses: Sequence[WindowLosses]) -> None:
        """What every window of the evaluation lost, one record per split."""
        write_json(self.window_losses_path, [asdict(split) for split in losses])

    def read_window_losses(self) -> tuple[WindowLosses, ...]:
        """What `write_window_losses` wrote; empty for a run that has none, `ArtefactError` if the file is broken."""
        if not self.window_losses_path.exists():
            return ()
        return _validated(self.window_losses_path, tuple[WindowLosses, ...])

    @property
    def samples_path(self) -> Path:
        return self.folder / "samples.json"

    def write_samples(self, samples: Samples) -> None:
        write_json(self.samples_path, asdict(samples))

    def read_samples(self) -> Samples | None:
        """Text of the dense and the compressed model; None for a run that has none."""
        return _validated(self.samples_path, Samples) if self.samples_path.exists() else None

    def read_details(self, layers: Iterable[str]) -> Details:
        """What a report of the run shows beside its summary, of the `layers` by their names."""
        names = list(layers)
        curves = {name: found for name in names if (found := self.read_curves(name)) is not None}
        traces = {name: found for name in names if (found := self.read_trace(name))}
        return Details(curves, traces, self.read_samples())

    @property
    def scores_path(self) -> Path:
        return self.folder / "eval.json"

    def write_scores(self, scores: Scorecard) -> None:
        """What `globalopt eval` measured last."""
        write_json(self.scores_path, asdict(scores))

    def read_scores(self) -> Scorecard | None:
        """What `write_scores` wrote; None for a run that has none, `ArtefactError` if the file is broken."""
        return _validated(self.scores_path, Scorecard) if self.scores_path.exists() else None

    def _refuse_family(self) -> None:
        if self.family_path.exists():
            raise ArtefactError(
                f"{self.folder} holds a family of budgets, no single run: report it alone, or refine one of its "
                "budgets with globalopt compress --budget-file."
            )

    def write_family(self, family: Family) -> None:
        write_json(self.family_path, asdict(family))

    def read_family(self) -> Family:
        """The finished family; `ArtefactError` if there is none or the file is broken."""
        return _validated(self.family_path, Family)


def _validated(path: Path, kind: type[T]) -> T:
    """What `asdict` of a dataclass wrote to `path`."""
    return _checked(path, kind, read_json(path))


def _checked(path: Path, kind: type[T], found: Any) -> T:
    """What was `found` in `path`, as a `kind`."""
    try:
        return TypeAdapter(kind).validate_python(found)
    except ValidationError as cause:
        first = cause.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtefactError(f"{path} does not fit: {where}: {first['msg']}.") from None
