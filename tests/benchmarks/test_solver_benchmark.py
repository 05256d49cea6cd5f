"""The benchmark of layer solvers, end to end on tiny layers; and the transcriptions it times, against our solvers."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from globalopt.protocols import Needs, Solver
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution, follows
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Metric
from solvers import SOLVERS, get_solver
from solvers.oats import OATS, ScaledState
from tests.reference import alps, hassle_free, oats, sparsegpt, three_basil
from tests.reference.low_rank import randomized
from tests.synthetic import layer, metric

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
MODULES = ("cells", "contenders", "equal_bits", "finished_cells", "from_tests", "layer_problems", "layer_solvers")
SHAPES = {"first": (40, 48), "second": (24, 32)}
PUBLIC_ERROR, PUBLIC_GEMMS = 0.04, 500.0


@pytest.fixture(autouse=True)
def scripts_importable(monkeypatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in (*MODULES, "target_path"):
        sys.modules.pop(name, None)


def script(name: str = "layer_solvers") -> ModuleType:
    return importlib.import_module(name)


def write_problems(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Two layers in a folder; by name their W and G."""
    made = {name: layer(*shape, tokens=200, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    layers = {name: (W, gram.matrix) for name, (W, gram) in made.items()}
    folder.mkdir(exist_ok=True)
    parts = {f"{name}/{part}": tensor for name, pair in layers.items() for part, tensor in zip("WG", pair, strict=True)}
    save_file(parts, folder / "layer_problems.safetensors")
    return layers


def error(W: Tensor, G: Tensor, value: Tensor) -> float:
    """`tr(E G Eᵀ)` in float64."""
    E = W.double() - value.double()
    return float(torch.trace(E @ G.double() @ E.mT))


def public_record(W: Tensor, G: Tensor, **changes: Any) -> dict[str, Any]:
    """A record at "u50r", documented as the public numbers are, with an error and a time to compare with."""
    d_out, d_in = W.shape
    record = {
        "m": d_out,
        "n": d_in,
        "rank": int(0.15 * d_out * d_in / (d_out + d_in)),
        "nm": [0, 0],
        "sparsity": 0.65,
        "energy": error(W, G, torch.zeros_like(W)),
        "gemm_s": 1e-4,
        "oats80": {"rel_error": PUBLIC_ERROR, "nnz": 1, "seconds": 1.0, "gemms": PUBLIC_GEMMS},
    }
    return {**record, **changes}


@pytest.fixture
def problems(tmp_path) -> Path:
    """The folder of both layers, with planted public numbers: both at u50r, one of them at 24r."""
    folder = tmp_path / "problems"
    layers = write_problems(folder)
    records = {f"{name}/u50r": public_record(W, G) for name, (W, G) in layers.items()}
    records["first/24r"] = public_record(*layers["first"], rank=2, nm=[2, 4], sparsity=0.0)
    (folder / "public_code.json").write_text(json.dumps(records))
    return folder


def command(problems: Path, out: Path, *more: str) -> list[str]:
    return ["--problems", str(problems), "--out", str(out), "--repeats", "1", *more]


def never(*args, **kwargs):
    raise AssertionError("a finished cell was computed again")


def test_ratios_to_planted_numbers_and_to_the_twin(problems, tmp_path, capsys):
    out = tmp_path / "out"
    field = ["--solvers", "oats:steps=3", "wanda", "--twins", "oats", "--detail"]
    assert script().main(command(problems, out, *field)) == 0
    printed = capsys.readouterr()
    for part in ("Against the public code's numbers", "Against the transcription", "first, 40 x 48, at 24r"):
        assert part in printed.out
    assert "a: 2 problems, first, second" in printed.out
    assert "b: 1 problem, first" in printed.out
    assert printed.err.splitlines()[-1].startswith("18/18  second 24r twin oats  error ")

    result = json.loads((out / "solvers.json").read_text())
    cells = {(c["problem"], c["setting"], c["contender"]): c for c in result["cells"]}
    assert len(cells) == 18
    rows = {(r["setting"], r["contender"]): r for r in result["against_public"]}
    assert set(rows) == {(s, c) for s in ("u50r", "24r", "all") for c in ("oats:steps=3", "twin oats")}
    for contender in ("oats:steps=3", "twin oats"):
        first, second = (cells[name, "u50r", contender] for name in ("first", "second"))
        row = rows["u50r", contender]
        assert (row["against"], row["problems"]) == ("oats80", ["first", "second"])
        errors = [c["rel_error"] / PUBLIC_ERROR for c in (first, second)]
        times = [c["gemms"] / PUBLIC_GEMMS for c in (first, second)]
        assert row["error_mean"] == pytest.approx(math.sqrt(errors[0] * errors[1]))
        assert row["error_worst"] == pytest.approx(max(errors))
        assert row["time_mean"] == pytest.approx(math.sqrt(times[0] * times[1]))
        assert row["time_worst"] == pytest.approx(max(times))
        assert first["gemms"] == pytest.approx(first["seconds"] / first["gemm_s"])
        assert rows["24r", contender]["problems"] == ["first"]
        assert len(rows["all", contender]["of"]) == 3

    (row,) = (r for r in result["against_twin"] if r["setting"] == "u60r")
    assert (row["contender"], row["against"]) == ("oats:steps=3", "twin oats")
    pairs = [(cells[n, "u60r", "oats:steps=3"], cells[n, "u60r", "twin oats"]) for n in SHAPES]
    assert row["error_worst"] == pytest.approx(max(a["rel_error"] / b["rel_error"] for a, b in pairs))
    assert row["time_worst"] == pytest.approx(max(a["seconds"] / b["seconds"] for a, b in pairs))


def test_cells_are_undamped_relative_errors_at_the_documented_targets(problems, tmp_path):
    out = tmp_path / "out"
    assert script().main(command(problems, out, "--solvers", "oats", "sparsegpt")) == 0
    cells = {
        (c["problem"], c["setting"], c["contender"]): c for c in json.loads((out / "solvers.json").read_text())["cells"]
    }
    W, gram = layer(40, 48, tokens=200, seed=0)
    pattern = NM(2, 4)
    targets = {
        ("u50r", "oats"): Target(3, 672),
        ("u60r", "oats"): Target(2, 538),
        ("24r", "oats"): Target(2, 960, pattern),
        # Without low rank, its parameters are nonzeros; a rank on top of a pattern is left out.
        ("u50r", "sparsegpt"): Target(0, 672 + 3 * 88),
        ("u60r", "sparsegpt"): Target(0, 538 + 2 * 88),
        ("24r", "sparsegpt"): Target(0, 960, pattern),
    }
    for (setting, name), target in targets.items():
        solver = get_solver(name)
        value = solver.solve(solver.prepare(W, Metric(gram)), target).value
        cell = cells["first", setting, name]
        energy = error(W, gram.matrix, torch.zeros_like(W))
        assert cell["rel_error"] == pytest.approx(error(W, gram.matrix, value.dense()) / energy, rel=1e-4)
        assert (cell["nnz"], cell["rank"]) == (value.nnz, target.rank)
        assert 0 < cell["prepare_s"] < cell["seconds"]


def test_finished_cells_are_read_back_and_only_new_ones_computed(problems, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    asked = command(problems, out, "--solvers", "magnitude", "--settings", "u50r")
    assert script().main(asked) == 0
    first = (out / "solvers.json").read_bytes()
    printed = capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(script(), "measure", never)
        assert script().main(asked) == 0
    assert (out / "solvers.json").read_bytes() == first
    assert capsys.readouterr().out == printed

    measured = []
    real = script().measure

    def counting(problem, target, contender, repeats):
        measured.append((problem.name, contender.label, repeats))
        return real(problem, target, contender, repeats)

    monkeypatch.setattr(script(), "measure", counting)
    assert script().main([*asked, "--solvers", "magnitude", "oats:steps=2"]) == 0
    assert measured == [("first", "oats:steps=2", 1), ("second", "oats:steps=2", 1)]
    # Another weight is another problem; other repeats or threads are another measurement.
    W, gram = layer(24, 32, tokens=200, seed=9)
    tensors = {"second/W": W, "second/G": gram.matrix}
    save_file(tensors, problems / "layer_problems.safetensors")
    (problems / "public_code.json").unlink()
    measured.clear()
    assert script().main(asked) == 0
    assert script().main([*asked, "--repeats", "2"]) == 0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert script().main(asked) == 0
    assert measured == [("second", "magnitude", repeats) for repeats in (1, 2, 1)]


def test_the_median_repetition_counts():
    contenders, layer_problems = script("contenders"), script("layer_problems")
    problem = layer_problems.synthetic_problem(16, 24, torch.device("cpu"))

    class Slow:
        label, method, low_rank, signs = "slow", "slow", True, False
        seconds = iter([0.0, 5.0, 1.0, 3.0])  # the first is the warm-up

        def fit(self, problem, target):
            return contenders.Fit(0.5 * problem.weight.double(), 7, 1, next(self.seconds))

    outcome = contenders.measure(problem, Target(1, 7), Slow(), 3)
    assert outcome.seconds == 3.0
    assert outcome.gemms == 3.0 / outcome.gemm_s
    assert outcome.rel_error == pytest.approx(0.25)


@dataclass(frozen=True)
class Preparer(OATS):
    """OATS that prepares for long."""

    def prepare(self, weight: Tensor, metric: Metric) -> Any:
        time.sleep(0.05)
        return super().prepare(weight, metric)


def test_preparation_is_part_of_the_time():
    contenders, layer_problems = script("contenders"), script("layer_problems")
    problem = layer_problems.synthetic_problem(16, 24, torch.device("cpu"))
    fit = contenders.Ours("slow", "slow", Preparer(steps=1)).fit(problem, Target(1, 7))
    assert 0.05 <= fit.prepare_s < fit.seconds


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--solvers", "3basel"], "did you mean '3basil'"),
        (["--solvers", "oats:stps=3"], "did you mean 'steps'"),
        (["--solvers", "oats:steps"], "NAME:KEY=VALUE"),
        (["--solvers", "oats", "oats"], "named twice"),
        (["--twins", "oat"], "did you mean 'oats'"),
        (["--only", "frist"], "Known: first, second"),
        (["--repeats", "0"], "--repeats"),
        (["--path", "--solvers", "oats", "wanda"], "wanda cannot meet"),
        (["--bits", "17", "--solvers", "oats"], "got 17"),
        (["--bits", "0.9", "--solvers", "oats"], "no nonzero"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(problems, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.setattr(script(), "measure", never)
    assert script().main([*command(problems, tmp_path / "out"), *more]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_no_problem_is_refused(tmp_path, capsys):
    assert script().main(["--out", str(tmp_path)]) == 2
    assert "--synthetic" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script().main(["--out", str(tmp_path), "--synthetic", "64"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 4}, "another rank or sparsity"),
        ({"sparsity": 0.6}, "another rank or sparsity"),
        ({"energy": 1.0}, "not the same layer"),
        ({"oats80": {"nnz": 3}}, "not as documented"),
        ({"energy": None}, "not as documented"),
    ],
)
def test_public_numbers_of_something_else_are_refused(problems, tmp_path, capsys, changes, message):
    records = json.loads((problems / "public_code.json").read_text())
    records["first/u50r"].update(changes)
    (problems / "public_code.json").write_text(json.dumps(records))
    assert script().main(command(problems, tmp_path / "out")) == 1
    assert message in capsys.readouterr().err


def test_a_broken_cell_is_refused(problems, tmp_path, capsys):
    out = tmp_path / "out"
    asked = command(problems, out, "--solvers", "wanda", "--settings", "u50r", "--only", "first")
    assert script().main(asked) == 0
    (cell,) = (out / "cells").iterdir()
    record = json.loads(cell.read_text())
    del record["outcome"]["gemm_s"]
    cell.write_text(json.dumps(record))
    capsys.readouterr()
    assert script().main(asked) == 1
    assert "Delete it and run again" in capsys.readouterr().err


@dataclass(frozen=True)
class Walker(OATS):
    """OATS that walks a path, with less work on every target after the first."""

    name: ClassVar[str] = "walker"

    def solve_path(self, state: ScaledState, targets: Sequence[Target]) -> list[Solution]:
        return [OATS(steps=1 if i else self.steps).solve(state, target) for i, target in enumerate(targets)]


def test_a_path_is_timed_against_cold_solves(problems, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SOLVERS, "walker", Walker)
    out = tmp_path / "out"
    asked = command(problems, out, "--path", "--solvers", "walker:steps=30")
    assert script().main(asked) == 0
    printed = capsys.readouterr()
    # How long it took is the machine's affair.
    assert re.match(r"1/2  first  path walker:steps=30  a further target -?\d+\.\d+ of cold\n", printed.err)
    assert "cost of a" in printed.out
    cells = json.loads((out / "paths.json").read_text())["cells"]
    assert [(c["problem"], c["contender"]) for c in cells] == [(name, "walker:steps=30") for name in SHAPES]
    for cell in cells:
        assert cell["kept"] == [0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3]
        assert cell["extra"] == pytest.approx((cell["path_s"] - cell["cold_s"][0]) / sum(cell["cold_s"][1:]))
        assert cell["path_errors"][0] == cell["cold_errors"][0]
        assert len(cell["error_ratios"]) == 6
        assert min(cell["error_ratios"]) > 1
    monkeypatch.setattr(script("target_path"), "measure_path", never)
    assert script().main(asked) == 0


@dataclass(frozen=True)
class Plane(Solver[tuple[Tensor, Metric]]):
    """A sign plane without fitting: the largest weights kept, the rest its mean magnitude times its signs."""

    name: ClassVar[str] = "slab"
    needs: ClassVar[Needs] = Needs.NOTHING
    patterns: ClassVar[bool] = False
    signs: ClassVar[bool] = True

    def prepare(self, weight: Tensor, metric: Metric) -> tuple[Tensor, Metric]:
        return weight, metric

    def solve(self, state: tuple[Tensor, Metric], target: Target, start: Decomposition | None = None) -> Solution:
        assert target.signs
        W, norm = state
        S = torch.zeros_like(W).flatten()
        kept = W.flatten().abs().topk(target.nnz).indices
        S[kept] = W.flatten()[kept]
        S = S.view_as(W)
        rest = (W - S).abs().mean()
        U, V = rest * torch.ones(W.shape[0], 1), torch.ones(1, W.shape[1])
        value = Decomposition(S, U, V, torch.where(W - S < 0, -1.0, 1.0))
        return Solution(value, norm.error(W - value.dense()))


def test_equal_bits(problems, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SOLVERS, "slab", Plane)
    out = tmp_path / "out"
    solvers = ["--solvers", "slab", "oats:steps=3"]
    assert script().main(command(problems, out, *solvers)) == 2
    assert "give it --bits" in capsys.readouterr().err
    assert script().main(command(problems, out, *solvers, "--bits", "9", "4.5")) == 0
    printed = capsys.readouterr().out
    assert "Relative error at equal bits per weight" in printed
    assert "geometric mean" in printed
    cells = json.loads((out / "bits.json").read_text())["cells"]
    assert len(cells) == 8
    for cell in cells:
        d_out, d_in = SHAPES[cell["problem"]]
        assert cell["used"] <= cell["bits"]
        plane = 1 if cell["contender"] == "slab" else 0
        values = cell["rank"] * (d_out + d_in) + cell["nnz"]
        # 16 bits a value, a bitmap, and the plane: one value more would not fit.
        assert cell["used"] == pytest.approx(16 * values / (d_out * d_in) + 1 + plane)
        assert 16 * (values + 1) / (d_out * d_in) + 1 + plane > cell["bits"]
        if plane:
            assert cell["rank"] == 1
        else:
            assert cell["rank"] == int(0.3 * cell["bits"] * d_out * d_in / 16 / (d_out + d_in))
    (cell,) = (c for c in cells if (c["problem"], c["bits"], c["contender"]) == ("second", 9, "slab"))
    W, gram = layer(24, 32, tokens=200, seed=1)
    expected = Plane().solve(Plane().prepare(W, Metric(gram)), Target(1, cell["nnz"], signs=True))
    energy = error(W, gram.matrix, torch.zeros_like(W))
    assert cell["rel_error"] == pytest.approx(expected.error / energy, rel=1e-4)


def test_targets_of_a_large_layer():
    settings = script("layer_problems").SETTINGS
    spec = LayerSpec("llama", 0, "", "", 4096, 4096)
    assert settings["u50r"](spec) == Target(307, round(0.35 * 2**24))
    assert settings["u60r"](spec) == Target(245, round(0.28 * 2**24))
    assert settings["24r"](spec) == Target(245, 2**23, NM(2, 4))


# --------------------------------------------------------------------------------------------- transcriptions


NNZ = 48 * 20  # of 48 x 64
PATTERN = NM(2, 4)


def sum_of(parts: tuple[Tensor, Tensor]) -> Tensor:
    S, L = parts
    return S + L


@pytest.mark.parametrize("pattern", [None, PATTERN], ids=["unstructured", "2:4"])
@pytest.mark.parametrize("name", ["3basil", "hassle-free", "hassle-free-alps", "oats"])
def test_twins_fit_the_target_and_float32_changes_little(name, pattern):
    twins = script("contenders").TWINS
    W, norm = metric(48, 64, 400)
    G = norm.inputs.matrix
    nnz = NNZ if pattern is None else W.numel() // 2
    torch.manual_seed(0)
    S, L = twins[name](W, G, Target(4, nnz, pattern))
    assert S.dtype == L.dtype == torch.float32
    assert nnz - 1 <= int(torch.count_nonzero(S)) <= nnz  # SparseGPT's threshold prunes one weight too many
    assert pattern is None or follows(S, pattern)
    assert int(torch.linalg.matrix_rank(L)) == 4
    exact = {
        "3basil": lambda: three_basil.fit(W, G, 4, nnz, pattern),
        "hassle-free": lambda: hassle_free.fit(W, G, 4, nnz, pattern),
        "hassle-free-alps": lambda: hassle_free.fit(W, G, 4, nnz, pattern, sparse_step="alps", rounds=10),
        "oats": lambda: oats.fit(W, G, 4, 20, pattern=pattern),
    }[name]()
    # A layer as small as this is chaotic: rounding moves the support.
    assert error(W, G, S + L) == pytest.approx(error(W, G, sum_of(exact)), rel=0.15)


@pytest.mark.parametrize("pattern", [None, PATTERN], ids=["unstructured", "2:4"])
def test_our_solvers_reach_their_twins(pattern):
    W, norm = metric(48, 64, 400)
    G = norm.inputs.matrix
    target = Target(4, NNZ if pattern is None else W.numel() // 2, pattern)

    def ours(name: str, **options: str) -> float:
        solver = get_solver(name, options)
        return solver.solve(solver.prepare(W, norm), target).error

    arguments = W, G, 4, target.nnz, pattern

    assert ours("3basil") <= 1.03 * error(W, G, sum_of(three_basil.fit(*arguments)))
    assert ours("hassle-free", layer_wide="false") <= 1.03 * error(W, G, sum_of(hassle_free.fit(*arguments)))
    assert ours("oats") <= 1.05 * error(W, G, sum_of(oats.fit(W, G, 4, 20, pattern=pattern)))


def test_the_published_sweep_is_the_sweep_that_inverts_anew():
    W, norm = metric(12, 16, 400)
    H = norm.inputs.damped(0.01).matrix.double()
    R = sparsegpt.inverse_factor(H)
    torch.testing.assert_close(R.mT @ R, torch.linalg.inv(H))
    by_group = sparsegpt.sweep(W.double(), R, 0, PATTERN, column_block=8)
    torch.testing.assert_close(by_group, sparsegpt.prune(W, H, 0, PATTERN))
    # One weight fewer per column block: the threshold itself is pruned.
    by_block = sparsegpt.sweep(W.double(), R, 96, column_block=8)
    torch.testing.assert_close(by_block, sparsegpt.prune(W, H, 94, column_block=8))


def test_alps_is_least_squares_on_its_support_and_better_than_one_sweep():
    W, norm = metric(12, 16, 400)
    G = norm.inputs.matrix
    H = norm.inputs.damped(0.01).matrix.double()
    S = alps.fit(W, G, 96)
    assert int(torch.count_nonzero(S)) == 96
    assert error(W, H, S) < error(W, H, sparsegpt.fit(W, G, 96))
    for row, kept in zip(W.double(), S, strict=True):
        J = kept.nonzero().flatten()
        torch.testing.assert_close(kept[J], torch.linalg.solve(H[J][:, J], H[J] @ row), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("sparse_step", "gain"), [("sparsegpt", 0.75), ("alps", 0.9)])
def test_rounds_of_hassle_free_build_on_each_other(sparse_step, gain):
    W, norm = metric(48, 64, 400)
    G = norm.inputs.matrix
    once, often = (sum_of(hassle_free.fit(W, G, 4, NNZ, sparse_step=sparse_step, rounds=n)) for n in (1, 10))
    assert error(W, G, often) < gain * error(W, G, once)


def test_the_random_sketch_is_near_the_leading_triples():
    W, _ = layer(48, 64, 400)
    U, s, Vh = randomized(W, 4)
    assert (U.shape, s.shape, Vh.shape) == ((48, 4), (4,), (4, 64))
    best = torch.linalg.svdvals(W)[4:].square().sum()
    assert best <= (W - U * s @ Vh).square().sum() <= 1.1 * best
