"""Find the longest context of a model, in tokens, under the names that configs give it."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedConfig

CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_target_positions",
    "model_max_length",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "context_length",
    "n_ctx",
    "seq_length",
    "seq_len",
)
"""Names of the longest context in model configs, the most exact first: the last ones may be a length in training."""

TEXT_CONFIGS = ("llm_config", "language_config", "text_config")
"""Names of the text part's config that `PreTrainedConfig.get_text_config` may not know."""


def context_length(config: PreTrainedConfig) -> int | None:
    """Find the longest context of a model in its config, in tokens; None where it does not tell.

    The config of the text part is asked first: where a model has several parts, the outer one may describe another.

    >>> from transformers import GPT2Config, MptConfig, PreTrainedConfig
    >>> context_length(MptConfig(max_seq_len=64)), context_length(GPT2Config(n_positions=32))
    (64, 32)
    >>> context_length(PreTrainedConfig()) is None
    True
    """
    parts = [config.get_text_config(decoder=True), *(getattr(config, name, None) for name in TEXT_CONFIGS), config]
    for part in parts:
        for name in CONTEXT_NAMES:
            found = part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)
            if isinstance(found, int) and found > 0:
                return found
    return None
