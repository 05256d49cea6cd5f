"""What rounding adds to a layer: measured where it was solved at all anchors, taken from neighbours elsewhere."""

from __future__ import annotations

import math
from statistics import median

import pytest
import torch

from globalopt.analysis import rounding
from globalopt.analysis.anchor_curves import fully_solved
from globalopt.analysis.layer_analysis import LayerAnalysis
from globalopt.analysis.rounding import FEW, rounding_losses
from globalopt.kernels.grid import fit_scales, snap, spread
from globalopt.kernels.low_rank import balanced
from globalopt.runs.artefacts import ROUNDING
from globalopt.values.decomposition import Decomposition
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Gram, Metric
from globalopt.values.rounding_losses import RoundingLosses
from globalopt.values.storage import GROUP
from tests.analysis.deep import EveryAnchor, solved

Found = dict[LayerSpec, RoundingLosses]


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> LayerAnalysis:
    """The analysis of a model of seven blocks up to anchor solutions."""
    return solved(LayerAnalysis, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def found(deep) -> Found:
    """The losses of all of its layers."""
    return dict(rounding_losses(deep, deep.layers.specs))


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Found:
    """The same where all layers are solved at all anchors."""
    every = solved(EveryAnchor, tmp_path_factory.mktemp("every"))
    return dict(rounding_losses(every, every.layers.specs))


def lacking(specs: list[LayerSpec]) -> set[LayerSpec]:
    return {spec for spec in specs if spec.name not in fully_solved(specs)}


def test_a_layer_solved_at_one_anchor_is_priced_at_all_of_them(found, measured):
    assert lacking([*found])
    for spec, losses in found.items():
        true = measured[spec]
        assert losses.ranks == true.ranks, spec.name
        assert losses.kept == pytest.approx(true.kept, abs=0.01)
        pairs = [
            (guessed, exact)
            for bits in FEW
            for ours, theirs in ((losses.values, true.values), (losses.factors, true.factors))
            for guessed, exact in zip(ours[bits], theirs[bits], strict=True)
        ]
        if spec in lacking([*found]):
            # At the lowest anchor the smallest layers keep 17 numbers, and chance decides.
            assert median(abs(math.log(guessed / exact)) for guessed, exact in pairs) < 0.2
            assert all(losses.values[bits][-1] == true.values[bits][-1] for bits in FEW)
        else:
            assert all(guessed == exact for guessed, exact in pairs)


def test_fewer_bits_lose_more(found):
    for spec, losses in found.items():
        for table in (losses.values, losses.factors):
            for few, more in zip(FEW[1:], FEW, strict=False):
                assert all(a > b for a, b in zip(table[few], table[more], strict=True)), (spec.name, few, more)


def test_a_loss_is_the_same_whatever_was_measured_before(deep, found):
    asked = [max(lacking([*found]), key=lambda spec: spec.name), deep.layers.specs[0]]
    for spec, losses in found.items():
        if spec not in asked:
            deep.work.put(ROUNDING, spec, losses)
    assert dict(rounding_losses(deep, asked)) == {spec: found[spec] for spec in asked}


def test_errors_of_factors_need_no_product_of_the_size_of_the_layer():
    generator = torch.Generator().manual_seed(0)
    U, V = torch.randn(24, 3, generator=generator), torch.randn(3, 40, generator=generator)
    inputs, outputs = torch.randn(90, 40, generator=generator), torch.randn(60, 24, generator=generator)
    value = Decomposition(torch.zeros(24, 40), U, V)
    for A in (None, Gram(outputs.mT @ outputs, 60)):
        metric = Metric(Gram(inputs.mT @ inputs, 90), A)
        U, V = balanced(U, V)
        levels = []
        for numbers in (U.mT.flatten(), V.flatten()):
            levels.append(snap(numbers, spread(fit_scales(numbers, 4, GROUP), GROUP, len(numbers)), 4))
        exact = metric.error(U @ V - levels[0].view(3, 24).mT @ levels[1].view(3, 40))
        assert rounding._factor_loss(value, metric, 4) == pytest.approx(exact, rel=1e-4)
