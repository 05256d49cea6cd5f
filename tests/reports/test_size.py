from __future__ import annotations

from dataclasses import replace

from reports.size import size_facts
from tests.reports.factory import make_layers, make_summary


def test_size_counts_what_is_kept_and_what_was_left_alone() -> None:
    (layer,) = make_layers(1)[-1:]
    layer = replace(layer, d_out=20, d_in=50, rank=2, nnz=360, bytes=1125)
    told = dict(size_facts(make_summary(layers=(layer,), skipped={"embeddings": 1000})))
    assert told["of the layers"] == "50.00 %: 500 of 1,000 parameters"
    assert told["of the model"] == "75.00 %: 1,500 parameters"
    assert told["packed layers"].startswith("56.25 %: ")
    assert "not measured" in told["speed"]


def test_bytes_that_nobody_counted_are_left_out() -> None:
    layers = tuple(replace(layer, bytes=0) for layer in make_layers(1))
    assert "packed layers" not in dict(size_facts(make_summary(layers=layers)))
