from __future__ import annotations

import re
from dataclasses import replace
from io import BytesIO, StringIO, TextIOWrapper

import pytest
from rich.console import Console, RenderableType

from globalopt.errors import ArtefactError
from globalopt.values.decomposition import Status
from globalopt.values.embeddings import Embedding
from globalopt.values.error_unit import ErrorUnit
from globalopt.values.layer_results import MatchResult
from globalopt.values.search_record import Evaluation, Outcome, Search
from reports import render
from reports.groups import Grid, Group
from reports.layer_tables import by_block_table, by_kind_table, layer_allocation, layer_results
from reports.quality_tables import quality
from reports.shaded_grid import kept_grid, span
from reports.tables import budget, budget_facts, notes, provenance, searched, stages
from tests.reports.factory import make_layers, make_metrics, make_search, make_searched, make_summary


def shown(part: RenderableType | None, width: int = 80) -> str:
    assert part is not None
    console = Console(file=StringIO(), width=width, color_system=None)
    console.print(part)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def row(text: str, first: str) -> list[str]:
    """The cells of the line that starts with `first`."""
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [first])


def test_the_budget_stands_beside_the_uniform_one() -> None:
    assert "uniform" not in shown(budget(make_summary()))
    told = make_summary(predicted=0.001, uniform=Outcome(999, 0.0042, None, None))
    assert row(shown(budget(told)), "uniform") == ["uniform", "predicted", "0.00420,", "4.20", "times", "as", "much"]
    search = make_search(loss=0.002)
    asked = make_searched(search, predicted=0.001, uniform=Outcome(999, 0.0042, 0.005, 0.001))
    assert "candidates lose 0.00500 against 0.00200, 2.50 times" in shown(budget(asked))


def test_the_budget_says_asked_limit_used_and_certificate() -> None:
    summary = make_summary(used=999_899, limit=1_000_000, total=2_000_000, predicted=0.0101, bound=0.01)
    text = " ".join(shown(budget(summary)).split())
    assert "asked keep 0.5 of the compressible parameters" in text
    assert "limit 1,000,000 of 2,000,000 parameters" in text
    assert "used 999,899 parameters, 99.98 % of the limit" in text
    assert "predicted loss 0.0101 nats per token" in text
    assert "within 1.0 % of the optimum of the surrogate (bound 0.0100)" in text
    assert "not covered model.embed_tokens 2,097,152; model.layers.5" in text


def test_without_a_bound_there_is_no_certificate() -> None:
    assert "no certificate" in shown(budget(make_summary(bound=None)))


def test_a_predicted_loss_has_the_unit_of_the_budget() -> None:
    text = shown(budget(make_summary(error_unit=ErrorUnit.OUTPUT_ERROR)))
    assert re.search(r"predicted loss .* nats per token", text)


def test_a_kind_row_pools_its_layers() -> None:
    summary = make_summary()
    text = shown(by_kind_table(summary))
    layers = [layer for layer in summary.layers if layer.kind == "k_proj"]
    cells = row(text, "k_proj")
    assert cells[1] == "7"
    assert cells[2] == f"{sum(la.cost for la in layers) / sum(la.dense_cost for la in layers):.3f}"
    assert cells[4] == f"{sum(la.rank for la in layers) / 7:.1f}"
    assert float(cells[7]) == pytest.approx(sum(la.actual for la in layers), abs=1e-6)
    assert row(text, "all")[2] == f"{summary.used / summary.total:.3f}"


def test_pooling_weighs_by_size() -> None:
    small, large = make_layers(1)[1], make_layers(1)[4]
    pooled = Group.pool("both", [replace(small, relative=0.1, rank=0), replace(large, relative=0.2, rank=10)])
    weight = large.dense_cost / (small.dense_cost + large.dense_cost)
    assert pooled.relative == pytest.approx(0.1 + 0.1 * weight)
    assert pooled.rank == pytest.approx(10 * weight)


def test_a_block_row_counts_the_layers_it_has() -> None:
    text = shown(by_block_table(make_summary()))
    assert [row(text, str(block))[1] for block in (4, 5)] == ["7", "6"]


def test_errors_without_prediction_leave_the_column_out() -> None:
    layers = tuple(replace(layer, predicted=None) for layer in make_layers())
    summary = make_summary(layers=layers, error_unit=ErrorUnit.OUTPUT_ERROR)
    assert "predicted" not in shown(by_kind_table(summary))
    assert "predicted" in shown(by_kind_table(make_summary()))
    assert row(shown(layer_results(summary)), "0.self_attn.q_proj")[1] == "-"


def test_the_grid_shows_every_kept_fraction_and_marks_the_missing_layer() -> None:
    summary = make_summary()
    text = shown(kept_grid(summary.layers))
    cells = Grid.of(summary.layers).cells
    kinds = list(dict.fromkeys(layer.kind for layer in summary.layers))
    for block in range(8):
        expected = [f"{cells[block, k].kept:.3f}" if (block, k) in cells else "-" for k in kinds]
        assert row(text, str(block))[1:8] == expected
    assert "no such layer" in text


def test_the_grid_is_coloured_where_there_is_colour() -> None:
    console = Console(file=StringIO(), width=80, force_terminal=True, color_system="truecolor", no_color=False)
    console.print(kept_grid(make_summary().layers))
    assert isinstance(console.file, StringIO)
    assert "48;2;253;231;37m 1.000" in re.sub(r"m +1", "m 1", console.file.getvalue())


def test_a_model_with_many_kinds_gets_several_grids() -> None:
    layers = tuple(
        replace(make_layers(1)[0], name=f"{block}.{j}", block=block, kind=f"experts.{j}.gate_proj")
        for block in range(2)
        for j in range(12)
    )
    text = shown(kept_grid(layers))
    assert sum(line.lstrip().startswith("block ") for line in text.splitlines()) == 4
    assert max(map(len, text.splitlines())) <= 80


def test_matching_is_shown_where_it_was_done() -> None:
    results = (
        MatchResult(0, "nats", 0.002, 0.001, 8, 6, 12.3),
        MatchResult(1, "nats", 0.0, 0.0, 8, 0, 12.3),
        MatchResult(None, "kl", 0.0123, 0.0111, 2, 2, 80.0),
    )
    console = Console(file=StringIO(), width=80, color_system=None)
    render(make_summary(matching=results), console)
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue().partition("Transformer matching")[2].partition("Stages")[0]
    assert row(text, "0") == ["0", "nats", "0.00200", "0.00100", "-50.0", "%", "8", "6", "12.3", "s"]
    assert row(text, "1")[2:7] == ["0", "0", "-", "8", "start"]
    assert row(text, "model")[1:6] == ["kl", "0.0123", "0.0111", "-9.8", "%"]
    render(make_summary(), console)
    assert console.file.getvalue().count("Transformer matching") == 1


def test_two_layers_in_one_place_are_refused() -> None:
    layers = make_layers(1)
    with pytest.raises(ArtefactError, match="two layers of kind q_proj in block 0"):
        Grid.of([*layers, replace(layers[0], name="other")])


def test_a_colour_scale_does_not_blow_up_small_differences() -> None:
    values = Grid.of([replace(layer, cost=layer.dense_cost // 2) for layer in make_layers()]).values(lambda x: x.kept)
    assert span(values) == pytest.approx((0.475, 0.525))
    assert span(values * 2) == pytest.approx((0.95, 1.0))
    assert span(values * 0) == pytest.approx((0.0, 0.05))


def test_quality_has_standard_errors_and_what_was_read() -> None:
    text = shown(quality(make_summary()))
    assert row(text, "test") == ["test", "62.2", "±0.8", "62.4", "±0.8", "+0.4", "%", "0.00302", "±0.00008"]
    assert "test: 64 windows of 512 tokens, 32,704 predicted, float32, text 11111111" in text


def test_quality_of_a_run_that_was_not_measured() -> None:
    assert "not measured" in shown(quality(make_summary(dense=(), compressed=())))


def shown_search(search: Search, predicted: float = 0.0009) -> str:
    """The table, one line per row, blanks squeezed."""
    return "\n".join(
        " ".join(line.split()) for line in shown(searched(make_summary(predicted=predicted), search)).splitlines()
    )


def test_a_search_says_what_it_spent_asked_and_found() -> None:
    evaluations = (
        Evaluation(1000, 0.004, 64, True, 0.001),
        Evaluation(1100, 0.001, 8, False, 0.002),
        Evaluation(2100, 0.003, 64, True, 0.0009),
        Evaluation(3100, 0.0035, 64, True, 0.00095),
    )
    search = make_search(evaluations=evaluations, tokens=3100, limit=5000, loss=0.003)
    text = shown_search(search)
    assert "tokens 3,100 spent of 5,000" in text
    assert "candidates made of anchors" in text
    assert "measured 3 on the whole selection text, 1 on parts of it" in text
    assert "first 0.00400 nats per token, after 1,000 tokens" in text
    assert "best 0.00300 nats per token, -25.0 %, after 2,100 tokens" in text
    assert "chosen the best" in text
    assert "too few distinct whole evaluations to judge it: 3, least 10" in text
    assert "top 1024 tokens, 0.42 % of the probability outside, counted as one" in text


def test_a_choice_that_is_not_the_best_has_its_own_figures() -> None:
    search = make_search()
    text = shown_search(replace(search, loss=0.0021), 0.0012)
    assert f"chosen 0.00210 nats per token, -13.6 %, after {search.tokens:,} tokens" in text
    first = next(e for e in search.evaluations if e.whole)
    assert "chosen the first" in shown_search(replace(search, loss=first.loss), first.predicted)


def test_a_surrogate_is_not_judged_by_nine_evaluations() -> None:
    text = shown_search(make_search(8, 20))
    assert "too few distinct whole evaluations to judge it: 9, least 10" in text
    assert "Spearman" not in text


def test_a_constant_surrogate_has_no_rank_correlation() -> None:
    evaluations = tuple(Evaluation(n, 0.001 * n, 64, True, 0.001) for n in range(1, 11))
    text = shown_search(make_search(evaluations=evaluations, loss=0.001), 0.001)
    assert "no correlation: one side is constant in 10 distinct whole" in text


def test_a_surrogate_is_judged_by_ten_evaluations() -> None:
    evaluations = tuple(Evaluation(n, 0.02 * n**2, 64, True, 0.1 * n) for n in range(1, 11))
    text = shown_search(make_search(evaluations=evaluations, loss=0.02), 0.1)
    assert "rank correlation 1.00 (Spearman) in 10 distinct whole evaluations" in text
    assert "log measured = 2.00 log predicted + 0.69" in text
    assert "among allocations that the search picked, no sample of all" in text


def test_only_a_run_that_searched_reports_a_search() -> None:
    for summary, there in ((make_summary(), False), (make_searched(make_search(400, 6000)), True)):
        console = Console(file=StringIO(), width=80, color_system=None)
        render(summary, console)
        assert isinstance(console.file, StringIO)
        text = console.file.getvalue()
        assert ("Search on the true loss" in text) is there
        assert max(map(len, text.splitlines())) <= 80


def test_stages_sum_times_and_take_the_largest_peak() -> None:
    text = shown(stages(make_summary()))
    assert row(text, "refine") == ["refine", "1", "min", "22", "s", "52", "%", "1.07", "GiB"]
    assert row(text, "all") == ["all", "2", "min", "39", "s", "1.5", "GiB"]


def test_layers_show_shape_pattern_and_status() -> None:
    summary = make_summary(pattern="2:4")
    assert row(shown(layer_allocation(summary)), "0")[:6] == ["0", "q_proj", "256x256", "6", "32.8k", "2:4"]
    assert "N:M" not in shown(layer_allocation(make_summary()))
    text = shown(layer_results(summary))
    assert "names under model.layers." in text
    assert row(text, "3.mlp.down_proj")[4:6] == ["fallback", "0.1"]


def test_a_layer_that_fell_back_is_red_and_advised() -> None:
    console = Console(file=StringIO(), width=80, force_terminal=True, color_system="standard", no_color=False)
    console.print(layer_results(make_summary()))
    assert isinstance(console.file, StringIO)
    assert "\x1b[31mfallback" in console.file.getvalue()
    text = " ".join(shown(notes(make_summary())).split())
    assert f"fallback: model.layers.3.mlp.down_proj. {Status.FALLBACK.advice}" in text
    assert "The model was stored in bfloat16" in text


def test_a_clean_run_has_no_notes() -> None:
    layers = tuple(replace(layer, status="converged") for layer in make_layers())
    assert notes(make_summary(layers=layers, notes=())) is None


def test_provenance_shortens_hashes_and_lists() -> None:
    text = shown(provenance(make_summary()))
    assert "sha256 33333333, windows 64, 64 starts" in text
    assert "None" not in text


@pytest.mark.parametrize("blocks", [1, 8, 80])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_the_whole_report_fits_80_columns(blocks: int, pattern: str | None) -> None:
    console = Console(file=StringIO(), width=80, color_system=None)
    render(make_summary(blocks, pattern), console, verbose=True)
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    # Nothing was cut to fit.
    assert "…" not in text
    for title in ("Budget", "Quality", "Allocation by kind", "Allocation by block", "Kept fraction", "Stages"):
        assert title in text


def test_only_a_verbose_report_lists_the_layers() -> None:
    console = Console(file=StringIO(), width=80)
    render(make_summary(), console)
    assert isinstance(console.file, StringIO)
    assert "Layers:" not in console.file.getvalue()


def test_an_ascii_terminal_gets_the_same_numbers() -> None:
    file = TextIOWrapper(BytesIO(), encoding="ascii")
    console = Console(file=file, width=80)
    render(make_searched(make_search(), error_unit=ErrorUnit.OUTPUT_ERROR), console, verbose=True)
    file.flush()
    text = file.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "62.4 +-0.8" in text


def test_markup_in_names_is_printed_as_it_is() -> None:
    summary = make_summary(model="org/[bold]model[/bold]", notes=("[red]a[/red]",), command="globalopt search [x]")
    console = Console(file=StringIO(), width=80)
    render(summary, console)
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert "org/[bold]model[/bold]" in text
    assert "[red]a[/red]" in text
    assert "search [x]" in text


def test_a_model_without_finite_perplexity_is_still_reported() -> None:
    broken = make_metrics("test", 1e9, 5.0)
    broken = replace(broken, perplexity=float("inf"), nll=float("inf"), nll_stderr=float("nan"))
    text = shown(quality(make_summary(dense=(make_metrics("test", 62.0, None),), compressed=(broken,))))
    assert "inf" in row(text, "test")


def test_embeddings_that_a_budget_counts_are_not_among_what_it_does_not_cover():
    skipped = {"embeddings": 100 * 64 + 32 * 64, "lm_head": 100 * 64, "norms and biases": 640}
    counted = (Embedding("embed", 100, 64, bits=8), Embedding("lm_head", 100, 64, bits=8))
    facts = dict(budget_facts(make_summary(skipped=skipped, embeddings=counted)))
    assert facts["not covered"] == "embeddings 2,048; norms and biases 640"
