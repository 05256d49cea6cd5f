"""A model in memory that cannot be compressed, or a tokenizer that is none, is refused before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from globalopt.errors import GlobalOptError, UnsupportedModelError, UsageError
from globalopt.pipeline.live import live_session
from globalopt.pipeline.options import TextOptions
from globalopt.pipeline.reporter import Reporter
from globalopt.pipeline.session import Session
from reports import QuietProgress
from tests.command import write_text
from tests.tiny_models import KINDS, tiny_model, tiny_tokenizer


def opened(model: Any, tokenizer: Any, folder: Path) -> Session:
    texts = TextOptions(nsamples=4, seqlen=16, eval_windows=2, batch_size=2)
    text = write_text(folder / "text.txt")
    return live_session(model, tokenizer, text, None, texts, 0, Reporter(QuietProgress()), allow_low_coverage=True)


def refused(model: Any, tokenizer: Any, folder: Path, words: str, kind: type[GlobalOptError]) -> None:
    with pytest.raises(kind, match=words) as caught:
        opened(model, tokenizer, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft calls what is deprecated
def test_an_adapter_inside_or_around_the_model_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model: Any = tiny_model("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    refused(model, tiny_tokenizer(), tmp_path, "adapter of peft inside.*merge_and_unload", UnsupportedModelError)
    refused(wrapped, tiny_tokenizer(), tmp_path, "transformers model.*merge_and_unload", UsageError)
    opened(wrapped.merge_and_unload(), tiny_tokenizer(), tmp_path)


def test_a_model_that_is_not_as_its_class_makes_it_is_refused(tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    refused(model, tiny_tokenizer(), tmp_path, "is not as LlamaForCausalLM makes it", UnsupportedModelError)
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj = nn.Sequential(model.model.layers[1].mlp.up_proj)
    refused(model, tiny_tokenizer(), tmp_path, r"model\.layers\.1\.mlp\.up_proj", UnsupportedModelError)
    model = tiny_model("llama")
    model.config.intermediate_size += 1
    refused(model, tiny_tokenizer(), tmp_path, r"\(32, 48\) and not \(32, 49\)", UnsupportedModelError)


@pytest.mark.parametrize("kind", KINDS)
def test_models_as_their_classes_make_them_are_taken(kind: str, tmp_path: Path) -> None:
    opened(tiny_model(kind).to(torch.bfloat16), tiny_tokenizer(), tmp_path)  # pyright: ignore[reportArgumentType]


class Processor:
    """Holds a tokenizer, as the processors of multimodal models do."""

    tokenizer = tiny_tokenizer()


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        ("folder", "got a str. Load one"),
        (None, "got a NoneType. Load one"),
        (Processor(), "got a Processor. Give its attribute `tokenizer`"),
        (tiny_tokenizer().backend_tokenizer, "got a Tokenizer. Load one"),
    ],
)
def test_a_tokenizer_that_is_none_is_refused(tokenizer: Any, words: str, tmp_path: Path) -> None:
    refused(tiny_model("llama"), tokenizer, tmp_path, words, UsageError)
