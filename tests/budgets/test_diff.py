from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from globalopt.budgets import diff
from globalopt.values.budget import Target
from globalopt.values.layer import LayerSpec
from reports.shaded_grid import change_grid
from tests.budgets.made_up import half, make, write
from tests.command import done, refused, run

FAILED, USAGE = 1, 2


def moved(spec: LayerSpec) -> Target:
    """`half`, but block 0's v_proj gives rank 1 for 12 nonzeros and block 2's q_proj loses 40."""
    target = half(spec)
    if (spec.block, spec.kind) == (0, "v_proj"):
        return replace(target, rank=1, nnz=target.nnz + 12)
    return replace(target, nnz=target.nnz - 40) if (spec.block, spec.kind) == (2, "q_proj") else target


@pytest.fixture
def two(tmp_path):
    return write(tmp_path / "half.json", make(half)), write(tmp_path / "moved.json", make(moved))


def test_the_moves_are_counted_by_layer_kind_and_depth(two):
    found = json.loads(done("budget", "diff", *two, "--json").stdout)
    changed = {layer["name"]: layer for layer in found["layers"] if layer["cost"][0] != layer["cost"][1]}
    assert set(changed) == {"model.layers.0.self_attn.v_proj", "model.layers.2.self_attn.q_proj"}
    assert changed["model.layers.0.self_attn.v_proj"]["rank"] == [2, 1]
    assert (found["given"], found["taken"]) == (0, 24 - 12 + 40)
    assert found["whole"]["change"] == -(24 - 12 + 40)
    assert {kind: move["changed"] for kind, move in found["by_kind"].items()} == {
        "q_proj": 1,
        "v_proj": 1,
        "down_proj": 0,
    }
    assert {blocks: move["change"] for blocks, move in found["by_depth"].items()} == {"0": -12, "1": 0, "2": -40}


def test_the_tables_fit_the_terminal_and_say_what_moved(two):
    shown = done("budget", "diff", *two).stdout
    assert "2 of 9 layers differ: 0 keep more" in shown
    assert max(len(line) for line in shown.splitlines() if ".json" not in line) <= 80
    row = next(line for line in shown.splitlines() if line.startswith("2.self_attn.q_proj"))
    assert row.split()[:3] == ["2.self_attn.q_proj", "-40", "0.500"]
    assert "these are all" in shown
    assert "1 more layers changed" in done("budget", "diff", *two, "--moves", 1).stdout
    assert "Largest moves" not in done("budget", "diff", *two, "--moves", 0).stdout


def test_two_equal_budgets_say_so(two):
    shown = done("budget", "diff", two[0], two[0]).stdout
    assert "Nothing moved: both give all 9 layers the same." in shown
    assert "By kind" not in shown


def test_budgets_in_different_units_are_compared_in_parameters(two, tmp_path):
    other = write(tmp_path / "bytes.json", make(half, accounting="bytes"))
    shown = done("budget", "diff", two[0], other).stdout
    assert "before counts params, after bytes: compared in parameters" in shown
    assert "Nothing moved" in shown
    assert json.loads(done("budget", "diff", other, other, "--json").stdout)["accounting"] == "bytes"


def test_budgets_of_different_models_are_refused(two, tmp_path):
    larger = write(tmp_path / "larger.json", make(half, blocks=4))
    assert "9 layers and 12; they differ first at model.layers.3" in refused(FAILED, "budget", "diff", two[0], larger)
    other = write(tmp_path / "other.json", make(half, fingerprint="e" * 64))
    assert "other type or vocabulary" in refused(FAILED, "budget", "diff", two[0], other)
    assert "There is no file" in refused(FAILED, "budget", "diff", two[0], tmp_path / "none.json")
    assert run("budget", "diff", *two, "--moves", -1).exit_code == USAGE


def test_depth_is_cut_into_even_ranges():
    blocks = 19
    file = make(half, blocks=blocks)
    ranges = diff.diff(file, file, (Path("a"), Path("b"))).by_depth()
    assert len(ranges) == diff.RANGES
    assert next(iter(ranges)) == "0-1"
    assert sum(move.layers for move in ranges.values()) == 3 * blocks
    assert {move.layers // 3 for move in ranges.values()} == {2, 3}


def test_gains_and_losses_have_different_colours():
    file = make(moved).plans
    gained = [replace(plan, cost=plan.cost + 40) if plan.kind == "q_proj" else plan for plan in file]
    lost = [replace(plan, cost=plan.cost - 40) if plan.kind == "v_proj" else plan for plan in gained]
    console = Console(file=StringIO(), width=80, force_terminal=True, color_system="truecolor", no_color=False)
    console.print(change_grid(file, lost))
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert "48;2;178;24;43m -0.312 " in text
    assert " +0.156 " in text
    assert "48;2;247;247;247m    0" in text
