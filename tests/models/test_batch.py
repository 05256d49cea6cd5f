"""A batch checks its token ids and mask, and selects the rows of real tokens."""

from __future__ import annotations

import pytest
import torch

from globalopt.errors import CalibrationError
from globalopt.models.batch import Batch
from tests.tiny_models import padded_ids, tiny_ids


def test_padding_that_cannot_be_told_apart_is_refused() -> None:
    batch = Batch(*padded_ids())
    with pytest.raises(CalibrationError, match="without padding"):
        batch.select(torch.zeros(5, 4))
    assert len(Batch(batch.input_ids).select(torch.zeros(5, 4))) == 5


def test_a_batch_is_checked() -> None:
    with pytest.raises(CalibrationError, match="int64"):
        Batch(torch.zeros(2, 3))
    with pytest.raises(CalibrationError, match="does not match"):
        Batch(tiny_ids(1, 4), torch.ones(1, 3))
    with pytest.raises(CalibrationError, match="leaves no token"):
        Batch(tiny_ids(1, 4), torch.zeros(1, 4))
