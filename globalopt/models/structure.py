"""Make a model from its config, without the weights of its checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from globalopt.errors import GlobalOptError, UnknownNameError
from globalopt.models.checkpoint import Precision, Source, Zeros
from globalopt.models.config import load_config
from globalopt.models.decoder import decoder_blocks
from globalopt.models.device import DTYPES
from globalopt.models.load_errors import known_cause, unusable
from globalopt.models.location import locate
from globalopt.models.quiet import quiet
from globalopt.models.refusals import check_config, check_towers
from globalopt.models.streaming import LazyBlocks, fill


def load_structure(
    name_or_path: str | Path, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, torch.dtype]:
    """Make a model with zeros for weights, which take no memory, from its config alone; also return its stored type.

    Args:
        name_or_path: a folder in the Hugging Face format, or a hub id.
        dtype: the type it computes in; "auto": float32.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ArtefactError, UnsupportedModelError, UnknownNameError: as `load_model`.

    >>> from globalopt.reference import reference_folder
    >>> model, stored = load_structure(reference_folder())
    >>> stored, model.num_parameters() > 10**6
    (torch.bfloat16, True)
    """
    source, options = locate(str(name_or_path), trust_remote_code)
    with quiet():
        config = load_config(source, options)
    check_config(source, config)
    return config_structure(source, config, dtype, trust_remote_code)


def config_structure(
    source: str, config: Any, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, torch.dtype]:
    """Make a model with zeros for weights from a config; also return the type that the config says it is stored in.

    Args:
        source: file, folder or hub id of the config, for messages.
        dtype, trust_remote_code: as for `load_structure`.
    Raises:
        UnsupportedModelError, UnknownNameError: as `load_model`.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> model, stored = config_structure("tiny", tiny_llama().config)
    >>> model.num_parameters(), stored
    (6480, torch.float32)
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, ("auto", *DTYPES))
    computed = DTYPES.get(dtype, torch.float32)
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with quiet():
        model = empty_model(source, config, options, computed)
        fill_empty(model, Zeros(model), Precision(computed, computed, torch.device("cpu")))
    model.config.use_cache = False
    stored = getattr(config, "dtype", None)
    return model.eval().requires_grad_(False), stored if isinstance(stored, torch.dtype) else torch.float32


def empty_model(source: str, config: Any, options: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Make the model with its parameters on the meta device; buffers are real, in `dtype` as in a whole load.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> empty_model("tiny", tiny_llama().config, {"trust_remote_code": False}, torch.float32).device.type
    'meta'
    """
    trust = options["trust_remote_code"]
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, trust_remote_code=trust
            )
    except (GlobalOptError, MemoryError, torch.OutOfMemoryError):
        raise
    # For a config with unknown words, and for code that comes with the model, transformers raises errors of any kind.
    except Exception as error:
        raise known_cause(source, config, error) or unusable(source, options, error) from error
    check_towers(source, config, model)
    # Parameters that move to the meta device as they are made are not tied any more.
    model.tie_weights()
    _compute_buffers(model)
    return model


@torch.no_grad()
def _compute_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that no checkpoint holds, such as tables of positions, as a whole load does.

    A model that is made in a type of 16 bits computes them in it; a whole load does so in float32, and then rounds.
    """
    makers = [(path, module) for path, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    with torch.random.fork_rng(devices=[]):
        for path, module in model.named_modules():
            if module._non_persistent_buffers_set:
                _, maker = max(
                    (m for m in makers if not m[0] or f"{path}.".startswith(f"{m[0]}.")), key=lambda m: len(m[0])
                )
                maker._init_weights(module)


def fill_empty(
    model: PreTrainedModel, source: Source, precision: Precision, beside: PreTrainedModel | None = None
) -> LazyBlocks:
    """Read the parts outside the blocks from `source`, and make the blocks lazy.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> model = empty_model("tiny", tiny_llama().config, {"trust_remote_code": False}, torch.float32)
    >>> blocks = fill_empty(model, Zeros(model), Precision(torch.float32, torch.float32, torch.device("cpu")))
    >>> model.lm_head.weight.device.type, model.model.layers[0].mlp.up_proj.weight.device.type
    ('cpu', 'meta')
    """
    path, blocks = decoder_blocks(model)
    return fill(model, list(blocks), path, source, precision, beside)
