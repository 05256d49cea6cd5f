"""The whole search on every architecture: spans, prices, refinement, saving and evaluation, without naming one."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from globalopt.budgets.budget_file import read
from globalopt.errors import UnsupportedModelError
from globalopt.pipeline import search, session
from globalopt.pipeline.options import ModelOptions, SearchOptions, TextOptions
from globalopt.pipeline.plan import resolve
from globalopt.pipeline.reporter import Reporter
from reports import QuietProgress
from tests.command import write_text
from tests.tiny_models import COVERED_KINDS, save_tiny


def opened(folder, text):
    options = ModelOptions(str(folder))
    texts = TextOptions(str(text), nsamples=4, seqlen=16, eval_windows=2, batch_size=2)
    return session.set_up(options, texts, 0, Reporter(QuietProgress()))


@pytest.mark.parametrize("kind", COVERED_KINDS)
def test_search_compresses_it(kind, tmp_path):
    model = save_tiny(tmp_path / "model", kind)
    made = opened(model, write_text(tmp_path / "text.txt"))
    options = SearchOptions(budget=0.5, solver="sparsegpt", predict_from="span")
    summary, run = search.search(made, Reporter(QuietProgress()), resolve(options), tmp_path / "run", "test")
    assert 0.999 * summary.limit <= summary.used <= summary.limit
    assert summary.compressed[0].kl
    assert len(read(run.budget_path).layers) == len(made.layers.specs)
    # Loaded by plain transformers, every weight is what was saved for the layer.
    saved = AutoModelForCausalLM.from_pretrained(run.model_folder)
    for spec in made.layers.specs:
        value = run.layer(spec)
        weight = saved.get_submodule(spec.name).weight
        weight = weight if type(saved.get_submodule(spec.name)) is torch.nn.Linear else weight.mT
        torch.testing.assert_close(weight.float(), value.dense(), atol=1e-6, rtol=1e-5)


def test_mostly_fused_experts_are_refused_unless_allowed(tmp_path):
    model = save_tiny(tmp_path / "model", "qwen3_moe")
    with pytest.raises(UnsupportedModelError, match=r"fused 3-D experts.*--allow-low-coverage"):
        opened(model, write_text(tmp_path / "text.txt"))
