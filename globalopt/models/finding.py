"""Find the compressible layers of a model by its structure: linear layers of the blocks, and shared inputs.

The layers are the linear maps inside the decoder blocks; layers that read the very same tensor in one short forward
pass share an input site.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from globalopt.errors import GlobalOptError, UnsupportedModelError, one_line
from globalopt.models.coverage import count_coverage, require_coverage
from globalopt.models.decoder import decoder_blocks, token_embedding
from globalopt.models.hooks import input_hooks
from globalopt.models.layers import ModelLayers
from globalopt.models.linear import Linear, as_linear
from globalopt.models.reach import unreached
from globalopt.models.streaming import lazy_blocks
from globalopt.values.layer import LayerSpec

TRACE_TOKENS = 8
"""Tokens of the forward pass that finds out which layers share an input."""
FORESIGHT = 5e-4
"""Largest change of logits before a token that was changed, as a share of the change at it, in a causal model."""
FORESIGHT_16_BITS = 0.05
"""The same in bfloat16 and float16, where rounding may differ between the rows of a batch."""


def find_blocks(model: PreTrainedModel) -> ModelLayers:
    """Find the decoder blocks of a model without its layers: enough to walk it.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_blocks(tiny_llama())
    >>> layers.blocks_path, len(layers.blocks), layers.specs
    ('model.layers', 2, ())
    """
    path, blocks = decoder_blocks(model)
    return ModelLayers(model, blocks, path, (), count_coverage(model, blocks, []))


def find_layers(model: PreTrainedModel, allow_low_coverage: bool = False) -> ModelLayers:
    """Find the decoder blocks of `model`, their linear layers, and which of these share an input.

    Args:
        model: a causal language model; one short forward pass of it is run, nothing is changed.
        allow_low_coverage: accept a model whose layers are less than half of the block parameters.

    Raises:
        UnsupportedModelError: there are no decoder blocks, no linear layers in them, quantised weights, one weight
            under two names, or too low a coverage.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama())
    >>> {spec.kind: spec.site.removeprefix("model.layers.0.") for spec in layers.of_block(0)}["v_proj"]
    'self_attn.q_proj'
    >>> round(layers.coverage.share, 3)
    0.986
    """
    path, blocks = decoder_blocks(model)
    found = [
        (index, f"{path}.{index}.{name}", module)
        for index, block in enumerate(blocks)
        for name, module in block.named_modules(remove_duplicate=False)
        if isinstance(module, Linear)
    ]
    if not found:
        raise UnsupportedModelError(
            f"The decoder blocks {path} of {type(model).__name__} contain no linear layer to compress."
        )
    _check_weights(model, [(name, module) for _, name, module in found])
    # Before the trace, which reads all of a model that is larger than memory.
    coverage = require_coverage(model, blocks, found, (), allow_low_coverage)
    inputs, unreachable = _trace(model, blocks, found)
    taken = [entry for entry in found if entry[1] not in unreachable]
    apart = [entry for entry in found if entry[1] in unreachable]
    if apart:
        coverage = require_coverage(model, blocks, taken, apart, allow_low_coverage)
    sites = _input_sites(taken, inputs)
    kinds: dict[str, str] = {}
    for index in range(len(blocks)):
        names = [name for block, name, _ in taken if block == index]
        kinds.update(_kinds(names, f"{path}.{index}."))
    specs = tuple(
        LayerSpec(name, index, sites[name], kinds[name], *as_linear(module).shape) for index, name, module in taken
    )
    return ModelLayers(model, blocks, path, specs, coverage, tuple(name for _, name, _ in apart))


def _check_weights(model: PreTrainedModel, found: Sequence[tuple[str, Linear]]) -> None:
    """Check that the weights of layers are unquantised matrices, each under one name.

    Raises:
        UnsupportedModelError: one is not.
    """
    users: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users[_identity(parameter)].append(name.rpartition(".")[0])
    for name, module in found:
        weight = module.weight
        if weight.ndim != 2 or not weight.is_floating_point():
            raise UnsupportedModelError(
                f"Layer {name} holds {tuple(weight.shape)} values of {str(weight.dtype).removeprefix('torch.')}: "
                "it is quantised or sharded. Load the unquantised checkpoint."
            )
        if len(users[_identity(weight)]) > 1:
            both = " and ".join(users[_identity(weight)][:2])
            raise UnsupportedModelError(
                f"{both} use the same weight; a weight under two names cannot be given two budgets. Untie it first."
            )


def _identity(parameter: Tensor) -> int:
    """Return a number that tied parameters have in common: their address, or their id if they are not in memory."""
    return id(parameter) if parameter.is_meta else parameter.data_ptr()


def _kinds(names: list[str], prefix: str) -> dict[str, str]:
    """Find, for each module path of one block, the shortest suffix that no other path of the block has.

    A path that is itself the end of another one (BERT's `output.dense` of `attention.output.dense`) stays whole.
    """
    paths = {name: name.removeprefix(prefix).split(".") for name in names}
    users: Counter[str] = Counter()
    for parts in paths.values():
        users.update(".".join(parts[-length:]) for length in range(1, len(parts) + 1))
    return {
        name: next(
            (suffix for n in range(1, len(parts) + 1) if users[suffix := ".".join(parts[-n:])] == 1), ".".join(parts)
        )
        for name, parts in paths.items()
    }


@torch.no_grad()
def _trace(
    model: PreTrainedModel, blocks: nn.ModuleList, found: Sequence[tuple[int, str, Linear]]
) -> tuple[Mapping[str, tuple[Any, ...]], set[str]]:
    """Run a short forward pass, and return the identities of every layer's inputs, and the layers that are unreached.

    Raises:
        UnsupportedModelError: the model cannot run, or is not causal.
    """
    seen: defaultdict[str, tuple[Any, ...]] = defaultdict(tuple)
    held: list[Tensor] = []

    def record(name: str, x: Tensor) -> None:
        """Note the identity of an input by layer."""
        # An empty tensor (an expert no token was sent to) has no address of its own.
        if x.numel():
            # The version changes with every operation in place on the tensor.
            seen[name] += ((x.data_ptr(), x.shape, x.stride(), x._version),)
            # The tensor is held, or its address might be used for another one; not so the graph that it is from.
            held.append(x.detach())

    embedding = token_embedding(model)
    ids = torch.arange(TRACE_TOKENS, device=embedding.weight.device)[None] % embedding.num_embeddings
    # The second row ends in another token, for `_check_causal`.
    ids = torch.cat([ids, torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % embedding.num_embeddings], 1)])
    watched = unreached(list(blocks), found, lazy_blocks(model))
    with input_hooks({name: module for _, name, module in found}, record), watched as apart:
        try:
            outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except (GlobalOptError, MemoryError, torch.OutOfMemoryError):
            raise
        # Fields of a config that do not fit together are found only when the model computes, as errors of any kind.
        except Exception as cause:
            reason = one_line(cause, 200)
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot compute a text of {TRACE_TOKENS} tokens ({type(cause).__name__}: "
                f"{reason}). Check its config.json, and that transformers alone runs it."
            ) from cause
    _check_causal(model, getattr(outputs, "logits", None))
    return seen, apart


def _input_sites(found: Sequence[tuple[int, str, Linear]], seen: Mapping[str, tuple[Any, ...]]) -> dict[str, str]:
    """Find the input site of every layer: the first layer of its block that reads the same tensors, as `seen`."""
    sites: dict[str, str] = {}
    first: dict[Any, str] = {}
    for block, name, _ in found:
        inputs = seen.get(name)
        sites[name] = first.setdefault((block, inputs), name) if inputs else name
    return sites


def _check_causal(model: PreTrainedModel, logits: Tensor | None) -> None:
    """Check that the logits (2, tokens, vocabulary) of two texts that differ in the last token are equal before it.

    Raises:
        UnsupportedModelError: they are not; the model sees the tokens that follow.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 3 or model.training:
        return
    change = (logits[0].float() - logits[1].float()).abs().amax(1)
    # An encoder that was never trained changes by 0.003 of the last position's change; rounding is far below that in
    # float32. A comparison with NaN is false: parameters that are not finite are found later.
    share = FORESIGHT if logits.dtype == torch.float32 else FORESIGHT_16_BITS
    if bool(change[:-1].max() > share * change[-1]):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder here: a token changes the predictions before it. Only decoder-only "
            "causal language models can be compressed."
        )
