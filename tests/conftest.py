"""One thread, no network, no chatter: for every test, before anything heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import datasets
import pytest
import torch
import transformers

from globalopt.reference import reference_folder
from tests import shortened
from tests.command import WINDOWS, done, write_text
from tests.tiny_models import save_tiny

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()


@pytest.fixture(scope="session", autouse=True)
def shortened_ends() -> Iterator[None]:
    """Pictures of a single point and samples of a few tokens, outside of tests that look at them."""
    with shortened.shortened():
        yield


@pytest.fixture(scope="session")
def reference_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """The bundled model's tokenizer: byte-level, adds no special tokens."""
    return transformers.AutoTokenizer.from_pretrained(reference_folder())


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """Folder of a tiny Llama: 2 blocks, 14 layers, 128 tokens of context."""
    return save_tiny(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> Path:
    """A text file of about 3000 tokens of the tiny tokenizer."""
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="session")
def tiny_search(tiny_llama, tiny_text) -> tuple[str, ...]:
    """A quick `search` of the tiny Llama, all but its `--out`."""
    options = (
        "--solver",
        "oats",
        "--set",
        "steps=5",
        "--predict-from",
        "span",
        "--allocator",
        "auto",
        "--search-tokens",
        "2000",
        "--match",
        "none",
    )
    options += ("--calibration", str(tiny_text))
    return ("search", str(tiny_llama), *options, *WINDOWS)


@pytest.fixture(scope="session")
def ranked_run(tiny_search, tmp_path_factory) -> Path:
    """The folder of a finished search whose layers have rank; not to be changed."""
    folder = tmp_path_factory.mktemp("ranked") / "half"
    done(*tiny_search, "--allocator", "uniform", "--allocator-set", "rank_share=0.4", "--out", folder, "-q")
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_search, tmp_path_factory) -> Path:
    """The folder of that search, finished; not to be changed."""
    folder = tmp_path_factory.mktemp("run") / "half"
    done(*tiny_search, "--out", folder, "-q")
    return folder
