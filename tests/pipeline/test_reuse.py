"""Runs use what earlier runs have computed of the same, nothing of what differs, and end with the same bytes."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from globalopt.budgets import budget_file
from globalopt.errors import ArtefactError
from globalopt.models.identity import model_sha256
from globalopt.pipeline import addresses, compress, family, measure, plan, search
from globalopt.pipeline import session as sessions
from globalopt.pipeline.options import ModelOptions, RefineOptions, SearchOptions, TextOptions
from globalopt.pipeline.plan import resolve, resolve_refinement
from globalopt.pipeline.reporter import Reporter
from globalopt.protocols import Solver
from globalopt.runs.artefacts import LOSSES_ALONE, SHARES, Stage
from globalopt.runs.cache import Cache
from globalopt.runs.folder import Run
from globalopt.runs.workspace import Workspace
from globalopt.values.error_unit import ErrorUnit
from globalopt.values.results import Summary
from globalopt.values.samples import Samples
from solvers import get_solver
from tests.command import assert_alike, results

TEXT = TextOptions(nsamples=8, seqlen=16, eval_windows=2)

SEARCH = SearchOptions(0.5, solver="3basil", solver_options={"steps": "3"}, allocator="knapsack")

ANALYSIS = {"grams", "labels", "profile", "span", "anchors", "probe", "metric", "gap", "predict", "correct"}
"""Names under which the stages of the analysis are reported."""

LAYERS = 14


@pytest.fixture(scope="module", autouse=True)
def quick_stages() -> Iterator[None]:
    """Probe solutions of a few steps, and no samples: how good they are is of no matter here."""

    def quick(solver: Any, steps: int = 4) -> Solver:
        return get_solver("3basil", {"steps": "4", "outputs": str(solver.outputs)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "probe_solver", quick)
        patch.setattr(compress, "probe_solver", quick)
        patch.setattr(measure, "write_samples", lambda *_: Samples("validation", 0, 0, (), "left out"))
        yield


class Recording:
    """A display that remembers what it was told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[str], None]]:
        self.stages.append(name)
        yield lambda detail: None

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass(frozen=True)
class Done:
    """A run, the stages that were entered, and how many artefacts of each were made."""

    run: Run
    summary: Summary
    stages: list[str]
    notes: list[str]
    made: Mapping[Stage, int]

    @property
    def analysed(self) -> set[str]:
        return ANALYSIS & set(self.stages)

    def figures(self) -> dict[str, Any]:
        """The summary without what a clock or a place decides, and the files that must not depend on these."""
        summary = asdict(self.summary)
        for name in ("command", "stages", "model", "splits"):
            del summary[name]
        summary["notes"] = [note for note in summary["notes"] if not note.startswith("Used again")]
        for layer in summary["layers"]:
            del layer["seconds"]
        for match in summary["matching"]:
            del match["seconds"]
        return {"summary": summary, **results(self.run.folder)}


def assert_all_made(found: Done, first: Done) -> None:
    """Assert that everything was made as in a first run; how many layers get the plain metric is their own affair."""
    one, other = dict(found.made), dict(first.made)
    assert min(one.pop(Stage.METRICS), other.pop(Stage.METRICS)) >= LAYERS
    assert one == other


class Place:
    """A model folder and a text, searched with quick options."""

    def __init__(self, model: Path, text: Path) -> None:
        self.model, self.text = model, text

    def session(self, progress: Recording, seed: int = 0, **texts: Any) -> sessions.Session:
        options = replace(TEXT, calibration=str(self.text), **texts)
        return sessions.set_up(ModelOptions(str(self.model)), options, seed, Reporter(progress))

    def search(
        self,
        out: Path,
        cache: Path | None,
        options: SearchOptions = SEARCH,
        refining: RefineOptions | None = None,
        fresh: bool = False,
        **texts: Any,
    ) -> Done:
        progress = Recording()
        session = self.session(progress, options.seed, **texts)
        resolved = resolve(options, refining)
        shared = None if cache is None else Cache(cache)
        with counted() as made:
            summary, run = search.search(session, Reporter(progress), resolved, out, "x", shared, fresh)
        return Done(run, summary, progress.stages, progress.notes, made)


@contextlib.contextmanager
def counted() -> Iterator[Counter[Stage]]:
    """Count the artefacts that are written, by stage."""
    made: Counter[Stage] = Counter()
    put = Workspace.put

    def counting(self: Workspace, artefact: Any, key: Any, value: Any) -> None:
        # How many answers corrections take depends on what the model says.
        if artefact.stage is not Stage.RESULT and artefact not in (SHARES, LOSSES_ALONE):
            made[artefact.stage] += 1
        put(self, artefact, key, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "put", counting)
        yield made


@pytest.fixture(scope="module")
def place(tiny_llama: Path, tiny_text: Path) -> Place:
    return Place(tiny_llama, tiny_text)


@pytest.fixture(scope="module")
def base(place: Place, tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """A finished search, and the cache it has left; neither is to be changed."""
    folder = tmp_path_factory.mktemp("base")
    return place.search(folder / "base", folder / "cache"), folder / "cache"


@pytest.fixture
def cache(base: tuple[Done, Path], tmp_path: Path) -> Path:
    """A copy of the cache of that search."""
    return shutil.copytree(base[1], tmp_path / "cache")


# ------------------------------------------------------------------------------------------------- reuse


def solved(made: Mapping[Stage, int]) -> dict[Stage, int]:
    """What was made, less the anchor solutions of layers that are solved without their output Grams."""
    found = dict(made)
    if Stage.METRICS in found:
        assert LAYERS <= found[Stage.METRICS] <= 2 * LAYERS
        found[Stage.METRICS] = LAYERS
    return found


def test_a_first_search_computes_every_stage_once(base, place, tmp_path):
    first, _ = base
    assert solved(first.made) == {
        Stage.GRAMS: 8,
        Stage.LABELS: LAYERS + 2,
        Stage.SPECTRA: LAYERS,
        Stage.SPANS: LAYERS,
        Stage.ANCHORS: LAYERS,
        Stage.METRICS: LAYERS,
        Stage.GAPS: 7,
        Stage.PREDICTIONS: LAYERS,
        Stage.CORRECTIONS: 1,
        Stage.ALLOCATION: 1,
        Stage.REFINEMENT: LAYERS,
    }
    assert first.notes == []
    # The cache changes nothing.
    alone = place.search(tmp_path / "alone", None)
    assert alone.made == first.made
    assert_alike(alone.figures(), first.figures())
    assert not (first.run.folder / "work").exists()


def test_the_same_again_elsewhere_computes_nothing(base, place, cache, tmp_path):
    moved = Place(shutil.copytree(place.model, tmp_path / "moved"), shutil.copy(place.text, tmp_path / "text.txt"))
    again = moved.search(tmp_path / "again", cache)
    assert again.made == {}
    assert again.analysed == set()
    # Seconds of a layer are of the solver that found it.
    assert_alike(again.figures(), base[0].figures())
    (note,) = again.notes
    assert note.startswith(f"Used again from {cache}: grams, labels, spans, anchors, metrics, solver-gaps, ")
    # The report says it too: a table of stages without the analysis would look as if there had been none.
    assert note in again.summary.notes


ALLOCATED = {Stage.ALLOCATION: 1, Stage.REFINEMENT: LAYERS}

FOUND = {Stage.CORRECTIONS: 1, **ALLOCATED}

ONE_SHOT = {Stage.METRICS: 2 * LAYERS, **ALLOCATED}
"""Of an allocator that reads no predictions: of every layer a solution to choose its metric by, and the choice."""

CHANGES: dict[str, tuple[SearchOptions, RefineOptions | None, dict[Stage, int], set[str]]] = {
    "budget": (replace(SEARCH, budget=0.4), None, FOUND, {"correct"}),
    "without corrections": (replace(SEARCH, correct=False), None, ALLOCATED, set()),
    "uniform": (replace(SEARCH, allocator="uniform"), None, ONE_SHOT, {"probe", "metric"}),
    "owl": (
        replace(SEARCH, allocator="owl"),
        None,
        {Stage.PROFILES: LAYERS, **ONE_SHOT},
        {"profile", "probe", "metric"},
    ),
    "matching": (SEARCH, RefineOptions(match="block"), {Stage.REFINEMENT: LAYERS + 2}, set()),
    "solver preset": (
        replace(SEARCH, solver_options={"steps": "5"}),
        None,
        {Stage.GAPS: 7, Stage.PREDICTIONS: LAYERS, **FOUND},
        {"gap", "predict", "correct"},
    ),
    # Candidates cut from spans read their directions, which nothing has read before.
    "candidates": (replace(SEARCH, candidates="span"), None, {Stage.SPANS: 2 * LAYERS, **FOUND}, {"span", "correct"}),
    "pattern": (
        replace(SEARCH, pattern="2:4", budget=0.7),
        None,
        {stage: LAYERS for stage in (Stage.METRICS, Stage.ANCHORS, Stage.PREDICTIONS)}
        # What rank is worth beside a pattern is read from the directions of spans.
        | {Stage.SPANS: 2 * LAYERS, Stage.GAPS: 7, **FOUND},
        {"span", "metric", "anchors", "gap", "predict", "correct"},
    ),
}


def targets(run: Run) -> list[tuple[str, int, int]]:
    """What every layer keeps."""
    return [(entry.name, entry.rank, entry.nnz) for entry in budget_file.read(run.budget_path).layers]


@pytest.mark.parametrize("change", CHANGES)
def test_only_what_differs_is_computed_and_all_is_as_in_a_fresh_run(base, place, cache, tmp_path, change):
    options, refining, made, entered = CHANGES[change]
    # Into the same folder with `fresh`: what the earlier run in it was does not matter.
    folder = shutil.copytree(base[0].run.folder, tmp_path / "run")
    found = place.search(folder, cache, options, refining, fresh=True)
    if change == "without corrections" and targets(found.run) == targets(base[0].run):
        # Where corrections moved nothing, neither did it to leave them out.
        made = {stage: count for stage, count in made.items() if stage is not Stage.REFINEMENT}
    assert (found.made if Stage.PREDICTIONS not in made else solved(found.made)) == made
    assert found.analysed == entered
    assert_alike(found.figures(), place.search(tmp_path / "alone", None, options, refining).figures())


def test_a_search_of_the_true_loss_shares_its_journal_and_finds_the_same(base, place, cache, tmp_path):
    options = replace(SEARCH, allocator="depth-ramp", search_tokens=600)
    place.search(tmp_path / "one", cache, replace(options, budget=0.45))
    journal = next(cache.glob("objective/*/journal.log"))
    found = place.search(tmp_path / "other", cache, options)
    # The corrections of the same budget are those of the search before.
    assert found.made == ALLOCATED
    alone = place.search(tmp_path / "alone", None, options)
    assert_alike(found.figures(), alone.figures())
    assert alone.summary.search is not None
    assert alone.summary.search.tokens > 0
    # Nothing is evaluated twice: with fewer tokens the search tries the first of the same candidates.
    before = journal.read_bytes()
    place.search(tmp_path / "third", cache, replace(options, search_tokens=400))
    assert set(journal.read_bytes().splitlines()) >= set(before.splitlines())
    assert b"losses" not in journal.read_bytes()[len(before) :]


def test_another_text_or_seed_shares_nothing(base, place, cache, tmp_path):
    for i, (options, texts) in enumerate(
        [(replace(SEARCH, seed=1), {}), (SEARCH, {"nsamples": 7}), (SEARCH, {"batch_size": 4})]
    ):
        session = place.session(Recording(), options.seed, **texts)
        before = addresses.search_addresses(place.session(Recording()), resolve(SEARCH))
        after = addresses.search_addresses(session, resolve(options))
        assert [stage for stage in before if before[stage].digest == after[stage].digest] == [], i
    found = place.search(tmp_path / "run", cache, replace(SEARCH, seed=1))
    assert_all_made(found, base[0])
    # More windows to evaluate on are no other analysis.
    session = place.session(Recording(), eval_windows=3)
    after = addresses.analysis_addresses(session, resolve(SEARCH).analysis)
    assert after == addresses.analysis_addresses(place.session(Recording()), resolve(SEARCH).analysis)


def test_compress_uses_the_grams_of_a_search(base, place, cache, tmp_path):
    file = budget_file.read(base[0].run.budget_path)
    resolved = resolve_refinement(RefineOptions(), get_solver("3basil", {"steps": "3"}), True, seed=0)
    arguments = (resolved, base[0].run.budget_path, file)
    folders = {"shared": Cache(cache), "alone": None}
    made: dict[str, Mapping[Stage, int]] = {}
    for name, shared in folders.items():
        progress = Recording()
        session = place.session(progress)
        with counted() as made[name]:
            compress.compress(session, Reporter(progress), *arguments, tmp_path / name, "x", shared)
    # The output Grams of the same seed too; metrics it chooses without anchors, as a search does that has none.
    assert made["shared"] == {Stage.METRICS: 2 * LAYERS, Stage.REFINEMENT: LAYERS}
    assert made["alone"] == {Stage.GRAMS: 8, Stage.LABELS: LAYERS + 2, **made["shared"]}
    assert_alike(results(tmp_path / "shared"), results(tmp_path / "alone"))


def test_a_family_uses_the_analysis_of_a_search(base, place, cache, tmp_path):
    progress = Recording()
    session = place.session(progress)
    options = replace(SEARCH, allocator="knapsack", search_tokens=0)
    with counted() as made:
        family.family(session, Reporter(progress), resolve(options), [0.4, 0.6], tmp_path / "f", "x", Cache(cache))
    assert made == {Stage.CORRECTIONS: 1}
    assert (tmp_path / "f" / "curves").is_dir()


READ_ALONE: dict[str, tuple[SearchOptions, dict[Stage, int], set[str]]] = {
    # The plain solver reads input Grams that the refinement takes itself, so that nothing of the dense model is needed.
    "uniform, a solver without output Grams": (
        replace(SEARCH, allocator="uniform", solver="wanda", solver_options={}),
        {},
        set(),
    ),
    "owl, a solver without output Grams": (
        replace(SEARCH, allocator="owl", solver="wanda", solver_options={}),
        {Stage.GRAMS: 8, Stage.PROFILES: LAYERS},
        {"grams", "profile"},
    ),
    "alpha, a solver with output Grams": (
        replace(SEARCH, allocator="alpha"),
        {Stage.GRAMS: 8, Stage.LABELS: LAYERS + 2, Stage.PROFILES: LAYERS, Stage.METRICS: 2 * LAYERS},
        {"labels", "profile", "probe", "metric"},
    ),
    "uniform without a sweep": (replace(SEARCH, allocator="uniform", sensitivity="none"), {}, set()),
    "knapsack without a sweep": (
        replace(SEARCH, sensitivity="none"),
        {stage: LAYERS for stage in (Stage.SPECTRA, Stage.SPANS, Stage.ANCHORS, Stage.PREDICTIONS)}
        | {Stage.GRAMS: 8, Stage.GAPS: 7},
        {"grams", "span", "anchors", "gap", "predict"},
    ),
    "knapsack by spans alone": (
        replace(SEARCH, predict_from="span", solver="wanda", solver_options={}),
        {Stage.SPECTRA: LAYERS, Stage.SPANS: 2 * LAYERS, Stage.PREDICTIONS: LAYERS}
        | {Stage.GRAMS: 8, Stage.LABELS: LAYERS + 2, Stage.CORRECTIONS: 1},
        {"labels", "span", "predict", "correct"},
    ),
}


@pytest.mark.parametrize("case", READ_ALONE)
def test_only_what_allocator_and_solver_read_is_computed(place, tmp_path, case):
    options, made, entered = READ_ALONE[case]
    found = place.search(tmp_path / "run", None, options)
    assert found.made == {**made, **ALLOCATED}
    assert found.analysed == entered
    file = budget_file.read(found.run.budget_path)
    predicted = options.allocator == "knapsack"
    assert (file.predicted is not None) == predicted
    assert all((entry.predicted is not None) == predicted for entry in file.layers)
    assert (file.error_unit is ErrorUnit.NOT_PREDICTED) == (not predicted)
    assert found.summary.compressed[0].kl > 0


def test_a_search_that_reads_no_predictions_finds_the_same_whatever_was_computed_before(base, place, cache, tmp_path):
    options = replace(SEARCH, allocator="uniform")
    alone = place.search(tmp_path / "alone", None, options)
    assert_alike(place.search(tmp_path / "after", cache, options).figures(), alone.figures())
    # Nor does what it has left behind change what a search with predictions finds.
    again = place.search(tmp_path / "again", cache, fresh=True)
    assert again.made == {}
    other = tmp_path / "other"
    place.search(tmp_path / "first", other, options)
    assert_alike(place.search(tmp_path / "second", other).figures(), base[0].figures())


# ------------------------------------------------------------------------------------------------- versions

MADE_AGAIN: dict[Stage, dict[Stage, int]] = {
    # The allocation of this search does not read profiles, though some do, and is the same, so that its refinement is.
    Stage.PROFILES: {Stage.ALLOCATION: 1},
    Stage.SPECTRA: {Stage.SPECTRA: LAYERS},
    Stage.GAPS: {Stage.GAPS: 7, Stage.PREDICTIONS: LAYERS, Stage.CORRECTIONS: 1, Stage.ALLOCATION: 1},
    Stage.CORRECTIONS: {Stage.CORRECTIONS: 1, Stage.ALLOCATION: 1},
    Stage.REFINEMENT: {Stage.REFINEMENT: LAYERS},
}


@pytest.mark.parametrize("stage", MADE_AGAIN, ids=str)
def test_a_new_version_computes_its_stage_and_the_followers_alone(base, place, cache, tmp_path, monkeypatch, stage):
    monkeypatch.setitem(addresses.VERSIONS, stage, addresses.VERSIONS[stage] + 1)  # pyright: ignore[reportArgumentType]
    found = place.search(tmp_path / "run", cache)
    assert found.made == MADE_AGAIN[stage]
    assert_alike(found.figures(), base[0].figures())


def test_a_run_of_an_earlier_version_is_refused_in_its_folder(base, place, cache, tmp_path, monkeypatch):
    monkeypatch.setitem(addresses.VERSIONS, Stage.SPANS, 99)  # pyright: ignore[reportArgumentType]
    folder = shutil.copytree(base[0].run.folder, tmp_path / "run")
    with pytest.raises(ArtefactError, match=r"holds a run of an earlier version \(of spans\)"):
        place.search(folder, cache)


# ------------------------------------------------------------------------------------------------- pruning

PRUNED = (
    Stage.GRAMS, Stage.SPECTRA, Stage.METRICS, Stage.SPANS, Stage.ANCHORS, Stage.GAPS, Stage.LABELS, Stage.PREDICTIONS,
    Stage.CORRECTIONS, (Stage.GRAMS, Stage.SPANS), (Stage.GRAMS, Stage.ANCHORS), (Stage.LABELS, Stage.METRICS), None,
)  # fmt: skip
"""Stages of which something is read after they are done; None: all."""


@pytest.mark.parametrize("stage", PRUNED, ids=str)
def test_where_a_stage_was_pruned_a_later_search_still_ends_right(base, place, cache, tmp_path, stage, pruned_search):
    found = Cache(cache)
    gone = stage if isinstance(stage, tuple) else (stage,)
    found.prune([entry for entry in found.entries() if stage is None or entry.stage in gone])
    options, refining, expected = pruned_search
    assert_alike(place.search(tmp_path / "run", cache, options, refining).figures(), expected)


@pytest.fixture(scope="module")
def pruned_search(place, tmp_path_factory) -> tuple[SearchOptions, RefineOptions, dict[str, Any]]:
    """A search with another budget, with matching that reads output Grams of blocks, and what it finds."""
    options, refining = replace(SEARCH, budget=0.45), RefineOptions(match="block", match_options={"epochs": "1"})
    alone = place.search(tmp_path_factory.mktemp("alone") / "run", None, options, refining)
    return options, refining, alone.figures()


# ------------------------------------------------------------------------------------------------- identity


def edit_tensor(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[7] += 0.5
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def edit_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))


def edit_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    # A character that is not in the text: the windows stay as they are.
    path.write_text(path.read_text().replace('"Q"', '"ß"'))


EDITS: dict[str, Callable[[Path], None]] = {
    "head": edit_tensor("lm_head.weight"),
    "config": edit_config,
    "tokenizer": edit_tokenizer,
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_model_is_another_run_and_nothing_of_it_is_in_the_cache(base, place, cache, tmp_path, edit):
    other = Place(shutil.copytree(place.model, tmp_path / "model"), place.text)
    folder = shutil.copytree(base[0].run.folder, tmp_path / "run")
    # Elsewhere, and unchanged: the same run.
    same = other.search(folder, cache)
    assert same.notes == [f"{folder} is finished; nothing was computed again."]
    EDITS[edit](other.model)
    with pytest.raises(ArtefactError, match=r"holds another run \(different model\)"):
        other.search(folder, cache)
    assert_all_made(other.search(tmp_path / "other", cache), base[0])


def test_a_model_in_memory_is_hashed_before_it_is_changed(place, tmp_path):
    progress = Recording()
    session = place.session(progress)
    before = model_sha256(session.layers, session.loaded.tokenizer)
    search.search(session, Reporter(progress), resolve(SEARCH), tmp_path / "run", "x", None)
    assert isinstance(session.loaded.model, PreTrainedModel)
    assert session.model_digest == before
    # The weights are gone, and the hash is not.
    assert all(parameter.is_meta for parameter in session.loaded.model.parameters())
