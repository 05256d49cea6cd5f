"""The longest context of a model is found in its config."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from globalopt.models.context_length import context_length


def made(**fields: Any) -> transformers.PreTrainedConfig:
    """A configuration of no class in particular."""
    return transformers.PreTrainedConfig(**fields)


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (transformers.LlamaConfig(max_position_embeddings=48), 48),
        (transformers.GPT2Config(n_positions=32), 32),
        (transformers.MptConfig(max_seq_len=64), 64),
        (made(n_ctx=40), 40),
        (made(seq_length=40, max_position_embeddings=80), 80),
        (made(max_sequence_length=24), 24),
        (made(max_position_embeddings=-1), None),
        (
            made(max_position_embeddings=9, text_config=transformers.MptConfig(max_seq_len=7)),
            7,
        ),
        (made(llm_config={"max_position_embeddings": 20}), 20),
        (transformers.Gemma3Config(text_config={"max_position_embeddings": 96}), 96),
        (made(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_context_is_found_under_the_names_that_models_use(config, context):
    assert context_length(config) == context
