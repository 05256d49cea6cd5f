"""One thread, no network, no chatter: for every test, before anything heavy is imported."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import datasets
import pytest
import torch
import transformers

from globalopt.models import reference_folder

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def reference_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """The bundled model's tokenizer: byte-level, adds no special tokens."""
    return transformers.AutoTokenizer.from_pretrained(reference_folder())
