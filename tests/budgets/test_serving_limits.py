"""Serving profiles: what is refused, what is chosen, and that it can be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from globalopt.analysis.grid import Options
from globalopt.budgets import budget_file
from globalopt.budgets.serving_limits import PROFILES, check_solver, limits_of
from globalopt.errors import ArtefactError, BudgetError, UnknownNameError, UsageError
from globalopt.export.factors import read_factors
from globalopt.export.packed import load_packed
from globalopt.export.quantizer import packed_layers
from globalopt.pipeline.options import SearchOptions
from globalopt.pipeline.plan import resolve
from globalopt.runs.folder import Run
from globalopt.values.budget import NO_LIMITS, Budget, Limits, Target
from globalopt.values.decomposition import follows
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.problem import Problem
from solvers import SOLVERS, get_solver
from tests.command import WINDOWS, done, read, refused
from tests.surfaces import problem
from tests.tiny_models import tiny_ids, tiny_tokenizer

SPEC = LayerSpec("layer.0", 0, "layer.0", "kind", 96, 192)
QUICK = ("--predict-from", "span", "--sensitivity", "none", "--match", "none", *WINDOWS)


def test_limits():
    limits = Limits(8, 20)
    assert [limits.floor(rank) for rank in (0, 7, 8, 15, 16, 100)] == [0, 0, 8, 8, 16, 16]
    assert limits.check(Target(16, 5), SPEC) == Target(16, 5)
    for rank in (4, 24):
        with pytest.raises(UsageError, match=f"layer.0: rank {rank} is no multiple of 8, at most 20"):
            limits.check(Target(rank, 5), SPEC)
    factors = Limits(sparse=False)
    for target in (Target(3, 0), Target.zero(), Target.dense(SPEC)):
        assert factors.check(target, SPEC) == target
    with pytest.raises(UsageError, match="5 nonzeros; it is to be served as factors alone"):
        factors.check(Target(3, 5), SPEC)
    for wrong in ({"rank_multiple": 0}, {"max_rank": -1}):
        with pytest.raises(UsageError, match=r"at least|1 or more"):
            Limits(**wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("pattern", "limits"),
    [
        (None, Limits(8)),
        (None, Limits(4, 8)),
        (NM(2, 4), Limits(8)),
        (NM(2, 4), Limits(4, 8)),
        (None, Limits(sparse=False)),
        (None, Limits(5, 20, sparse=False)),
    ],
)
def test_every_option_is_within_the_limits(pattern, limits):
    options = Options.of(SPEC, 96, pattern, limits)
    for target in options.targets:
        limits.check(target.check(SPEC), SPEC)
        assert target.params(SPEC) <= SPEC.numel
    assert max(target.rank for target in options.targets) > 0
    assert len(set(options.targets)) == len(options.targets)
    if pattern is None:
        assert {Target.dense(SPEC), Target.zero()} <= set(options.targets)
        assert options.factors != limits.sparse
    kept = [anchor.params(SPEC) for row in options.anchors for anchor in row]
    assert kept
    assert max(kept) <= SPEC.numel


def test_no_limits_are_no_limits():
    assert Options.of(SPEC, 96, None, NO_LIMITS) == Options.of(SPEC, 96)
    assert Options.of(SPEC, 96, NM(2, 4), Limits(1, 10**6)) == Options.of(SPEC, 96, NM(2, 4))


def test_a_problem_refuses_options_and_answers_outside_of_its_limits():
    p = problem(0.5, limits=Limits(2))
    with pytest.raises(UsageError, match="no multiple of 3"):
        Problem(p.surfaces, p.budget, limits=Limits(3))
    with pytest.raises(UsageError, match="rank 1 is no multiple of 2"):
        p.finish({spec.name: Target(1, 0) for spec in p.specs}, by="test")


def test_profiles_and_solvers():
    assert limits_of("adapter", None) == Limits(8, 512)
    assert limits_of("adapter", 16) == Limits(16, 512)
    assert limits_of("dense", None) == limits_of("two-four", None) == NO_LIMITS
    with pytest.raises(UnknownNameError, match="did you mean 'two-four'"):
        limits_of("two-for", None)
    able = {name: {profile for profile in PROFILES if _takes(profile, name)} for name in SOLVERS}
    assert able["3basil"] == able["oats"] == able["hassle-free"] == set(PROFILES)
    assert able["wanda"] == {"dense", "two-four"}
    assert able["svd"] == {"dense", "factors"}
    assert able["slab"] == {"dense", "two-four"}
    assert able["rtn"] == able["gptq"] == {"dense"}
    with pytest.raises(UsageError, match="needs a solver with a low-rank part; wanda has none"):
        check_solver("adapter", limits_of("adapter", None), get_solver("wanda"))
    with pytest.raises(UsageError, match="turns nonzeros into any rank"):
        check_solver("dense", Limits(2), get_solver("svd"))


def _takes(profile: str, solver: str) -> bool:
    try:
        check_solver(profile, limits_of(profile, None), get_solver(solver))
    except UsageError:
        return False
    return True


def test_options_that_contradict_a_profile_are_refused():
    for options, says in (
        ({"serving_profile": "two-four", "pattern": "1:4"}, "is of pattern 2:4 alone"),
        ({"serving_profile": "factors", "pattern": "2:4", "scaling": "direct"}, "keeps no sparse parts"),
        ({"serving_profile": "factors"}, "takes --span-scaling direct"),
        ({"rank_multiple": 0}, "multiples of 1 or more"),
        ({"max_rank": -1}, "largest rank must be at least 0; got -1"),
        ({"serving_profile": "adapter", "max_rank": 513}, "serves ranks up to 512; lower --max-rank, which is 513"),
        ({"serving_profile": "adapter", "max_rank": 7}, "needs some rank, of at least 8, and --max-rank 7 leaves none"),
    ):
        given: Any = options
        with pytest.raises(UsageError, match=says):
            SearchOptions(0.5, **given)


def test_what_cannot_be_is_refused_before_anything_is_computed():
    specs = (SPEC,)
    budget = Budget.fraction(0.4, specs)
    with pytest.raises(UsageError, match="No layer has room for rank 64"):
        resolve(SearchOptions(0.4, serving_profile="adapter", rank_multiple=64)).check_feasible(specs, budget)
    with pytest.raises(BudgetError, match=r"Raise --budget to at least 0\.5"):
        resolve(SearchOptions(0.4, serving_profile="two-four", pattern="2:4")).check_feasible(specs, budget)
    resolve(SearchOptions(0.4, serving_profile="factors", scaling="direct")).check_feasible(specs, budget)


# ------------------------------------------------------------------------------------------------- the whole way


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A Llama whose layers have room for ranks of 8."""
    folder = tmp_path_factory.mktemp("model") / "wide"
    sizes: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 128}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def search(model: Path, text: Path, out: Path, *options: object) -> budget_file.BudgetFile:
    done("search", model, "--calibration", text, *QUICK, *options, "--out", out, "-q")
    return budget_file.read(out / "budget.json")


# peft's, about something of transformers.
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapter(wide, tiny_text, tmp_path):
    import peft

    options = ("--serving-profile", "adapter", "--budget", 0.6, "--allocator", "uniform")
    options += ("--allocator-set", "rank_share=0.3", "--solver", "oats", "--set", "steps=3")
    file = search(wide, tiny_text, tmp_path / "run", *options)
    assert file.served == Limits(8, 512)
    assert file.used == file.limit
    done("export", tmp_path / "run", "--format", "adapter", "--out", tmp_path / "out", "-q")
    config = read(tmp_path / "out" / "adapter" / "adapter_config.json")
    assert {config["r"], *config["rank_pattern"].values()} == {8}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    served = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    saved: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    with torch.no_grad():
        torch.testing.assert_close(served(tiny_ids(1, 8)).logits, saved(tiny_ids(1, 8)).logits, rtol=1e-3, atol=1e-4)
    # The file keeps its promise with another solver, or is not refined.
    refine = ("compress", wide, "--budget-file", tmp_path / "run" / "budget.json", "--calibration", tiny_text)
    refine += ("--match", "none", "--sensitivity", "none", *WINDOWS, "--out", tmp_path / "other", "-q")
    assert "is no multiple of 8" in refused(2, *refine, "--solver", "svd")
    # An edited rank breaks it too.
    raw = read(tmp_path / "run" / "budget.json")
    raw["limits"]["rank_multiple"] = 16
    (tmp_path / "edited.json").write_text(json.dumps(raw))
    with pytest.raises(ArtefactError, match="rank 8 is no multiple of 16"):
        budget_file.read(tmp_path / "edited.json")


def test_two_four(wide, tiny_text, tmp_path):
    options = ("--serving-profile", "two-four", "--budget", 0.65, "--allocator", "knapsack")
    file = search(wide, tiny_text, tmp_path / "run", *options, "--solver", "oats", "--set", "steps=3")
    assert {entry.pattern for entry in file.layers} == {"2:4"}
    assert any(entry.rank for entry in file.layers)
    assert file.limits is None
    run = Run.open(tmp_path / "run")
    for entry in file.layers:
        assert follows(run.layer(entry.spec).S, NM(2, 4))
    done("export", tmp_path / "run", "--format", "packed", "--out", tmp_path / "out", "-q")
    forms = [layer.shape.sparse.form for _, layer in packed_layers(load_packed(tmp_path / "out"))]
    assert forms == ["2:4"] * len(file.layers)
    poor = ("--serving-profile", "two-four", "--budget", 0.4, "--out", tmp_path / "poor", "-q")
    said = refused(3, "search", wide, "--calibration", tiny_text, *QUICK, *poor)
    assert "Raise --budget to at least 0.5" in said


def test_factors(wide, tiny_text, tmp_path):
    options = ("--serving-profile", "factors", "--rank-multiple", 2, "--budget", 0.3, "--allocator", "knapsack")
    file = search(wide, tiny_text, tmp_path / "run", *options, "--solver", "svd")
    assert file.served == Limits(2, sparse=False)
    # What is left is less than the cheapest step of the layers that can grow.
    assert file.limit - file.used < 2 * 2 * (96 + 192)
    done("export", tmp_path / "run", "--format", "factors", "--out", tmp_path / "out", "-q")
    specs = {entry.name: entry for entry in file.layers}
    for name, value in read_factors(tmp_path / "out"):
        entry = specs[name]
        assert value.nnz in (0, entry.spec.numel)
        assert entry.rank % 2 == 0
        assert value.rank == entry.rank
    assert any(entry.rank for entry in file.layers)


@pytest.mark.parametrize(("allocator", "most"), [("knapsack", 0), ("uniform", 2)])
def test_no_rank_is_above_the_largest(wide, tiny_text, tmp_path, allocator, most):
    options = ("--budget", 0.5, "--max-rank", most, "--allocator", allocator, "--solver", "oats", "--set", "steps=2")
    file = search(wide, tiny_text, tmp_path / "run", *options)
    assert file.served == Limits(max_rank=most)
    # Without the limit a tenth of these layers is more than two ranks.
    assert max(entry.rank for entry in file.layers) == most
    assert file.limit - file.used < max(entry.spec.d_out + entry.spec.d_in for entry in file.layers)


def test_factors_are_priced_by_fits_and_by_the_model(tiny_llama, tiny_text, tmp_path):
    options = ("--serving-profile", "factors", "--budget", 0.5, "--allocator", "auto", "--search-tokens", 2000)
    options += ("--allocator-set", "rounds=1,designs=2", "--solver", "3basil", "--set", "steps=5")
    command = ("search", tiny_llama, "--calibration", tiny_text, "--match", "none", *WINDOWS, "--out", tmp_path / "run")
    done(*command, *options, "-q")
    summary = Run.open(tmp_path / "run").summary()
    assert summary.search is not None
    assert summary.search.candidates == "anchors"
    assert all(layer.nnz in (0, layer.d_out * layer.d_in) for layer in summary.layers)
    assert "different rank_multiple" in refused(1, *command, *options, "--rank-multiple", 2, "-q")


def test_a_family(wide, tiny_text, tmp_path):
    options = ("--budget", "0.3,0.5", "--serving-profile", "adapter", "--solver", "oats", "--search-tokens", 0)
    done("search", wide, "--calibration", tiny_text, *QUICK, *options, "--out", tmp_path / "run", "-q")
    for path in (tmp_path / "run" / "budgets").iterdir():
        file = budget_file.read(path)
        assert file.served == Limits(8, 512)
        assert all(entry.rank % 8 == 0 for entry in file.layers)
        assert file.used == file.limit


def test_contradictions_on_the_command_line(tiny_llama, tiny_text):
    command = ("search", tiny_llama, "--calibration", tiny_text, *QUICK, "-q")
    for options, says in (
        (("--pattern", "1:4", "--serving-profile", "two-four"), "is of pattern 2:4 alone"),
        (("--pattern", "unstructured", "--serving-profile", "two-four"), "is of pattern 2:4 alone"),
        (("--pattern", "2:4", "--serving-profile", "factors"), "keeps no sparse parts"),
        (("--span-scaling", "none", "--serving-profile", "factors"), "takes --span-scaling direct"),
        (("--serving-profile", "twofour"), "No serving profile 'twofour'; did you mean 'two-four'?"),
        (("--serving-profile", "adapter", "--solver", "wanda"), "needs a solver with a low-rank part"),
        (("--serving-profile", "adapter"), "No layer has room for rank 8"),
    ):
        assert says in refused(2, *command, *options)
