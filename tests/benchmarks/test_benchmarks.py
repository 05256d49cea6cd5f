"""The benchmark scripts, end to end on a tiny model; and the llama2.c tokenizer against the loop it stands for."""

from __future__ import annotations

import importlib
import json
import random
import struct
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer

from allocators import Knapsack
from globalopt.analysis.corrections import ROUNDS
from globalopt.errors import UsageError
from globalopt.pipeline import analyse, compress, plan, search, session
from globalopt.pipeline.options import SearchOptions
from globalopt.pipeline.plan import resolve
from tests.shortened import unabridged
from tests.surfaces import problem
from tests.tiny_models import save_tiny

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
SIZES = ["--nsamples", "4", "--seqlen", "16", "--eval-windows", "3"]


@pytest.fixture(autouse=True)
def scripts_importable(monkeypatch):
    # Scripts find each other beside themselves.
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch):
    """Probe solutions of a few steps: how good they are is of no matter here."""
    probe = plan.probe_solver
    monkeypatch.setattr(plan, "probe_solver", lambda solver, steps=0: probe(solver, 4))


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    """A tiny model and a text for it, as options."""
    folder = tmp_path_factory.mktemp("tiny")
    draw = random.Random(0)
    text = folder / "text.txt"
    text.write_text(" ".join(draw.choice(["one", "red", "fox", "ran", "to", "a", "den."]) for _ in range(400)))
    return ["--model", str(save_tiny(folder / "model")), "--calibration", str(text), *SIZES]


def never(*args, **kwargs):
    raise AssertionError("a finished cell was computed again")


def test_allocation_measures_every_cell_and_reads_finished_ones_back(tiny, tmp_path, monkeypatch, capsys):
    allocation = script("allocation")
    out = tmp_path / "out"
    command = ["--out", str(out), *tiny, "--budgets", "0.5", "0.3", "--seeds", "0", "--solver", "oats"]
    command += ["--set", "steps=2", "--allocators", "knapsack@share:rank_share=0.2", "depth-ramp@5000", "knapsack"]
    assert allocation.main(command) == 0
    printed = capsys.readouterr().out
    assert "Allocation on validation, kept 0.5" in printed
    assert "Allocation on test, kept 0.3" in printed
    assert (out / "allocators.png").read_bytes().startswith(b"\x89PNG")

    result = json.loads((out / "allocation.json").read_text())
    uniform = ["uniform:rank_share=0", "uniform:rank_share=0.1"]
    labels = [*uniform, "knapsack@share:rank_share=0.2", "depth-ramp@5000", "knapsack"]
    cells = result["cells"]
    assert [(c["budget"], c["label"]) for c in cells] == [(b, label) for b in (0.5, 0.3) for label in labels]
    assert cells[0]["validation"]["kl"] < cells[5]["validation"]["kl"]
    for budget in (0.5, 0.3):
        found = {c["label"]: c for c in cells if c["budget"] == budget}
        best = min((found[label] for label in uniform), key=lambda c: c["validation"]["kl"])
        means = {m["allocator"]: m for m in result["means"] if m["budget"] == budget}
        for split in ("validation", "test"):
            assert best[split]["ratio"] == 1
            for label, cell in found.items():
                assert cell[split]["ratio"] == pytest.approx(cell[split]["kl"] / best[split]["kl"])
                assert means[label][split]["kl"] == pytest.approx(cell[split]["kl"])
                assert means[label][split]["kl_spread"] is None
        for cell in found.values():
            assert 0.99 * budget < cell["used"] / cell["total"] <= budget
            assert cell["selection_loss"] > 0
        # The share of all layers is one the free share may take, on the same surfaces.
        assert found["knapsack"]["predicted"] <= found[labels[2]]["predicted"]
        assert found["knapsack"]["gap"] < 0.1
        assert found["uniform:rank_share=0"]["tokens"] == 4 * 16
        # A walk and a sweep over four windows, a sweep over as many for the metrics, and rounds on three more.
        assert found["knapsack"]["tokens"] == (4 * 4 + 5 * 4 + 4 * ROUNDS * 3) * 16
        # Nine ramps on all of the selection text.
        assert found["depth-ramp@5000"]["tokens"] == found["knapsack"]["tokens"] + 9 * 3 * 16
        # The analysis is shared; a search is not answered by what another cell has evaluated.
        ramp = out / "seed0" / f"{budget:g}" / "depth-ramp-5000" / "work"
        assert {path.name for path in ramp.iterdir()} <= {"objective", "allocation", "refinement", "model-matching"}
        assert len(list((ramp / "objective").glob("*/journal.log"))) == 1
    assert len(list((out / "globalopt-cache" / "predictions").iterdir())) == 1
    assert len({cell["analysis_seconds"] for cell in cells}) == 1
    assert cells[0]["analysis_seconds"] > 0

    monkeypatch.setattr(search, "finish", never)
    monkeypatch.setattr(analyse, "write_spans", never)
    monkeypatch.setattr(search, "BlockRunner", never)
    assert allocation.main(command) == 0
    assert json.loads((out / "allocation.json").read_text()) == result
    assert allocation.main([*command, "--seqlen", "12"]) == 1
    assert "holds another run" in capsys.readouterr().err.replace("\n", " ")


def test_a_cell_is_what_search_finds_by_itself(tiny, tmp_path):
    allocation, cells = script("allocation"), script("cells")
    command = ["--out", str(tmp_path / "out"), *tiny, "--budgets", "0.4", "--seeds", "1", "--allocators", "depth-ramp"]
    assert allocation.main([*command, "--tokens", "9000", "--set", "steps=2"]) == 0
    # The last of three cells: it would be compressed twice, were the model not dense again after the first.
    *_, cell = json.loads((tmp_path / "out" / "allocation.json").read_text())["cells"]
    assert cell["label"] == "depth-ramp@9000"
    options = cells.option_parser("").parse_args([*tiny, "--out", "unused"])
    asked = SearchOptions(budget=0.4, allocator="depth-ramp", solver_options={"steps": "2"}, seed=1, search_tokens=9000)
    alone = tmp_path / "alone"
    summary, _ = search.search(cells.set_up(options, 1), cells.reporter(), resolve(asked), alone, "alone")
    assert cell["validation"]["kl"] == pytest.approx(summary.compressed[0].kl, rel=1e-6)
    assert summary.search is not None
    assert cell["selection_loss"] == pytest.approx(summary.search.loss)


def test_contenders_are_read_as_they_are_written():
    contender = script("allocator_contenders").Contender
    for text in ("knapsack", "knapsack:exact=false,gap=0.1", "depth-ramp@500", "knapsack@share:rank_share=0.2"):
        assert contender.parse(text).label == text
    assert [found.limit for found in contender.parse("depth-ramp").at([10, 20])] == [10, 20]
    assert [found.limit for found in contender.parse("depth-ramp@5").at([10, 20])] == [5]
    assert [found.limit for found in contender.parse("knapsack").at([10, 20])] == [None]
    with pytest.raises(UsageError, match="does not use the objective"):
        contender.parse("knapsack@5").at([10])
    for text in ("", "knapsack:", "knapsack:exact", "knapsack@", "knapsack@many"):
        with pytest.raises(ArgumentTypeError):
            contender.parse(text)


def test_contenders_are_measured_once_where_their_rank_share_changes_nothing():
    contenders = script("allocator_contenders")
    given = [contenders.Contender.parse(text) for text in script("allocation").UNIFORMS]
    given += [contenders.Contender.parse(text) for text in ("knapsack@share:rank_share=0.1", "knapsack")]
    for solver, pattern in (("wanda", "unstructured"), ("oats", "2:4")):
        assert [c.label for c in contenders.told_apart(given, solver, pattern)] == ["uniform", "knapsack"]
    assert contenders.told_apart(given, "oats", "unstructured") == given


def test_one_share_offers_every_layer_the_rank_shares_nearest_to_it():
    one_share = script("allocator_contenders").OneShare
    posed = problem(kept=0.4)
    best = Knapsack().allocate(posed)
    shares = {}
    for share in (0.0, 0.3, 1.0):
        found = one_share(share).allocate(posed)
        assert best.predicted <= found.predicted * (1 + 1e-6)
        shares[share] = fmean(found.targets[spec.name].rank_share(spec) for spec in posed.specs)
    assert shares[0.0] == 0 < shares[0.3] < shares[1.0]


def test_a_bad_option_is_refused_before_the_model_is_loaded(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(session, "set_up", never)
    command = ["--out", str(tmp_path / "out"), *tiny]
    assert script("allocation").main([*command, "--budgets", "0.5", "1.5"]) == 2
    assert "1.5" in capsys.readouterr().err
    assert script("allocation").main([*command, "--allocators", "knapsack:exct=true"]) == 2
    assert "exact" in capsys.readouterr().err


def test_spans_measures_every_scaling_and_basis(tiny, tmp_path, monkeypatch, capsys):
    spans = script("spans")
    out = tmp_path / "out"
    command = ["--out", str(out), *tiny, "--budgets", "0.4", "--seeds", "0", "--set", "steps=2"]
    command += ["--span-scaling", "activation", "direct", "--predict-from", "anchors", "span"]
    assert spans.main(command) == 0
    assert "Spans, on test" in capsys.readouterr().out
    result = json.loads((out / "spans.json").read_text())
    kinds = [("activation", "anchors"), ("activation", "span"), ("direct", "anchors"), ("direct", "span")]
    first, *others = result["cells"]
    assert [(c["scaling"], c["predict_from"]) for c in result["cells"]] == kinds
    assert first["fitted_loss"] == pytest.approx(first["selection_loss"])
    for cell in others:
        # Anchor solutions, and with them candidates, are much the same with any span.
        if cell["predict_from"] == "span":
            assert cell["fitted_loss"] != pytest.approx(cell["selection_loss"])
        assert cell["validation"]["ratio"] == pytest.approx(cell["validation"]["kl"] / first["validation"]["kl"])

    monkeypatch.setattr(search, "finish", never)
    monkeypatch.setattr(search, "BlockRunner", never)
    assert spans.main(command) == 0
    assert json.loads((out / "spans.json").read_text()) == result


def test_metric_measures_every_metric_on_shared_predictions(tiny, tmp_path, monkeypatch, capsys):
    metric = script("metric")
    out = tmp_path / "out"
    command = ["--out", str(out), *tiny, "--budgets", "0.4", "--seeds", "0", "--set", "steps=2"]
    assert metric.main(command) == 0
    assert "Metric, on test" in capsys.readouterr().out
    cells = json.loads((out / "metric.json").read_text())["cells"]
    assert [cell["outputs"] for cell in cells] == ["none", "rows", "full"]
    assert cells[0]["validation"]["ratio"] == 1
    # What a layer keeps is predicted from its span, in whichever metric it is solved.
    assert len(list((out / "globalopt-cache" / "predictions").iterdir())) == 1
    assert len({cell["layer_error"] for cell in cells}) > 1

    monkeypatch.setattr(search, "finish", never)
    assert metric.main(command) == 0
    assert json.loads((out / "metric.json").read_text())["cells"] == cells


def test_refine_climbs_its_ladder_and_reads_finished_cells_back(tiny, tmp_path, monkeypatch, capsys):
    refine = script("refine")
    out = tmp_path / "out"
    command = ["--out", str(out), *tiny, "--budgets", "0.5", "--seeds", "0", "--set", "steps=10"]
    command += ["--allocator", "knapsack", "--solvers", "wanda"]
    assert refine.main(command) == 0
    printed = capsys.readouterr().out
    assert "Refinement, on validation" in printed
    assert "Refinement, on test" in printed
    cells = json.loads((out / "refine.json").read_text())["cells"]
    labels = ["published", "published+tm", "solver", "allocation", "matching", "model", "wanda", "wanda+matching"]
    assert [cell["rung"] for cell in cells] == labels
    assert all(0 < cell["used"] <= cell["total"] // 2 for cell in cells)
    # Uniform rungs share a budget file, searched ones another.
    folders = [out / "seed0" / "0.5" / label.replace("+", "-") for label in labels]
    budgets = [(folder / "budget.json").read_bytes() for folder in folders]
    assert len(set(budgets[:3])) == len(set(budgets[3:6])) == 1
    assert budgets[0] != budgets[3]
    assert budgets[6] == budgets[7] == budgets[0]
    # The model rung goes on from the layers and blocks of the one below.
    below, above = (folder / "matched" / "block.0.safetensors" for folder in folders[4:6])
    assert below.read_bytes() == above.read_bytes()
    for cell in cells:
        found = cell["splits"]["validation"]
        assert cell["splits"]["validation"]["gap"] == pytest.approx(found["perplexity"] - found["dense_perplexity"])

    monkeypatch.setattr(search, "allocate", never)
    monkeypatch.setattr(compress, "finish", never)
    assert refine.main(command) == 0
    assert capsys.readouterr().out == printed


def test_local_optimality_counts_the_swaps_of_a_finished_search(tiny, tmp_path, monkeypatch, capsys):
    cells = tmp_path / "cells"
    command = ["--out", str(cells), *tiny, "--budgets", "0.4", "--seeds", "0", "--allocators", "knapsack"]
    assert script("allocation").main([*command, "--set", "steps=2"]) == 0
    runs = [str(cells / "seed0" / "0.4" / name) for name in ("uniform-rank_share=0", "knapsack")]
    optimality = script("local_optimality")
    out = tmp_path / "out"
    command = [*runs, "--out", str(out), "--swaps", "6"]
    with monkeypatch.context() as patched:
        # The analysis is found in the cache of the benchmark.
        patched.setattr(analyse, "write_spans", never)
        assert optimality.main(command) == 0
    assert "Swaps that still improve" in capsys.readouterr().out
    result = json.loads((out / "local_optimality.json").read_text())
    measured = json.loads((cells / "allocation.json").read_text())["cells"]
    of = {c["label"]: c["selection_loss"] for c in measured}
    for cell, label in zip(result["cells"], ("uniform:rank_share=0", "knapsack"), strict=True):
        assert cell["tried"] == 6
        assert cell["improving"] / 6 <= cell["bound"] <= 1
        assert cell["loss"] == pytest.approx(of[label])

    monkeypatch.setattr(session, "set_up", never)
    assert optimality.main(command) == 0
    assert json.loads((out / "local_optimality.json").read_text()) == result
    assert optimality.main([str(cells / "seed0" / "analysis"), "--out", str(out)]) == 1
    assert "no finished search" in capsys.readouterr().err


def test_an_embedding_and_a_head_are_rounded_alone_and_together(tiny, tmp_path, capsys):
    options = dict(zip(tiny[::2], tiny[1::2], strict=True))
    command = ["--out", str(tmp_path), "--model", options["--model"], "--text", options["--calibration"]]
    assert script("untied_embeddings").main([*command, "--windows", "2", "--seqlen", "16"]) == 0
    assert "An embedding and a head in few bits" in capsys.readouterr().out
    found = json.loads((tmp_path / "untied_embeddings.json").read_text())["cells"]
    assert [(pair["embedding"], pair["head"]) for pair in found] == [(8, 8), (8, 6), (6, 8), (6, 6)]
    assert found[0]["together"] < found[-1]["together"]
    assert all(0.3 < pair["together"] / pair["apart"] < 3 for pair in found)
    assert script("untied_embeddings").main([*command, "--windows", "200", "--seqlen", "16"]) == 2
    assert "need 3200" in capsys.readouterr().err


def test_estimators_are_compared_on_the_same_samples(tiny, tmp_path, monkeypatch, capsys):
    estimators = script("estimators")
    out = tmp_path / "out"
    command = ["--out", str(out), *tiny, "--budget", "0.4", "--seeds", "0", "--updates", "6", "--samples", "4"]
    assert estimators.main([*command, "--pilot", "1"]) == 0
    assert "Noise of a gradient at the start" in capsys.readouterr().out
    found = json.loads((out / "estimators.json").read_text())
    assert len(found["cells"]) == 8
    assert len({cell["tokens"] for cell in found["cells"]}) == 1
    for cell in found["cells"]:
        assert cell["variance"] > 0
        if cell["baseline"] == "moving-average" and not cell["control_variate"]:
            assert cell["relative"] == 1
    monkeypatch.setattr(search, "BlockRunner", never)
    assert estimators.main([*command, "--pilot", "1"]) == 0
    assert json.loads((out / "estimators.json").read_text()) == found


def test_the_spread_of_an_estimator_is_that_of_its_updates():
    estimators = script("estimators")
    Baseline = estimators.Baseline
    draw = torch.Generator().manual_seed(0)
    mean, fisher = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.5, 1.0, 2.0])
    noisy = {
        kind: mean + scale * torch.randn(4000, 3, generator=draw)
        for kind, scale in {
            (Baseline.MOVING_AVERAGE, False): 2.0,
            (Baseline.MOVING_AVERAGE, True): 1.5,
            (Baseline.LEAVE_ONE_OUT, False): 1.0,
            (Baseline.LEAVE_ONE_OUT, True): 0.5,
        }.items()
    }
    found = estimators.spreads(noisy, fisher)
    best = found[estimators.Estimator(Baseline.LEAVE_ONE_OUT, True, False)]
    assert best.variance == pytest.approx(3 * 0.25, rel=0.1)
    assert best.relative == pytest.approx(1 / 16, rel=0.1)
    assert best.noise == pytest.approx(3 * 0.25 / 5, rel=0.1)
    natural = found[estimators.Estimator(Baseline.LEAVE_ONE_OUT, True, True)]
    assert natural.variance == pytest.approx((1 / 0.5 + 1 + 1 / 2) * 0.25, rel=0.1)
    assert natural.noise == pytest.approx(natural.variance / (1 / 0.5 + 4 / 2), rel=0.1)


def test_transfer_refines_every_budget_with_every_solver(tiny, tmp_path, monkeypatch, capsys):
    transfer = script("transfer")
    out = tmp_path / "out"
    common = [*tiny, "--budget", "0.4", "--seeds", "0", "--solvers", "wanda", "--made-for", "oats"]
    command = ["--out", str(out), *common, "--allocators", "uniform", "knapsack", "--disturbed", "2"]
    assert transfer.main(command) == 0
    printed = capsys.readouterr().out
    for title in ("KL on test", "Ratio on validation", "Gain kept on test", "Spearman: of KL with that under oats"):
        assert title in printed
    result = json.loads((out / "transfer.json").read_text())
    labels = ["uniform", "knapsack", "disturbed:number=0", "disturbed:number=1"]
    rows = [(c["solver"], c["budget"]) for c in result["cells"]]
    assert rows == [(solver, label) for solver in ("wanda", "oats") for label in labels]
    kl = {(c["solver"], c["budget"]): c["test"]["kl"] for c in result["cells"]}
    assert len(set(kl.values())) == len(kl)
    for mean in result["means"]["test"]:
        ratio, own = (kl[s, mean["budget"]] / kl[s, "uniform"] for s in (mean["solver"], "oats"))
        assert mean["ratio"] == pytest.approx(ratio)
        kept = None if own >= 1 else pytest.approx((1 - ratio) / (1 - own))
        assert mean["gain_kept"] == kept
    # Of fewer than ten budgets there is no rank correlation.
    assert set(result["spearman"]["test"].values()) == {None}

    with monkeypatch.context() as patched:
        patched.setattr(search, "finish", never)
        patched.setattr(compress, "finish", never)
        assert transfer.main(command) == 0
    assert json.loads((out / "transfer.json").read_text()) == result

    # A file that was made, given: the same figures, beside uniform.
    file = out / "seed0" / "oats" / "knapsack" / "budget.json"
    given = [str(file), "--out", str(tmp_path / "given"), *common, "--allocators", "uniform"]
    assert transfer.main(given) == 0
    again = json.loads((tmp_path / "given" / "transfer.json").read_text())["cells"]
    found = {(c["solver"], c["budget"]): c["test"]["kl"] for c in again}
    for solver in ("wanda", "oats"):
        assert found[solver, "uniform"] == pytest.approx(kl[solver, "uniform"])
        assert found[solver, "file:knapsack"] == pytest.approx(kl[solver, "knapsack"])

    # A file of another size is refused before anything is computed.
    monkeypatch.setattr(analyse, "analyse", never)
    other = [str(file), "--out", str(tmp_path / "other"), *tiny, "--budget", "0.5", "--seeds", "0"]
    assert transfer.main([*other, "--allocators", "uniform"]) == 2
    assert "--budget 0.4" in capsys.readouterr().err


def test_transfer_refuses_a_solver_that_cannot_meet_a_pattern(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(session, "set_up", never)
    command = ["--out", str(tmp_path), *tiny, "--pattern", "2:4", "--budget", "0.7", "--solvers", "oats", "wanda"]
    assert script("transfer").main([*command, "--allocators", "knapsack"]) == 2
    assert "wanda has no low-rank part" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- llama2.c


def vocabulary() -> list[tuple[str, float]]:
    """A small llama2.c vocabulary: specials, bytes, entries learned in the order of their scores, characters."""
    learned = [" t", "he", " the", "an", " a", "and", " and", "re", "ed", "in", "ing", " th", "the", "there", "\u00e9e"]
    characters = [*" abcdefghijklmnopqrstuvwxyzT.,", "\u00e9", "\u20ac"]
    special = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0)]
    pieces = [(text, float(-rank)) for rank, text in enumerate([*learned, *characters])]
    return [*special, *((f"<0x{byte:02X}>", 0.0) for byte in range(256)), *pieces]


def write_vocabulary(path: Path, entries: Sequence[tuple[str, float]]) -> Path:
    data = struct.pack("<i", max(len(text.encode()) for text, _ in entries))
    for text, score in entries:
        data += struct.pack("<fi", score, len(text.encode())) + text.encode()
    path.write_bytes(data)
    return path


def encode_slowly(entries: Sequence[tuple[str, float]], text: str) -> list[int]:
    """llama2.c's loop: merge the neighbours that make the entry with the best score, the leftmost first."""
    ids = {entry: index for index, (entry, _) in enumerate(entries)}
    tokens = [ids[" "]] if text else []
    for character in text:
        tokens += [ids[character]] if character in ids else [byte + 3 for byte in character.encode()]
    while True:
        best, at, merged = -1e10, -1, -1
        for i in range(len(tokens) - 1):
            found = ids.get(entries[tokens[i]][0] + entries[tokens[i + 1]][0])
            if found is not None and entries[found][1] > best:
                best, at, merged = entries[found][1], i, found
        if at < 0:
            return [1, *tokens]
        tokens[at : at + 2] = [merged]


TEXTS = [
    "",
    " ",
    "the end and the there, inthere",
    "  two  spaces before, and after  ",
    "Tim ran.\n\nThe end\n",
    "caf\u00e9 and th\u00e9\u00e9e for 5 \u20ac \u65e5\u672c \U0001f642",
    "<s> is text, and so are </s>, <unk> and <0x0A>",
]


def test_the_tokenizer_encodes_as_llama2c_and_decodes_back(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    write_vocabulary(tmp_path / "model" / "tokenizer.bin", vocabulary())
    assert script("llama2c_tokenizer").main([str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    assert not (tmp_path / "model" / "tokenizer.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, len(vocabulary()))
    draw = random.Random(0)
    drawn = ["".join(draw.choice("theand ring\u00e9\u00fc\n") for _ in range(60)) for _ in range(200)]
    longest = 0
    for text in [*TEXTS, *drawn]:
        ids = tokenizer(text)["input_ids"]
        assert ids == encode_slowly(vocabulary(), text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        longest = max([longest, *(len(vocabulary()[index][0]) for index in ids if index >= 259)])
    assert longest == len("there")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([("he", -99.0)], "lists 'he' twice"),
        ([("on", -1.0)], "share the score"),
        ([("aa", -50.0), ("aaa", -51.0)], "overlapping"),
    ],
)
def test_a_vocabulary_whose_order_bpe_cannot_keep_is_refused(tmp_path, extra, message):
    tokenizer = script("llama2c_tokenizer")
    path = write_vocabulary(tmp_path / "tokenizer.bin", [*vocabulary(), *extra])
    with pytest.raises(ValueError, match=message):
        tokenizer.convert(tokenizer.read_vocabulary(path))


def test_a_file_that_is_no_vocabulary_is_refused(tmp_path):
    read = script("llama2c_tokenizer").read_vocabulary
    path = write_vocabulary(tmp_path / "tokenizer.bin", vocabulary())
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="broken: entry"):
        read(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="cut short"):
        read(path)
    write_vocabulary(path, vocabulary()[1:])
    with pytest.raises(ValueError, match=r"no llama2\.c vocabulary"):
        read(path)


def test_prices_are_held_against_the_model_with_one_layer_replaced(tiny, tmp_path, monkeypatch, capsys):
    prices = script("prices")
    out = tmp_path / "prices"
    command = ["--out", str(out), *tiny, "--blocks", "1", "--kept", "0.4", "--shares", "0", "0.2", "--windows", "2"]
    command += ["--set", "preset=fast"]
    assert prices.main(command) == 0
    found = json.loads((out / "prices.json").read_text())["points"]
    assert [(point["layer"].split(".")[2], point["share"]) for point in found] == [("1", 0.0), ("1", 0.2)] * 7
    assert all(point["price"] > 0 and point["fit"] > 0 and point["candidate"] > 0 for point in found)
    shown = capsys.readouterr().out
    assert "rank share 0.2" in shown
    assert "all                 14" in shown
    monkeypatch.setattr(prices, "points", never)
    assert prices.main(command) == 0
    assert prices.main(["--out", str(out), *tiny, "--blocks", "9"]) == 2


def test_the_mean_of_prices_is_of_logarithms():
    prices = script("prices")
    made = [prices.Point("a", "q_proj", 0.2, 0.0, 1.0, fit, 1.0) for fit in (0.5, 2.0)]
    assert prices.mean(made, "fit") == "1.00 ±0.69"
    assert prices.mean(made, "candidate") == "1.00 ±0.00"
    assert prices.mean([], "fit") == "-"


def test_the_picture_of_allocators_names_what_is_far_above_and_draws_the_rest_apart():
    drawing = script("allocators_figure")
    points = [
        drawing.Point(
            0.3, f"m{i}", 1e5 * (1 + i % 3), (0.01 + 0.001 * i, 0.012 + 0.001 * i), (64.0, 64.5), 1 + 0.01 * i
        )
        for i in range(17)
    ]
    far = drawing.Point(0.3, "far", 1e5, (4.0, 4.6), (90.0, 91.0), 180.0)
    figure = drawing.allocators_figure([*points, far], "reference", "allocators")
    kl, perplexity = figure.axes
    assert [text.get_text() for text in kl.texts] == ["4.30 →"]
    assert max(kl.get_xlim()) < 0.1
    assert max(perplexity.get_xlim()) < 70
    names = [label.get_text() for label in kl.get_yticklabels()]
    assert names == [f"m{i}  {100 * (1 + i % 3)}k" for i in range(17)] + ["far  100k"]
    assert len(kl.containers) == len(points)


@pytest.mark.parametrize("count", [3, 6, 12])
def test_no_two_labels_of_the_picture_of_allocators_overlap(count):
    drawing = script("allocators_figure")
    points = [
        drawing.Point(kept, f"allocator:option={i}", 1e5, (scale * (1 + i), scale * (2 + i)), (64.0 + i, 65.0 + i), 1.0)
        for kept, scale in ((0.5, 0.001), (0.3, 0.01), (0.2, 0.1))
        for i in range(count)
    ]
    limits = [drawing.Point(0.5, "allocator:option=0", tokens, (0.002,), (64.0,), 0.9) for tokens in (2e5, 3e5)]
    with unabridged():
        figure = drawing.allocators_figure([*points, *limits], "reference", "allocators")
        figure.draw_without_rendering()
    assert len(figure.axes) == 6
    assert len(figure.axes[0].get_yticks()) == count + 2
    for axes in figure.axes:
        for axis, ends in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
            ticks = [tick for tick in axis.get_major_ticks() if ends[0] <= tick.get_loc() <= ends[1]]
            boxes = [tick.label1.get_window_extent() for tick in ticks if tick.label1.get_visible()]
            assert len(boxes) in ({count + 2, 0} if axis is axes.yaxis else range(1, 20))
            assert not any(one.overlaps(other) for n, one in enumerate(boxes) for other in boxes[:n])


def test_the_picture_of_allocators_has_the_figures_of_the_table(tmp_path):
    drawing = script("table_figure")
    found = drawing.points((drawing.DOCS / "results.md").read_text(encoding="utf-8"))
    # One of the sixteen contenders has one budget, and every other one has three.
    assert len(found) == 15 * 3 + 1
    assert len({point.method for point in found}) == 16
    by_name = {(point.method, point.budget): point for point in found}
    assert by_name["knapsack", 0.3].kl == (0.0111,)
    assert by_name["knapsack, one rank share for all: 0.1", 0.2].kl == (0.0444,)
    assert by_name["optuna", 0.5].tokens == pytest.approx(370_000)
    drawing.main([str(tmp_path / "drawn.png")])
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_means_alone_has_no_bars_and_no_perplexity():
    drawing = script("allocators_figure")
    points = [drawing.Point(0.5, name, 0, (kl,), (), kl) for name, kl in (("uniform", 1.0), ("knapsack", 0.3))]
    figure = drawing.allocators_figure(points, "reference", "allocators", "")
    (kl,) = figure.axes
    assert [label.get_text() for label in kl.get_yticklabels()] == ["knapsack", "uniform"]
    assert drawing.BARS not in figure.get_supxlabel()
