"""Run folders: one run in each, gone on with by the same command, and whole without the cache when it is finished."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from globalopt.errors import ArtefactError
from globalopt.runs.artefacts import (
    CURVES,
    FAMILY,
    GRAM,
    MATCHED_BLOCK,
    MATCHED_MODEL,
    SAMPLES,
    SOLVED_LAYER,
    SUMMARY,
    WINDOWS,
    Stage,
)
from globalopt.runs.files import write_json, write_tensors
from globalopt.runs.folder import LOCK, MANIFEST, WORK, Run
from globalopt.runs.records import Matched, SolvedLayer
from globalopt.values.curves import Curve, LayerCurves
from globalopt.values.decomposition import Decomposition
from globalopt.values.layer import LayerSpec
from globalopt.values.layer_results import MatchResult
from globalopt.values.metric import Gram
from globalopt.values.results import Details
from globalopt.values.samples import Sample, Samples

SPEC = LayerSpec("block.0.up", 0, "block.0.in", "up", 4, 8)
OTHER = LayerSpec("block.0.down", 0, "block.0.in", "down", 4, 8)
IDENTITY = {"model": "abc", "seed": 0, "algorithms": {"grams": 1, "spans": 1}}

CURVE = LayerCurves(Curve(4, (1, 4), (2.0, 0.5)), Curve(32, (1, 6, 32), (1.0, 0.25, 0.0)))


def solved(fill: float = 1.0, **metadata: object) -> SolvedLayer:
    return SolvedLayer(Decomposition(torch.full((4, 8), fill), torch.ones(4, 0), torch.ones(0, 8)), metadata)


def start(folder: Path, fresh: bool = False, **changes: object) -> Run:
    """A run that is closed again at once."""
    with Run.start(folder, {**IDENTITY, **changes}, {"command": "x"}, fresh) as run:
        return run


@pytest.fixture
def made(tmp_path) -> Run:
    return start(tmp_path / "run")


# ------------------------------------------------------------------------------------------------- one run in a folder


def test_a_run_is_gone_on_with(made):
    again = Run.start(made.folder, dict(IDENTITY), {"command": "another"})
    assert again.manifest == made.manifest
    assert Run.open(made.folder).manifest["facts"] == {"command": "x"}
    again.close()
    assert os.listdir(made.folder) == [MANIFEST]


def test_another_run_is_refused_and_names_what_differs(made):
    with pytest.raises(ArtefactError, match=r"holds another run \(different seed\).*another --out, or --fresh"):
        start(made.folder, seed=1)
    with pytest.raises(ArtefactError, match=r"different extra, model\)"):
        start(made.folder, model="b", extra={"a": 1})
    assert Run.open(made.folder).manifest["identity"] == IDENTITY
    # A refusal holds nothing.
    start(made.folder)


def test_an_earlier_version_is_named(made):
    with pytest.raises(ArtefactError, match=r"holds a run of an earlier version \(of spans\)"):
        start(made.folder, algorithms={"grams": 1, "spans": 2})
    with pytest.raises(ArtefactError, match=r"different seed, spans\)"):
        start(made.folder, seed=1, algorithms={"grams": 1, "spans": 2})


def test_inner_records_are_compared_field_by_field(tmp_path):
    start(tmp_path, methods={"solver": {"options": {"steps": 5, "damping": 0.1}}})
    with pytest.raises(ArtefactError, match=r"different steps\)"):
        start(tmp_path, methods={"solver": {"options": {"steps": 6, "damping": 0.1}}})


def test_a_newer_manifest_is_refused(made):
    manifest = {**made.manifest, "schema": 99}
    write_json(made.folder / MANIFEST, manifest)
    with pytest.raises(ArtefactError, match="newer version"):
        Run.open(made.folder)


def test_fresh_deletes_the_run_and_nothing_else(made):
    for name in ("layers", "matched", "curves", "report", "model", "budgets", WORK):
        (made.folder / name).mkdir()
        (made.folder / name / "x").touch()
    for name in ("summary.json", "budget.json", "eval.json", "windows.json", "samples.json", "family.json", "mine.txt"):
        (made.folder / name).touch()
    start(made.folder, fresh=True, seed=1)
    assert sorted(os.listdir(made.folder)) == [MANIFEST, "mine.txt"]
    assert Run.open(made.folder).manifest["identity"]["seed"] == 1


def test_fresh_leaves_the_cache_alone(made, tmp_path):
    with Run.start(made.folder, IDENTITY, {}) as run:
        run.folders[Stage.REFINEMENT] = tmp_path / "cache"
        run.put(SOLVED_LAYER, SPEC, solved())
        run.publish([SPEC], 0)
    start(made.folder, fresh=True, seed=1)
    assert sorted(os.listdir(made.folder)) == [MANIFEST]
    assert (tmp_path / "cache" / "layers" / f"{SPEC.name}.safetensors").exists()


def test_a_folder_without_a_run(tmp_path):
    Run.check_folder(tmp_path / "missing")
    (tmp_path / ".hidden").touch()
    Run.check_folder(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ArtefactError, match="holds no run"):
        start(tmp_path)
    with pytest.raises(ArtefactError, match="is a file"):
        Run.check_folder(tmp_path / "file")
    with pytest.raises(ArtefactError, match="holds no run"):
        Run.open(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "file"]


def test_a_killed_start_is_no_obstacle(tmp_path):
    # Killed before the manifest was written: nothing is there but the lock.
    (tmp_path / LOCK).touch()
    assert start(tmp_path).folder == tmp_path
    assert os.listdir(tmp_path) == [MANIFEST]


@pytest.mark.parametrize("manifest", [[], {}, {"schema": "1", "fingerprint": "", "identity": {}}, {"schema": 1}])
def test_manifests_of_others(tmp_path, manifest):
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError, match="no manifest of a run"):
        start(tmp_path, fresh=True)
    assert json.loads((tmp_path / MANIFEST).read_text()) == manifest


# ------------------------------------------------------------------------------------------------- one writer


HOLDER = """
import sys
from pathlib import Path
from globalopt.runs.folder import Run
with Run.start(Path(sys.argv[1]), {"seed": 0}, {}):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("ends", ["line", "kill"])
def test_one_process_writes_a_run(tmp_path, ends):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        for fresh in (False, True):
            with pytest.raises(ArtefactError, match=r"Another process is writing the run in .*another --out\."):
                Run.start(tmp_path, {"seed": 0}, {}, fresh)
        # Readers are welcome.
        assert Run.open(tmp_path).manifest["identity"] == {"seed": 0}
        if ends == "kill":
            holder.kill()
        else:
            holder.stdin.write("\n")
            holder.stdin.flush()
        holder.wait()
    Run.start(tmp_path, {"seed": 0}, {}).close()
    assert os.listdir(tmp_path) == [MANIFEST]


# ------------------------------------------------------------------------------------------------- what is published


def test_a_finished_run_is_whole_without_the_cache(tmp_path, made):
    cache = tmp_path / "cache"
    with Run.start(made.folder, IDENTITY, {}) as run:
        run.folders.update({stage: cache / stage for stage in Stage if stage is not Stage.RESULT})
        run.put(GRAM, SPEC.site, Gram(torch.eye(8), 7))
        for spec in (SPEC, OTHER):
            run.put(SOLVED_LAYER, spec, solved(trace=[[0, 8.0]]))
            run.put(CURVES, spec.name, CURVE)
        matched = {"loss": "nats", "before": 2.0, "after": 1.0, "epochs": 3, "kept_epoch": 2, "seconds": 0.5}
        run.put(MATCHED_BLOCK, 0, Matched({SPEC.name: solved(2.0).value, OTHER.name: solved(3.0).value}, {}, matched))
        assert run.layer(SPEC).S[0, 0] == 2
        run.publish([SPEC, OTHER], 1)
        run.publish([SPEC, OTHER], 1)
        assert run.path(SOLVED_LAYER, SPEC).parent == made.folder / "layers"
    subprocess.run(["rm", "-r", str(cache)], check=True)
    read = Run.open(made.folder)
    assert sorted(os.listdir(made.folder)) == ["curves", "layers", MANIFEST, "matched"]
    assert read.layer(SPEC).S[0, 0] == 2
    assert read.matches(1) == (MatchResult(0, "nats", 2.0, 1.0, 3, 2, 0.5),)
    assert read.details([SPEC.name]) == Details({SPEC.name: CURVE}, {SPEC.name: ((0, 8.0),)}, None)


def test_a_layer_is_as_the_last_stage_left_it(made):
    made.put(SOLVED_LAYER, SPEC, solved(1.0))
    assert made.layer(SPEC).S[0, 0] == 1
    made.put(MATCHED_BLOCK, 0, Matched({SPEC.name: solved(2.0).value}, {}, {}))
    assert made.layer(SPEC).S[0, 0] == 2
    made.put(MATCHED_MODEL, None, Matched({SPEC.name: solved(3.0).value}, {}, {}))
    assert made.layer(SPEC).S[0, 0] == 3


# ------------------------------------------------------------------------------------------------- what reports read


def test_what_a_report_shows_beside_the_summary(made):
    assert made.details([SPEC.name, OTHER.name]) == Details()
    made.put(CURVES, SPEC.name, CURVE)
    made.put(SOLVED_LAYER, SPEC, solved(trace=((0, 8.0), (32, 0.1 + 0.2))))
    # A solver without iterations has no trace.
    made.put(SOLVED_LAYER, OTHER, solved())
    samples = Samples("validation", 2, 3, (Sample("ü<b>", "a", "b", 1),))
    made.put(SAMPLES, None, samples)
    traces = {SPEC.name: ((0, 8.0), (32, 0.1 + 0.2))}
    assert made.details([SPEC.name, OTHER.name]) == Details({SPEC.name: CURVE}, traces, samples)


def test_what_a_report_shows_may_be_broken(made):
    write_json(made.path(CURVES, SPEC.name), {"name": SPEC.name, "singular": 1})
    with pytest.raises(ArtefactError, match=r"curves.*does not fit: singular"):
        made.details([SPEC.name])
    made.path(CURVES, SPEC.name).unlink()
    made.path(SOLVED_LAYER, SPEC).parent.mkdir()
    made.path(SOLVED_LAYER, SPEC).write_bytes(b"no tensors")
    with pytest.raises(ArtefactError, match="is broken"):
        made.details([SPEC.name])
    write_tensors(made.path(SOLVED_LAYER, SPEC), {}, {"trace": [[0]]})
    with pytest.raises(ArtefactError, match="does not fit"):
        made.details([SPEC.name])


def test_results_that_are_not_there_yet(made):
    with pytest.raises(ArtefactError, match="did not finish"):
        _ = made.saved_model
    with pytest.raises(ArtefactError, match="did not finish"):
        made.summary()
    assert made.window_losses() == ()
    made.model_folder.mkdir()
    assert made.saved_model == made.model_folder
    write_json(made.path(WINDOWS, None), [{}])
    with pytest.raises(ArtefactError, match=r"windows\.json does not fit"):
        made.window_losses()


def test_a_family_is_no_single_run(made):
    write_json(made.path(FAMILY, None), {})
    for read in (made.summary, lambda: made.saved_model):
        with pytest.raises(ArtefactError, match="holds a family of budgets"):
            read()
    with pytest.raises(ArtefactError, match=r"family\.json does not fit"):
        made.family()
    assert not made.has(SUMMARY, None)
