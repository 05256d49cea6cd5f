"""A workspace finds the artefacts of a stage in the stage's folder, wherever this is."""

from __future__ import annotations

import os
from typing import Any

import pytest

from globalopt.errors import ArtefactError
from globalopt.runs.artefacts import ANCHORS, CURVES, METRIC_CHOICE, PROBED, SOLVER_GAP, Artefact, Stage
from globalopt.runs.records import CheckedLoss, MetricChoice
from globalopt.runs.workspace import Workspace
from globalopt.values.budget import Target
from globalopt.values.layer import LayerSpec

SPEC = LayerSpec("block.0.up", 0, "block.0.in", "up", 4, 8)
OTHER = LayerSpec("block.0.down", 0, "block.0.in", "down", 4, 8)


def test_a_stage_without_a_folder_has_one_below_the_workspace(tmp_path):
    work = Workspace(tmp_path / "work", {Stage.GAPS: tmp_path / "elsewhere"})
    assert work.path(SOLVER_GAP, SPEC) == tmp_path / "elsewhere" / "block.0.up.json"
    assert work.path(METRIC_CHOICE, SPEC) == tmp_path / "work" / "metrics" / "block.0.up.json"
    assert work.path(CURVES, SPEC.name) == tmp_path / "work" / "spectra" / "curves" / "block.0.up.json"


def test_the_folders_of_one_workspace_are_not_those_of_another(tmp_path):
    folders = {Stage.GAPS: tmp_path / "elsewhere"}
    work = Workspace(tmp_path, folders)
    work.folders[Stage.METRICS] = tmp_path / "metrics-of-one"
    assert folders == {Stage.GAPS: tmp_path / "elsewhere"}


def test_missing_keeps_the_order_of_the_keys(tmp_path):
    work = Workspace(tmp_path)
    assert work.missing(SOLVER_GAP, [SPEC, OTHER]) == [SPEC, OTHER]
    work.put(SOLVER_GAP, SPEC, {Target(0, 8): 0.5})
    assert work.missing(SOLVER_GAP, [SPEC, OTHER]) == [OTHER]
    assert work.find(SOLVER_GAP, OTHER) is None
    assert work.find(SOLVER_GAP, SPEC) == {Target(0, 8): 0.5}


def test_one_kind_of_artefact_is_made_in_several_stages(tmp_path):
    work = Workspace(tmp_path)
    places = {work.path(ANCHORS.during(stage), SPEC) for stage in (Stage.ANCHORS, Stage.METRICS)}
    assert len(places) == 2
    # Two stages at one address share their artefacts.
    work.folders.update({Stage.ANCHORS: tmp_path / "one", Stage.METRICS: tmp_path / "one"})
    assert work.path(ANCHORS, SPEC) == work.path(ANCHORS.during(Stage.METRICS), SPEC)


def test_what_one_stage_makes_of_a_layer_does_not_overwrite_another(tmp_path):
    work = Workspace(tmp_path)
    artefacts: list[Artefact[Any, Any]] = [METRIC_CHOICE, PROBED, ANCHORS.during(Stage.METRICS)]
    assert {artefact.stage for artefact in artefacts} == {Stage.METRICS}
    assert len({work.path(artefact, SPEC) for artefact in artefacts}) == 3


def checked(weighted: float, plain: float) -> MetricChoice:
    return MetricChoice((CheckedLoss(Target(0, 8), 0.1, weighted, plain),))


def test_an_artefact_that_was_written_again_is_the_new_one_and_leaves_nothing(tmp_path):
    work = Workspace(tmp_path)
    work.put(METRIC_CHOICE, SPEC, checked(2.0, 1.0))
    work.put(METRIC_CHOICE, SPEC, checked(0.5, 1.0))
    assert work.get(METRIC_CHOICE, SPEC).uses_output_gram
    assert os.listdir(tmp_path / "metrics") == ["block.0.up.json"]


def test_where_nothing_can_be_written_it_ends_in_one_line(tmp_path):
    (tmp_path / "metrics").touch()
    with pytest.raises(ArtefactError, match=r"Cannot write .*block\.0\.up\.json: .* --out or --cache\.$"):
        Workspace(tmp_path).put(METRIC_CHOICE, SPEC, checked(2.0, 1.0))
