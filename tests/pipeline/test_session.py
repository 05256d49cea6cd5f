"""A session computes without denormal numbers, in which a CPU is many times slower."""

from __future__ import annotations

import pytest
import torch

from globalopt.pipeline import session
from globalopt.pipeline.options import ModelOptions, TextOptions
from globalopt.pipeline.reporter import Reporter
from reports import QuietProgress


def test_numbers_too_small_for_a_normal_float_are_zero(tiny_llama, tiny_text):
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor has no such mode")
    assert (torch.full((64,), 1e-30) * 1e-10).any()
    try:
        texts = TextOptions(str(tiny_text), nsamples=2, seqlen=16, eval_windows=2)
        session.set_up(ModelOptions(str(tiny_llama)), texts, 0, Reporter(QuietProgress()))
        assert not (torch.full((64,), 1e-30) * 1e-10).any()
    finally:
        torch.set_flush_denormal(False)
