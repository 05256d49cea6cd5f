"""The coverage counts every parameter of a model once, and too low a one is refused."""

from __future__ import annotations

import pytest

from globalopt.errors import UnsupportedModelError
from globalopt.models.finding import find_layers
from tests.tiny_models import COVERED_KINDS, KINDS, parameter_count, tiny_model


@pytest.mark.parametrize("kind", KINDS)
def test_coverage_accounts_for_every_parameter_once(kind: str) -> None:
    model = tiny_model(kind)
    coverage = find_layers(model, allow_low_coverage=True).coverage
    assert coverage.covered + sum(coverage.skipped.values()) == parameter_count(model)
    assert (coverage.share > 0.9) == (kind in COVERED_KINDS)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox", "opt", "qwen3_moe"])
def test_tied_heads_count_as_embeddings_and_untied_ones_by_themselves(kind: str) -> None:
    model = tiny_model(kind)
    skipped = find_layers(model, allow_low_coverage=True).coverage.skipped
    assert ("lm_head" in skipped) == (not model.config.tie_word_embeddings)


def test_low_coverage_is_refused_with_the_figure_and_what_is_missing() -> None:
    with pytest.raises(UnsupportedModelError, match=r"19\.7%.*fused 3-D experts \(24,576\).*--allow-low-coverage"):
        find_layers(tiny_model("qwen3_moe"))
