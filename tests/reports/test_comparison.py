from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console, RenderableType

from globalopt.errors import UsageError
from globalopt.values.results import Summary
from reports import comparison
from reports.comparison import measured_runs
from reports.paired import incomparable
from tests.reports.factory import make_metrics, make_search, make_searched, make_summary


def shown(part: RenderableType) -> str:
    console = Console(file=StringIO(), width=80, color_system=None)
    console.print(part)
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    return text


def with_metrics(**changed: object) -> Summary:
    summary = make_summary()
    return replace(
        summary,
        dense=tuple(replace(m, **changed) for m in summary.dense),  # type: ignore[arg-type]
        compressed=tuple(replace(m, **changed) for m in summary.compressed),  # type: ignore[arg-type]
    )


def test_runs_on_the_same_text_are_compared() -> None:
    other = make_summary(
        allocator="uniform",
        compressed=(make_metrics("test", 70.0, 0.0483),),
        dense=(make_metrics("test", 62.21, None),),
    )
    text = shown(comparison([make_summary(), other], ["found", "even"]))
    above = text.partition("Against")[0]
    rows = {line.split()[0]: line.split() for line in above.splitlines() if line.strip()}
    assert rows["found"][1:] == ["knapsack", "0.520", "0.00302", "±0.00008", "62.4", "±0.8", "+0.4", "%"]
    assert rows["even"][1:] == ["uniform", "0.520", "0.0483", "±0.0012", "70.0", "±0.9", "+12.5", "%"]
    assert "all runs: budget 0.5, solver 3basil, seed 0" in text
    assert "Comparison on test" in text
    assert "Not comparable" not in text


def test_another_text_is_refused_by_name() -> None:
    text = shown(comparison([make_summary(), with_metrics(text_sha256="f" * 64)]))
    assert "Not comparable" in text
    assert "text differs: 111111111111 (1); ffffffffffff (2)" in text
    assert "window length" not in text


def test_another_window_length_is_refused_by_name() -> None:
    text = shown(comparison([make_summary(), with_metrics(seqlen=256), make_summary()]))
    assert "window length differs: 512 (1, 3); 256 (2)" in text


def test_another_accounting_is_refused_by_name() -> None:
    text = shown(comparison([make_summary(), make_summary(accounting="bytes")]))
    assert "accounting differs: params (1); bytes (2)" in text


def test_another_dense_model_is_refused_and_rounding_is_not() -> None:
    runs = [make_summary(), make_summary()]
    dense = make_metrics("test", 62.21, None)
    near = replace(dense, nll=dense.nll + 5e-4)
    far = replace(dense, nll=dense.nll + 0.1, perplexity=68.75)
    compressed = (make_metrics("test", 70.0, 0.05),)
    near_run, far_run = (make_summary(dense=(one,), compressed=compressed) for one in (near, far))
    assert incomparable(measured_runs([*runs, near_run], "abc"), "test") == ()
    reasons = incomparable(measured_runs([*runs, far_run], "abc"), "test")
    assert reasons == ("dense perplexity differs: 62.21 (a, b); 68.75 (c)",)


def test_layers_of_other_names_are_another_model_also_where_their_sizes_agree() -> None:
    renamed = replace(
        make_summary(), layers=tuple(replace(la, name=f"other.{la.name}") for la in make_summary().layers)
    )
    (reason,) = incomparable(measured_runs([make_summary(), renamed], "ab"), "test")
    assert reason.startswith("model differs in names or shapes of layers: 55 layers,")
    assert reason.count("55 layers") == 2


def test_a_run_without_the_split_is_said_and_shown_without_figures() -> None:
    bare = make_summary(dense=(), compressed=())
    text = shown(comparison([make_summary(), bare], split="test"))
    assert "not measured on test: 2" in text
    assert next(line.split() for line in text.splitlines() if line[:1] == "2") == ["2", "0.520", "-", "-", "-"]


def test_nothing_is_lost_where_every_column_differs() -> None:
    other = make_summary(asked=0.25, allocator="policy-gradient", solver="hassle-free", seed=12345)
    text = "".join(shown(comparison([make_summary(), other], ["runs/first", "runs/second"])).split())
    for cell in ("0.25", "12345", "0.00302", "±0.00008", "62.4", "±0.8", "+0.4%"):
        assert cell in text


def test_no_run_and_wrong_labels_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="no run"):
        comparison([])
    with pytest.raises(UsageError, match="2 labels were given for 1 runs"):
        comparison([make_summary()], ["a", "b"])


def test_the_tokens_of_searches_are_shown_where_there_are_any() -> None:
    found = make_searched(make_search())
    text = shown(comparison([make_summary(), found], ["knapsack", "searched"]))
    above = text.partition("Against")[0]
    rows = {line.split()[0]: line.split() for line in above.splitlines() if line.strip()}
    assert (rows["knapsack"][3], rows["searched"][3]) == ("-", "1.93M")
    assert "tokens: forward tokens" in text
    assert "tokens" not in shown(comparison([make_summary(), make_summary(allocator="uniform")]))


def test_tokens_that_all_runs_spent_are_said_once() -> None:
    found = make_searched(make_search())
    text = shown(comparison([found, replace(found, seed=1)]))
    assert "all runs: budget 0.5, allocator evolution, solver 3basil, tokens 1.93M" in text
