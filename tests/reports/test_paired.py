from __future__ import annotations

import math
from dataclasses import replace
from io import StringIO
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import ttest_1samp

from globalopt.values.metrics import Metrics, WindowLosses
from globalopt.values.results import Summary
from reports.comparison import comparison, difference_table, differences_to_first
from reports.paired import Measured, difference
from tests.reports.factory import make_metrics, make_summary

N = 40


def run(label: str, worse: float, kept: bool = True, **changed: Any) -> Measured:
    """A run whose windows lose `worse` more, each by a little noise, than windows that differ a lot."""
    hard = np.random.default_rng(0).normal(2.0, 0.5, N)
    noise = np.random.default_rng(sum(map(ord, label))).normal(0.0, 0.01, (2, N))
    kl = 0.3 * hard + worse + noise[0]
    nll = hard + worse + noise[1]
    figures = {
        "nll": float(nll.mean()),
        "perplexity": math.exp(nll.mean()),
        "nll_stderr": float(nll.std(ddof=1) / math.sqrt(N)),
        "kl": float(kl.mean()),
        "kl_stderr": float(kl.std(ddof=1) / math.sqrt(N)),
        "windows": N,
    }
    compressed = replace(make_metrics("test", 1.0, 1.0), **figures)  # type: ignore[arg-type]
    summary = make_summary(dense=(make_metrics("test", 7.0, None),), compressed=(compressed,), **changed)
    losses = WindowLosses("test", compressed.text_sha256, tuple(nll), tuple(hard), tuple(kl))
    return Measured(label, summary, (losses,) if kept else ())


def test_paired_intervals_are_those_of_the_differences():
    a, b = run("a", 0.0), run("b", 0.02)
    found = difference(b, a, "test")
    d = np.array(b.losses[0].kl) - np.array(a.losses[0].kl)
    low, high = ttest_1samp(d, 0.0).confidence_interval(0.95)
    assert found.paired
    assert found.kl is not None
    assert (found.kl.value, found.kl.low, found.kl.high) == pytest.approx((d.mean(), low, high))
    d = np.array(b.losses[0].nll) - np.array(a.losses[0].nll)
    low, high = ttest_1samp(d, 0.0).confidence_interval(0.95)
    assert found.perplexity is not None
    expected = math.exp(d.mean()) - 1, math.exp(low) - 1, math.exp(high) - 1
    assert (found.perplexity.value, found.perplexity.low, found.perplexity.high) == pytest.approx(expected)
    assert found.kl.excludes_zero
    again = difference(a, b, "test")
    assert again.kl is not None
    assert (again.kl.value, again.kl.high) == pytest.approx((-found.kl.value, -found.kl.low))


def test_windows_that_were_not_kept_make_the_interval_wide():
    a, b = run("a", 0.0), run("b", 0.02)
    paired, loose = difference(b, a, "test"), difference(replace(b, losses=()), a, "test")
    assert not loose.paired
    assert paired.kl is not None
    assert loose.kl is not None
    assert loose.kl.value == pytest.approx(paired.kl.value)
    assert loose.kl.high - loose.kl.low > 3 * (paired.kl.high - paired.kl.low)
    assert not loose.kl.excludes_zero


@pytest.mark.parametrize("changed", [{"text_sha256": "0" * 64}, {"kl": (0.1,)}, {"nll": (math.nan,) * N}])
def test_windows_of_another_evaluation_are_not_used(changed):
    a, b = run("a", 0.0), run("b", 0.02)
    stale = replace(b, losses=(replace(b.losses[0], **changed),))
    assert not difference(stale, a, "test").paired


def altered(measured: Measured, **changed: object) -> Measured:
    compressed = tuple(replace(m, **changed) for m in measured.summary.compressed)  # type: ignore[arg-type]
    return replace(measured, summary=replace(measured.summary, compressed=compressed))


def dense(measured: Measured, metrics: Metrics) -> Measured:
    return replace(measured, summary=replace(measured.summary, dense=(metrics,)))


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (altered(run("b", 0.0), text_sha256="0" * 64), "text differs: 111111111111 (a); 000000000000 (b)"),
        (altered(run("b", 0.0), seqlen=9), "window length differs: 512 (a); 9 (b)"),
        (altered(run("b", 0.0), windows=1), "a single window has no spread"),
        (altered(run("b", 0.0), split="validation"), "not measured on test: b"),
        (run("b", 0.0, accounting="bytes"), "accounting differs: params (a); bytes (b)"),
        (run("b", 0.0, layers=make_summary(blocks=2).layers), "model differs in names or shapes of layers"),
        (dense(run("b", 0.0), make_metrics("test", 8.0, None)), "dense perplexity differs: 7 (a); 8 (b)"),
    ],
)
def test_what_does_not_compare_has_a_reason_and_no_difference(other, says):
    found = difference(other, run("a", 0.0), "test")
    assert says in "; ".join(found.reasons)
    assert (found.kl, found.perplexity) == (None, None)
    text = shown([run("a", 0.0), other])
    assert f"b: not compared, {found.reasons[0]}"[:60] in text


def shown(runs: list[Measured]) -> str:
    console = Console(file=StringIO(), width=80, color_system=None)
    summaries: list[Summary] = [one.summary for one in runs]
    console.print(comparison(summaries, [one.label for one in runs], losses=[one.losses for one in runs]))
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    return text.partition("Against a")[2]


def test_the_table_says_better_worse_and_undecided():
    text = shown([run("a", 0.0), run("b", 0.02), run("c", -0.02), run("d", 0.0)])
    verdicts = {line.split()[0]: line.split()[-1] for line in text.splitlines() if line[:2] in ("b ", "c ", "d ")}
    assert verdicts == {"b": "worse", "c": "better", "d": "undecided"}
    assert "paired" not in text
    assert "not paired by windows, so too wide: b" in shown([run("a", 0.0), run("b", 0.02, kept=False)])


def test_a_perplexity_beyond_all_floats_is_left_out():
    found = difference(altered(run("b", 0.0, kept=False), nll=1000.0), run("a", 0.0), "test")
    assert found.perplexity is None
    assert found.kl is not None


def test_one_run_alone_is_held_against_nothing():
    assert differences_to_first([make_summary()], ["a"]) == []
    assert difference_table([]) is None


def test_equal_runs_differ_by_exactly_nothing():
    a = run("a", 0.0)
    found = difference(replace(a, label="b"), a, "test")
    assert found.kl is not None
    assert (found.kl.low, found.kl.value, found.kl.high) == (0.0, 0.0, 0.0)
    assert "undecided" in shown([a, replace(a, label="b")])
