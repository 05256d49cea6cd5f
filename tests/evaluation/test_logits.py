"""Logits of a few positions at a time are those of the whole window, and the blocks run once for all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from globalopt.evaluation.logits import in_parts, logits_at
from tests.families import COVERED, family_model
from tests.tiny_models import tiny_ids, tiny_model


@pytest.mark.parametrize("kind", COVERED)
@torch.no_grad()
def test_the_parts_are_those_of_the_whole(kind: str) -> None:
    model, ids = family_model(kind).eval(), tiny_ids(3, 12)
    parts = logits_at(model, ids)
    found = torch.cat([parts(slice(start, min(start + 5, 12))) for start in range(0, 12, 5)], 1)
    torch.testing.assert_close(found, model(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_blocks_run_once_and_the_head_on_what_is_asked_for() -> None:
    model: Any = tiny_model("llama")
    runs, rows = [], []
    model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(tuple(output.shape[:2])))
    parts = logits_at(model, tiny_ids(3, 12))
    parts(slice(0, 5))
    parts(slice(5, 11))
    assert (len(runs), rows) == (1, [(3, 5), (3, 6)])
    assert "forward" not in vars(model.model)


@torch.no_grad()
def test_a_model_that_ignores_positions_gives_all_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama")
    runs = []
    forward = type(model).forward

    def deaf(self: Any, input_ids: Any, logits_to_keep: Any = 0, **rest: Any) -> Any:
        runs.append(1)
        return forward(self, input_ids=input_ids, **rest)

    expected = model(input_ids=tiny_ids(2, 12), use_cache=False).logits
    monkeypatch.setattr(type(model), "forward", deaf)
    assert in_parts(model)
    parts = logits_at(model, tiny_ids(2, 12))
    assert torch.equal(torch.cat([parts(slice(0, 5)), parts(slice(5, 9)), parts(slice(9, 12))], 1), expected)
    assert len(runs) == 2
