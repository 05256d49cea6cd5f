from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from globalopt.errors import ArtefactError
from globalopt.runs.files import digest, read_json, read_tensors, replacing, write_json, write_tensors
from globalopt.runs.folder import Run
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Gram
from globalopt.values.problem import ErrorSurface
from globalopt.values.results import Curve, Details, LayerCurves, Sample, Samples
from globalopt.values.span import Span

SPEC = LayerSpec("block.0.up", 0, "block.0.in", "up", 4, 8)
OTHER = LayerSpec("block.0.down", 0, "block.0.in", "down", 4, 8)
IDENTITY = {"model": "abc", "seed": 0}


@pytest.fixture
def opened(tmp_path) -> Run:
    return Run.start(tmp_path / "run", IDENTITY, {"command": "x"})


# ------------------------------------------------------------------------------------------------- writes


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("cause", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_what_was_there(tmp_path, cause):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise cause

    with pytest.raises(cause):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_folder_replaces_a_folder(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert os.listdir(path) == ["new"]
    assert os.listdir(tmp_path) == ["folder"]


def test_system_errors_are_ours(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArtefactError, match="Choose a writable --out"):
        write_json(tmp_path / "file" / "x.json", {})


def test_json_round_trip_is_bytes_for_bytes(tmp_path):
    value = {"b": [1, 0.1, None, True], "a": "ü"}
    write_json(tmp_path / "1.json", value)
    assert read_json(tmp_path / "1.json") == value
    write_json(tmp_path / "2.json", read_json(tmp_path / "1.json"))
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def test_json_is_strict(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 10**5, b"1" * 10**4])
def test_what_is_no_json(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ArtefactError, match="not valid JSON"):
        read_json(tmp_path / "x.json")


def test_tensors_round_trip(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.arange(6.0).reshape(2, 3).mT, "b": torch.zeros(2, 0)}
    write_tensors(path, tensors, {"n": 1})
    found, facts = read_tensors(path)
    assert facts == {"n": 1}
    assert set(found) == {"a", "b"}
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_broken_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ArtefactError, match="There is no file"):
        read_tensors(path)
    write_tensors(path, {"a": torch.ones(3)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="is broken"):
        read_tensors(path)
    save_file({"a": torch.ones(3)}, path, metadata={"facts": "{"})
    with pytest.raises(ArtefactError, match="is broken"):
        read_tensors(path)


def test_digest_ignores_the_order_of_keys():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


# ------------------------------------------------------------------------------------------------- runs


def test_a_run_is_gone_on_with(opened):
    again = Run.start(opened.folder, dict(IDENTITY), {"command": "another"})
    assert again.manifest == opened.manifest
    assert Run.open(opened.folder).manifest["facts"] == {"command": "x"}


def test_another_run_is_refused_and_names_what_differs(opened):
    with pytest.raises(ArtefactError, match=r"different seed\)"):
        Run.start(opened.folder, {**IDENTITY, "seed": 1}, {})
    assert Run.open(opened.folder).manifest["identity"] == IDENTITY


def test_fresh_deletes_artefacts_and_nothing_else(opened):
    opened.write_layer(SPEC, Decomposition(torch.ones(4, 8), torch.ones(4, 1), torch.ones(1, 8)), {})
    (opened.folder / "mine.txt").touch()
    Run.start(opened.folder, {**IDENTITY, "seed": 1}, {}, fresh=True)
    assert sorted(os.listdir(opened.folder)) == ["manifest.json", "mine.txt"]
    assert Run.open(opened.folder).manifest["identity"]["seed"] == 1


def test_a_folder_without_a_run(tmp_path):
    Run.check_folder(tmp_path / "missing")
    (tmp_path / ".hidden").touch()
    Run.check_folder(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ArtefactError, match="holds no run"):
        Run.start(tmp_path, IDENTITY, {})
    with pytest.raises(ArtefactError, match="is a file"):
        Run.check_folder(tmp_path / "file")
    with pytest.raises(ArtefactError, match="holds no run"):
        Run.open(tmp_path)


@pytest.mark.parametrize("manifest", [[], {}, {"schema": "1", "fingerprint": "", "identity": {}}, {"schema": 1}])
def test_manifests_of_others(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError, match="no manifest of a run"):
        Run.start(tmp_path, IDENTITY, {}, fresh=True)
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest


def test_artefacts_round_trip(opened):
    span = Span(
        torch.randn(4, 2),
        torch.tensor([2.0, 1.0]),
        torch.randn(2, 8),
        torch.eye(4, 8),
        torch.ones(8),
        torch.ones(4, 1),
        {"k": 1.0},
    )
    opened.write_span(SPEC, span)
    found = opened.read_span(SPEC)
    assert torch.equal(found.residual(1), span.residual(1))
    assert found.stats == span.stats

    surface = ErrorSurface(SPEC, (Target(0, 16, NM(2, 4)), Target(1, 16, NM(2, 4))), (0.1 + 0.2, 0.0))
    opened.write_sensitivity(surface, None)
    assert opened.read_sensitivity(SPEC) == (surface, None)
    opened.write_sensitivity(surface, Gram(torch.eye(4), 7))
    outputs = opened.read_sensitivity(SPEC)[1]
    assert outputs is not None
    assert outputs.tokens == 7

    opened.write_gram("site", Gram(torch.eye(8), 9))
    assert opened.read_gram("site").tokens == 9

    value = Decomposition(torch.eye(4, 8), torch.ones(4, 0), torch.ones(0, 8), torch.ones(4, 8))
    opened.write_layer(SPEC, value, {"actual": 0.5})
    read, facts = opened.read_layer(SPEC)
    assert torch.equal(read.dense(), value.dense())
    assert read.signs is not None
    assert facts["actual"] == 0.5


def test_what_a_report_shows_beside_the_summary(opened):
    assert opened.read_details([SPEC.name, OTHER.name]) == Details()
    curves = LayerCurves(Curve(4, (1, 4), (2.0, 0.5)), Curve(32, (1, 6, 32), (1.0, 0.25, 0.0)))
    opened.write_curves(SPEC, curves)
    value = Decomposition(torch.eye(4, 8), torch.ones(4, 0), torch.ones(0, 8))
    opened.write_layer(SPEC, value, {"trace": ((0, 8.0), (32, 0.1 + 0.2))})
    # As runs were written before there were traces.
    opened.write_layer(OTHER, value, {})
    samples = Samples("validation", 2, 3, (Sample("ü<b>", "a", "b", 1),))
    opened.write_samples(samples)
    traces = {SPEC.name: ((0, 8.0), (32, 0.1 + 0.2))}
    assert opened.read_details([SPEC.name, OTHER.name]) == Details({SPEC.name: curves}, traces, samples)


def test_what_a_report_shows_may_be_broken(opened):
    write_json(opened.curves_path(SPEC), {"singular": 1})
    with pytest.raises(ArtefactError, match=r"curves.*does not fit: singular"):
        opened.read_curves(SPEC.name)
    opened.layer_path(SPEC).parent.mkdir()
    opened.layer_path(SPEC).write_bytes(b"no tensors")
    with pytest.raises(ArtefactError, match="is broken"):
        opened.read_trace(SPEC.name)
    write_tensors(opened.layer_path(SPEC), {}, {"trace": [[0]]})
    with pytest.raises(ArtefactError, match="does not fit"):
        opened.read_trace(SPEC.name)


def test_an_artefact_of_another_layer_is_refused(opened):
    opened.write_layer(OTHER, Decomposition(torch.ones(4, 8), torch.ones(4, 0), torch.ones(0, 8)), {})
    opened.layer_path(OTHER).rename(opened.layer_path(SPEC))
    with pytest.raises(ArtefactError, match=r"block\.0\.up.*holds.*block\.0\.down"):
        opened.read_layer(SPEC)


def test_an_artefact_that_lacks_something_is_refused(opened):
    facts = {"name": SPEC.name, "d_out": 4, "d_in": 8}
    write_tensors(opened.layer_path(SPEC), {"S": torch.ones(4, 8)}, facts)
    with pytest.raises(ArtefactError, match="lacks U, V"):
        opened.read_layer(SPEC)
    write_tensors(opened.sensitivity_path(SPEC), {}, facts)
    with pytest.raises(ArtefactError, match="lacks options, tokens"):
        opened.read_sensitivity(SPEC)


def test_a_model_that_is_not_there_yet(opened):
    with pytest.raises(ArtefactError, match="did not finish"):
        _ = opened.saved_model
    with pytest.raises(ArtefactError, match="did not finish"):
        opened.read_summary()
    opened.model_folder.mkdir()
    assert opened.saved_model == opened.model_folder
