"""Predicted losses of a model are corrected by the model: what is measured, what is kept, and what is left behind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from allocators import Knapsack
from globalopt.analysis import corrections
from globalopt.analysis.attribution import attribute
from globalopt.analysis.layer_analysis import LayerAnalysis
from globalopt.pipeline import search as searching
from globalopt.pipeline.analyse import analyse
from globalopt.pipeline.example import example_plan, example_reporter, example_session
from globalopt.pipeline.plan import SearchPlan
from globalopt.pipeline.problem import pose
from globalopt.pipeline.search import corrected, true_loss
from globalopt.pipeline.session import Session
from globalopt.protocols import Reads
from globalopt.runs.artefacts import CORRECTIONS, SHARES, Stage
from globalopt.runs.folder import Run
from globalopt.values.budget import Budget
from globalopt.values.problem import Problem

Posed = tuple[Session, SearchPlan, LayerAnalysis, Problem, Run]


@pytest.fixture(params=["anchors", "span"])
def posed(request, tmp_path: Path) -> Iterator[Posed]:
    session = example_session()
    plan = example_plan(0.4, allocator="knapsack", predict_from=request.param)
    with Run.start(tmp_path / "run", {}, {}) as run:
        analysis = analyse(session, example_reporter(), plan.analysis, run, plan.reads)
        yield session, plan, analysis, pose(session, plan, run), run


def test_the_kept_corrections_lead_to_the_least_loss_that_was_measured(posed):
    session, plan, analysis, problem, run = posed
    dense = {spec.name: session.layers.weight(spec.name) for spec in problem.specs}
    found = corrected(session, example_reporter(), plan, analysis, problem, [problem.budget])
    assert all(torch.equal(session.layers.weight(name), weight) for name, weight in dense.items())
    made = run.get(CORRECTIONS, None)
    assert 1 <= len(made.losses) <= plan.rounds
    # All windows of this text are fewer than corrections look at, so that the objective says the same.
    targets = Knapsack(exact=False).allocate(found).targets
    with true_loss(session, plan, analysis, problem) as objective:
        measured = float(objective.losses([targets], range(objective.chunks)).mean())
    assert measured == pytest.approx(min(made.losses), rel=1e-3)
    assert min(made.losses) <= made.losses[0]
    # It is read back, whatever the model would say now.
    again = corrected(session, example_reporter(), plan, analysis, problem, [problem.budget])
    assert again.surfaces == found.surfaces
    assert again.budget == problem.budget


@pytest.mark.parametrize("cliff", [False, True], ids=["shares", "alone"])
def test_corrections_that_were_killed_ask_nothing_again(posed, monkeypatch, cliff):
    session, plan, analysis, problem, run = posed
    if cliff:
        monkeypatch.setattr(corrections, "CLIFF", 0.0)
    asked: list[int] = []
    last = 1

    def counted(*arguments):
        if len(asked) == last:
            raise KeyboardInterrupt
        asked.append(1)
        return attribute(*arguments)

    monkeypatch.setattr(searching, "attribute", counted)
    whole = [session, example_reporter(), plan, analysis, problem, [problem.budget]]
    with pytest.raises(KeyboardInterrupt):
        corrected(*whole)
    assert not run.has(CORRECTIONS, None)
    last = 100
    corrected(*whole)
    made = run.get(CORRECTIONS, None)
    answers = len(list(run.path(SHARES, "").parent.iterdir()))
    assert len(asked) == answers > 1
    shutil.rmtree(run.stage_folder(Stage.CORRECTIONS))
    corrected(*whole)
    again = run.get(CORRECTIONS, None)
    assert len(asked) == 2 * answers
    assert again == made


def test_no_tokens_of_the_search_are_spent_and_nothing_is_in_its_journal(posed):
    session, plan, analysis, problem, run = posed
    corrected(session, example_reporter(), plan, analysis, problem, [problem.budget])
    assert not run.journal_path.exists()


def test_layers_are_replaced_alone_where_every_step_is_a_cliff(posed, monkeypatch):
    session, plan, analysis, problem, run = posed
    monkeypatch.setattr(corrections, "CLIFF", 0.0)
    corrected(session, example_reporter(), plan, analysis, problem, [problem.budget])
    made = run.get(CORRECTIONS, None)
    assert len(made.losses) == plan.rounds
    # The few of the largest shares alone are corrected in each round, and there are more layers.
    assert set(made.points) <= {spec.name for spec in problem.specs}


def test_several_budgets_are_corrected_one_after_the_other(posed):
    session, plan, analysis, problem, run = posed
    budgets = [Budget.fraction(kept, problem.specs) for kept in (0.3, 0.7)]
    found = corrected(session, example_reporter(), plan, analysis, problem, budgets)
    assert found.budget == problem.budget
    assert len(run.get(CORRECTIONS, None).losses) <= plan.rounds


def test_nothing_is_corrected_where_it_is_refused_or_nothing_is_predicted(posed):
    session, _, analysis, problem, run = posed
    for options in ({"correct": False}, {"sensitivity": "none"}, {"allocator": "uniform"}):
        plan = example_plan(0.4, **{"allocator": "knapsack", **options})
        assert corrected(session, example_reporter(), plan, analysis, problem, [problem.budget]) is problem
    assert not run.has(CORRECTIONS, None)


def test_the_first_windows_of_a_text_may_be_taken_alone():
    session = example_session(windows=6)
    split = session.splits.calibration
    some = torch.cat([batch.input_ids for batch in session.batches(split, most=2, windows=3)])
    assert torch.equal(some, split.windows[:3])
    assert [len(batch.input_ids) for batch in session.batches(split, most=2, windows=3)] == [2, 1]
    assert sum(len(batch.input_ids) for batch in session.batches(split, windows=100)) == len(split.windows)


def test_without_predictions_a_problem_has_options_that_a_uniform_budget_needs(posed):
    session, _, _, _, run = posed
    plan = example_plan(0.4, solver="3basil")
    problem = pose(session, plan, run, Reads.NOTHING)
    assert {surface.spec.name for surface in problem.surfaces} == {spec.name for spec in session.layers.specs}
    assert max(target.rank for surface in problem.surfaces for target in surface.targets) > 0
    allocation = plan.allocator.allocate(problem)
    assert 0.98 * problem.budget.limit <= allocation.used <= problem.budget.limit
