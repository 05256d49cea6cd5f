from __future__ import annotations

import json
import re
from typing import Any

import pytest

from globalopt.budgets import budget_file
from globalopt.values.budget import Target
from globalopt.values.layer import NM, LayerSpec
from tests.budgets.made_up import half, make, sparse, specs, write
from tests.command import done, read, refused

FAILED, USAGE = 1, 2


def two_of_four(spec: LayerSpec) -> Target:
    return Target(0, spec.numel // 2, NM(2, 4))


def one_of_four_with_rank(spec: LayerSpec) -> Target:
    return Target(1, spec.numel // 4, NM(1, 4))


def on_levels(spec: LayerSpec) -> Target:
    """Half of everything, one level of 8 weights less in the first block, one more in the last."""
    return Target(0, spec.numel // 2 + 8 * (spec.block - 1))


def levels(*more: object) -> tuple[object, ...]:
    return ("--level-sparsity", 0.5, "--level-step", 8, *more)


@pytest.mark.parametrize(
    ("name", "target", "options"),
    [
        ("csv", half, ()),
        ("csv", one_of_four_with_rank, ()),
        ("sparsities", sparse, ()),
        ("sparsities", two_of_four, ()),
        ("peft", one_of_four_with_rank, ()),
        ("evopress", on_levels, levels()),
    ],
)
@pytest.mark.parametrize("accounting", ["params", "bytes"])
def test_round_trips(tmp_path, name, target, options, accounting):
    file = make(target, accounting=accounting)
    first = write(tmp_path / "first.json", file)
    # Shapes, and what PEFT does not say, come from a budget with other ranks.
    other = make(lambda spec: Target(0, target(spec).nnz, target(spec).pattern), accounting=accounting)
    like = write(tmp_path / "like.json", other if name == "peft" else make(half, accounting=accounting))
    done("budget", "convert", first, "--to", name, "--out", tmp_path / "there", *options)
    done("budget", "convert", tmp_path / "there", "--from", name, "--like", like, "--out", tmp_path / "back", *options)
    back = budget_file.read(tmp_path / "back")
    assert back.allocation.targets == file.allocation.targets
    assert (back.used, back.limit, back.accounting) == (file.used, file.limit, accounting)
    assert back.asked == pytest.approx(file.asked)
    done("budget", "show", tmp_path / "back")
    done("budget", "diff", first, tmp_path / "back")


def test_the_same_targets_give_the_same_file(tmp_path):
    first = write(tmp_path / "first.json", make(half))
    done("budget", "convert", first, "--to", "csv", "--out", tmp_path / "table.csv")
    options = ("--from", "csv", "--like", first, "--out", tmp_path / "back.json")
    done("budget", "convert", tmp_path / "table.csv", *options)
    assert (tmp_path / "back.json").read_bytes() == first.read_bytes()


def test_an_imported_budget_is_refined_and_predicts_nothing(ranked_run, tiny_llama, tiny_text, tmp_path):
    options = ("--rank-as-nonzeros", "--to", "sparsities", "--out", tmp_path / "list.json")
    said = done("budget", "convert", ranked_run / "budget.json", *options).stderr
    written = read(tmp_path / "list.json")
    assert "kept as nonzeros of the same cost" in said
    # Any model of the shapes will do; here it is read by the model itself.
    options = ("--from", "sparsities", "--model", tiny_llama, "--out", tmp_path / "budget.json")
    done("budget", "convert", tmp_path / "list.json", *options)
    file = budget_file.read(tmp_path / "budget.json")
    assert file.fingerprint == budget_file.read(ranked_run / "budget.json").fingerprint
    assert [1 - entry.nnz / entry.spec.numel for entry in file.layers] == pytest.approx(written["sparsity"])
    assert "found by a search" in done("budget", "show", tmp_path / "budget.json").stdout
    run = ("--solver", "magnitude", "--calibration", tiny_text, "--nsamples", 8, "--seqlen", 16, "--eval-windows", 2)
    shown = done("compress", tiny_llama, "--budget-file", tmp_path / "budget.json", *run, "--out", tmp_path / "run")
    assert "found by a search" in shown.stdout
    assert read(tmp_path / "run" / "summary.json")["predicted"] is None
    done("report", tmp_path / "run", "-v")


def test_sparsities_are_the_arguments_of_the_modifier(tmp_path):
    path = write(tmp_path / "b.json", make(lambda spec: Target(0, spec.numel // 4, NM(1, 4))))
    done("budget", "convert", path, "--to", "sparsities", "--out", tmp_path / "list.json")
    value = read(tmp_path / "list.json")
    assert value["targets"] == [spec.name for spec in specs()]
    assert value["sparsity"] == [0.75] * 9
    # N:M of the modifier zeroes N of M.
    assert value["mask_structure"] == "3:4"


def test_peft_reads_its_config_as_it_was_meant(tmp_path):
    import peft
    from peft.utils import other

    def target(spec: LayerSpec) -> Target:
        return Target((spec.block + 1) * (spec.kind != "v_proj"), 4)

    path = write(tmp_path / "b.json", make(target, blocks=12))
    said = done("budget", "convert", path, "--to", "peft", "--out", tmp_path / "adapter_config.json").stderr
    assert done("budget", "convert", path, "--to", "peft", "-q", "--out", tmp_path / "again").stderr == said
    assert "note: the nonzeros of 36 layers are not in it: PEFT knows ranks only." in said
    config: Any = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert config.r == config.lora_alpha == 12
    for spec in specs(12):
        ranked = spec.name in config.target_modules
        assert ranked == bool(target(spec).rank)
        if ranked:
            key = other.get_pattern_key(config.rank_pattern.keys(), spec.name)
            assert config.rank_pattern[key] == config.alpha_pattern[key] == target(spec).rank


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ('{"layers.1.self_attn.q_proj": 3}', {"model.layers.1.self_attn.q_proj": 3}),
        ('{"r": 2, "target_modules": ["v_proj"]}', {f"model.layers.{b}.self_attn.v_proj": 2 for b in range(3)}),
        (
            '{"r": 2, "target_modules": "all-linear", '
            '"rank_pattern": {"q_proj": 1, ".*self_attn.*": 4, "down_proj": 0}}',
            {f"model.layers.{b}.self_attn.{k}": r for b in range(3) for k, r in (("q_proj", 1), ("v_proj", 4))},
        ),
        (
            '{"r": 1, "target_modules": "model.layers.[02].mlp.*"}',
            {f"model.layers.{b}.mlp.down_proj": 1 for b in (0, 2)},
        ),
    ],
)
def test_the_first_pattern_that_matches_wins(tmp_path, text, ranks):
    like = write(tmp_path / "like.json", make(sparse))
    (tmp_path / "config.json").write_text(text)
    options = ("--from", "peft", "--like", like, "--out", tmp_path / "b.json")
    said = done("budget", "convert", tmp_path / "config.json", *options).stderr
    assert "nonzeros are those of --like" in said
    targets = budget_file.read(tmp_path / "b.json").allocation.targets
    assert {name: target.rank for name, target in targets.items() if target.rank} == ranks
    assert {name: target.nnz for name, target in targets.items()} == {s.name: sparse(s).nnz for s in specs()}


def test_one_sparsity_per_block_or_for_all(tmp_path):
    like = write(tmp_path / "like.json", make(half))
    for content, expected, says in (
        ([0.25, 0.5, 0.75], {0: 0.75, 1: 0.5, 2: 0.25}, "per block"),
        (0.5, {0: 0.5, 1: 0.5, 2: 0.5}, "for all layers"),
    ):
        (tmp_path / "list.json").write_text(json.dumps(content))
        (tmp_path / "b.json").unlink(missing_ok=True)
        options = ("--from", "sparsities", "--like", like, "--out", tmp_path / "b.json")
        assert says in done("budget", "convert", tmp_path / "list.json", *options).stderr
        for entry in budget_file.read(tmp_path / "b.json").layers:
            assert (entry.rank, entry.nnz) == (0, expected[entry.block] * entry.spec.numel)


def test_levels_that_are_off_are_rounded_and_said(tmp_path):
    path = write(tmp_path / "b.json", make(lambda spec: Target(0, spec.numel // 2 + 3 * spec.block)))
    said = done(
        "budget", "convert", path, "--to", "evopress", "--level-step", 4, "--out", tmp_path / "levels.txt"
    ).stderr
    assert "6 layers do not lie on a level" in said
    found = re.search(r"--level-sparsity (\S+) --level-step 4 reads them back", said)
    assert found is not None
    options = ("--from", "evopress", "--level-sparsity", found[1], "--level-step", 4, "--like", path)
    done("budget", "convert", tmp_path / "levels.txt", *options, "--out", tmp_path / "back.json")
    lines = dict(line.split(": ") for line in (tmp_path / "levels.txt").read_text().splitlines())
    assert list(lines) == [spec.name for spec in specs()]
    done("budget", "convert", path, "--to", "evopress", *levels(), "--out", tmp_path / "far.txt")
    far = write(tmp_path / "far.json", make(lambda spec: Target(0, spec.numel if spec.block else 8)))
    said = done("budget", "convert", far, "--to", "evopress", *levels(), "--out", tmp_path / "far2.txt").stderr
    assert "the farthest level is 24; EvoPress makes 8 each way" in said


@pytest.mark.parametrize(
    ("target", "options", "code", "says"),
    [
        (
            half,
            ["--to", "sparsities"],
            USAGE,
            "9 layers have a low-rank part (the first model.layers.0.self_attn.q_proj",
        ),
        (half, ["--to", "evopress", *levels()], USAGE, "which EvoPress cannot carry"),
        (sparse, ["--to", "peft"], USAGE, "No layer has a low-rank part"),
        (two_of_four, ["--to", "evopress", *levels()], USAGE, "has a pattern, which EvoPress cannot carry"),
        (one_of_four_with_rank, ["--to", "csv", "--rank-as-nonzeros"], USAGE, "leaves no room to keep rank 1"),
        (sparse, ["--to", "evopress"], USAGE, "need --level-step"),
        (sparse, ["--to", "evopress", "--level-step", 0], USAGE, "from 1 to 2^53; got 0"),
        (sparse, ["--to", "evopress", "--level-step", 10**400], USAGE, "from 1 to 2^53"),
        (sparse, ["--to", "evopress", "--level-step", 8, "--level-sparsity", 1.5], USAGE, "in [0, 1); got 1.5"),
        (sparse, ["--to", "cvs"], USAGE, "did you mean 'csv'?"),
        (sparse, ["--from", "cvs"], USAGE, "did you mean 'csv'?"),
        (sparse, [], USAGE, "Nothing to convert"),
        (sparse, ["--to", "csv", "--model", "reference"], USAGE, "leave out --like and --model"),
        (sparse, ["--to", "csv", "--level-step", 8], USAGE, "what EvoPress's levels mean"),
        (sparse, ["--to", "csv", "--accounting", "bytes"], USAGE, "--accounting is for --model"),
        (sparse, ["--from", "csv", "--model", "reference", "--accounting", "bits"], USAGE, "No accounting 'bits'"),
        (sparse, ["--from", "csv"], USAGE, "--like, or --model"),
        (sparse, ["--from", "peft", "--model", "reference"], USAGE, "give the budget that has the nonzeros"),
    ],
)
def test_what_cannot_be_carried_is_refused(tmp_path, target, options, code, says):
    path = write(tmp_path / "b.json", make(target))
    assert says in refused(code, "budget", "convert", path, *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_of_different_patterns_have_no_list(tmp_path):
    path = write(tmp_path / "b.json", make(lambda spec: two_of_four(spec) if spec.block else sparse(spec)))
    message = refused(USAGE, "budget", "convert", path, "--to", "sparsities", "--out", tmp_path / "out")
    assert "different patterns (2:4, unstructured)" in message


def test_nothing_is_overwritten(tmp_path):
    path = write(tmp_path / "b.json", make(half))
    assert "exists" in refused(USAGE, "budget", "convert", path, "--to", "csv", "--out", path)
    missing = tmp_path / "none"
    assert "There is no file" in refused(FAILED, "budget", "convert", missing, "--to", "csv", "--out", tmp_path / "out")


HEADER = "name,rank,nnz,pattern\n"
NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("csv", "", "the first line lacks name, rank, nnz"),
        ("csv", "name;rank;nnz\n", "separated by commas"),
        ("csv", "name,rank,nnz,patern\n", "column 'patern' is unknown"),
        ("csv", HEADER + "lm_head,0,1,\n", "line 2 names 'lm_head', which is no layer of the model"),
        ("csv", HEADER + f"{NAME},0\n", "line 2 has another number of cells"),
        ("csv", HEADER + f"{NAME},0,1,,5\n", "line 2 has another number of cells"),
        ("csv", HEADER + f"{NAME},0,-1,\n", "line 2, nnz: '-1' is no whole number"),
        ("csv", HEADER + f"{NAME},0,{'9' * 5000},\n", "is no whole number"),
        ("csv", HEADER + f"{NAME},0,1.5,\n", "'1.5' is no whole number"),
        ("csv", HEADER + f"{NAME},0,1,4:2\n", "must keep at least 1"),
        ("csv", HEADER + f"{NAME},0,1,two\n", "No pattern 'two'"),
        ("csv", HEADER + f"{NAME},0,1,\n{NAME},0,1,\n", "line 3 lists layer model.layers.0.self_attn.q_proj a second"),
        ("csv", HEADER + f"{NAME},0,1,\n", "does not say anything of 8 layers"),
        ("csv", f"name,rank,nnz,d_in\n{NAME},0,1,99\n", "belongs to another model"),
        ("csv", 'name,rank,nnz\n"x,0', "is no CSV"),
        (
            "csv",
            "name,rank,nnz\n" + "".join(f"{s.name},0,{10**9}\n" for s in specs()),
            "nonzeros are more",
        ),
        ("csv", "name,rank,nnz\n" + "".join(f"{s.name},0,0\n" for s in specs()), "would use 0 params"),
        ("csv", "name,rank,nnz\n" + "".join(f"{s.name},8,{s.numel}\n" for s in specs()), "at most the dense"),
        ("csv", b"\xff\xfe\x00", "no UTF-8 text"),
        ("sparsities", "[0.5, ", "not valid JSON"),
        ("sparsities", "[" * 100_000, "not valid JSON"),
        ("sparsities", "{}", "holds no sparsities"),
        ("sparsities", '{"sparsity": 0.5, "block_size": 4}', "'block_size' is not read"),
        ("sparsities", "[0.5, 0.5]", "it has 2 sparsities; the model has 9 layers in 3 blocks"),
        ("sparsities", "[0.5, 0.5, 1.5]", "sparsity 3 is '1.5', no number from 0 to 1"),
        ("sparsities", "[0.5, 0.5, NaN]", "sparsity 3 is 'nan'"),
        ("sparsities", '[0.5, 0.5, "x"]', "sparsity 3 is 'x'"),
        ("sparsities", "[true, 0.5, 0.5]", "sparsity 1 is 'True'"),
        ("sparsities", '{"sparsity": 0.5, "mask_structure": "4:2"}', "must zero at least 1"),
        ("sparsities", '{"sparsity": 0.5, "mask_structure": 24}', "not N:M"),
        ("sparsities", '{"sparsity": 0.4, "mask_structure": "2:4"}', "but pattern 2:4 means 0.5"),
        ("sparsities", '{"sparsity": [0.5], "targets": ["Linear"]}', "does not say anything of 9 layers"),
        ("sparsities", '{"sparsity": [0.5], "targets": "Linear"}', "must be a list of the names"),
        ("peft", "[]", "not an object"),
        ("peft", '{"r": 4}', "no target_modules"),
        ("peft", '{"r": 4, "target_modules": ["lm_head"]}', "names 'lm_head', which is no compressible layer"),
        ("peft", '{"r": 4, "target_modules": "("}', "no regular expression"),
        ("peft", '{"r": 4, "target_modules": 3}', "a list of names"),
        ("peft", '{"r": "4", "target_modules": ["q_proj"]}', "r is '4', no rank"),
        ("peft", '{"rank_pattern": {"(": 4}}', "is no regular expression"),
        ("peft", '{"rank_pattern": {"lm_head": 4}}', "'lm_head' matches no layer"),
        ("peft", '{"rank_pattern": {"q_proj": -4}}', "is '-4', no rank"),
        ("peft", '{"rank_pattern": [4]}', "must map patterns to ranks"),
        ("peft", '{"rank_pattern": {"q_proj": 99}}', "rank 99 is above its largest rank 16"),
        ("peft", '{"rank_pattern": {}, "exclude_modules": "x"}', "'exclude_modules' is not read"),
        ("evopress", "", "does not say anything of 9 layers"),
        ("evopress", f"{NAME} 3", "line 1 is"),
        ("evopress", f"{NAME}: 3.5", "not 'layer: level'"),
        ("evopress", f"{NAME}: 1\n{NAME}: 2", "line 2 lists layer"),
        ("evopress", "".join(f"{s.name}: 99\n" for s in specs()), "would leave -"),
    ],
)
def test_bad_input_is_one_line(tmp_path, name, content, says):
    like = write(tmp_path / "like.json", make(half))
    path = tmp_path / "input"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    more = levels() if name == "evopress" else ()
    message = refused(
        FAILED, "budget", "convert", path, "--from", name, "--like", like, *more, "--out", tmp_path / "out"
    )
    assert says in message
    assert str(path) in message
    assert not (tmp_path / "out").exists()
