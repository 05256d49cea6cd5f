"""Every split of a mixture has its windows from all parts, by weight, and no token of any part is in two splits."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from globalopt.errors import CalibrationError, UsageError
from globalopt.text.mixtures import Part, apportion, parse_mixture
from globalopt.text.regions import Region, cut_text
from globalopt.text.splits import NAMES, assemble
from globalopt.text.windows import Split, Splits
from tests.text.test_text import make_word_tokenizer, words

SPEC = "a:3,b:1"


def regions(first: int, count: int, nsamples: int, seqlen: int = 8) -> dict[str, Region]:
    """Regions of a text of `count` different tokens, from `first` on."""
    text = replace(words(count), spec=f"from {first}", sha256=str(first))
    found = cut_text(make_word_tokenizer(), text, NAMES, nsamples, seqlen)
    return {name: replace(region, tokens=region.tokens + first) for name, region in found.items()}


def mix(*sizes: int, weights: tuple[float, ...] = (0.75, 0.25), seed: int = 0, most: int | None = 8) -> Splits:
    parts = [
        (Part(f"{i}", weight), regions(10_000 * i, size, 2))
        for i, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    ]
    return assemble(SPEC, parts, None, 16, 8, seed, most)


def of_parts(split: Split) -> list[int]:
    """The part that every window is of, by its tokens."""
    return (split.windows[:, 1] // 10_000).tolist()


def test_windows_are_shared_out_by_weight_and_spread_over_every_split() -> None:
    splits = mix(1000, 1000)
    assert [tuple(split.windows.shape) for split in splits] == [(16, 8), (8, 8), (8, 8), (8, 8)]
    for split in splits:
        found = of_parts(split)
        assert sum(found) == len(found) // 4
        # Of the first windows too.
        assert all(abs(sum(found[:n]) - n / 4) <= 1 for n in range(1, len(found)))
        assert [len(part.windows) for _, part in split.parts] == [len(found) * 3 // 4, len(found) // 4]
        together = torch.cat([part.windows for _, part in split.parts]).tolist()
        assert sorted(split.windows.tolist()) == sorted(together)


def test_no_token_of_any_part_is_in_two_splits() -> None:
    tokens = [set(split.windows.flatten().tolist()) for split in mix(1000, 1000)]
    assert not any(one & other for one, other in itertools.combinations(tokens, 2))


def test_seeds_change_windows_and_order_of_calibration_alone() -> None:
    one, again, other = mix(1000, 1000), mix(1000, 1000), mix(1000, 1000, seed=1)
    assert [split.sha256 for split in one] == [split.sha256 for split in again]
    assert one.calibration.sha256 != other.calibration.sha256
    assert [split.sha256 for split in one][1:] == [split.sha256 for split in other][1:]
    assert len({tuple(of_parts(mix(1000, 1000, seed=seed).calibration)) for seed in range(8)}) > 1


def test_a_short_part_makes_measured_splits_shorter_and_keeps_the_weights() -> None:
    # A sixth of 131 tokens has two windows, beside which the other part may have three.
    splits = mix(1000, 130, weights=(0.5, 0.5))
    assert [of_parts(split) for split in splits][1:] == [[0, 1, 0, 1, 0]] * 3
    assert len(splits.calibration.windows) == 16
    assert len(mix(1000, 1000, most=None).test.windows) == 27


def test_the_record_says_of_every_part_where_its_windows_are_from() -> None:
    record = json.loads(json.dumps(mix(1000, 1000).record()))["calibration"]
    assert (record["source"], record["seed"], record["starts"], record["windows"]) == (SPEC, 0, None, 16)
    assert [(part["weight"], part["source"], part["windows"], len(part["starts"])) for part in record["parts"]] == [
        (0.75, "from 0", 12, 12),
        (0.25, "from 10000", 4, 4),
    ]


def test_splits_of_mixtures_that_share_tokens_of_a_part_are_refused() -> None:
    one, other = mix(1000, 1000), mix(1000, 1000, seed=1)
    with pytest.raises(CalibrationError, match="The calibration and validation splits share tokens of from 0"):
        Splits(one.calibration, one.selection, replace(other.calibration, name="validation"), one.test)


def test_a_mixture_is_texts_with_weights_and_a_name_that_exists_is_one_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parse_mixture("a.txt:7, b.jsonl:3") == (Part("a.txt", 0.7), Part("b.jsonl", 0.3))
    assert parse_mixture("owner/name@one:train:2,self:2") == (Part("owner/name@one:train", 0.5), Part("self", 0.5))
    assert parse_mixture("owner/name:train") == (Part("owner/name:train"),)
    name = "a.txt:1,b.txt:2"
    assert len(parse_mixture(name)) == 2
    monkeypatch.chdir(tmp_path)
    Path(name).touch()
    assert parse_mixture(name) == (Part(name),)
    assert len(parse_mixture(",".join(f"{'long' * 20}{i}.txt:1" for i in range(9)))) == 9


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a.txt,b.txt:1", "Part 'a.txt' of --calibration has no weight; a mixture is TEXT:WEIGHT,TEXT:WEIGHT"),
        ("a.txt:1,", "Part '' of --calibration has no weight"),
        ("a.txt:1,:2", "Part ':2' of --calibration has no weight"),
        ("a.txt:1,name:train", "Part 'name:train' of --calibration has no weight"),
        ("a.txt:1,b.txt:0", "Part 'b.txt' of --calibration has the weight 0; weights are positive"),
        ("a.txt:-1,b.txt:1", "Part 'a.txt' of --calibration has the weight -1"),
        ("a.txt:inf,b.txt:1", "Part 'a.txt' of --calibration has the weight inf"),
        ("a.txt:nan,b.txt:1", "Part 'a.txt:nan' of --calibration has no weight"),
        ("a.txt:1,a.txt:2", "Part 'a.txt' of --calibration is named twice"),
    ],
)
def test_a_part_that_cannot_be_read_is_named(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_mixture(spec)


def test_a_part_without_windows_or_with_the_text_of_another_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"Part '1' of --calibration, of weight 0\.01, gets none of 16 cal"):
        mix(1000, 1000, weights=(0.99, 0.01))
    with pytest.raises(CalibrationError, match=r"Part '1' of --calibration, of weight 0\.05, gets none of 8 sel.*eval"):
        mix(1000, 1000, weights=(0.95, 0.05))
    few = [(Part(name, 0.5), regions(first, 130, 2)) for name, first in (("a", 0), ("b", 0))]
    with pytest.raises(CalibrationError, match="Parts 'a' and 'b' of the mixture hold the same text"):
        assemble(SPEC, few, None, 16, 8, 0, 8)


@pytest.mark.parametrize("count", range(1, 40))
def test_shares_are_whole_and_within_one_of_the_exact_ones(count: int) -> None:
    parts = [Part("a", 0.5), Part("b", 0.3), Part("c", 0.2)]
    found = apportion(count, parts)
    assert sum(found) == count
    assert all(abs(n - count * part.weight) < 1 for n, part in zip(found, parts, strict=True))
