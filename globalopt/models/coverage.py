"""Count how much of a model the compressible layers are, and refuse one of which they are too little."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, nn
from transformers import PreTrainedModel

from globalopt.errors import UnsupportedModelError
from globalopt.models.linear import Linear, as_linear

UNREACHED = "layers that the loss does not reach"
"""What the linear layers of the blocks are called that stay dense, among the parameters that are not covered."""
LEAST_SHARE = 0.5
"""Smallest share of the block parameters that the compressible layers must cover."""


@dataclass(frozen=True)
class Coverage:
    """Count the parameters of the compressible layers and those of the rest; a shared (tied) tensor counts once.

    Args:
        covered: weights of the compressible layers.
        block_params: parameters of all decoder blocks.
        skipped: parameters of the rest of the model by what they are; `covered + sum(skipped)` is the whole model.

    >>> coverage = Coverage(covered=900, block_params=1000, skipped={"norms and biases": 100, "embeddings": 500})
    >>> coverage.share
    0.9
    """

    covered: int
    block_params: int
    skipped: Mapping[str, int]

    @property
    def share(self) -> float:
        """Compute the compressible share of the blocks, `covered / block_params`."""
        return self.covered / self.block_params


def require_coverage(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    taken: Sequence[tuple[int, str, Linear]],
    apart: Sequence[tuple[int, str, Linear]],
    allow_low_coverage: bool,
) -> Coverage:
    """Count what the layers `taken` cover, where the loss does not reach the layers `apart`.

    Args:
        taken, apart: index of the block, name and module of every layer.
        allow_low_coverage: accept layers that are less than `LEAST_SHARE` of the block parameters.
    Raises:
        UnsupportedModelError: there is none, or they are less than half of the block parameters and that is not
            allowed.

    >>> from globalopt.models.decoder import decoder_blocks
    >>> from globalopt.reference.tiny import tiny_llama
    >>> model = tiny_llama()
    >>> require_coverage(model, decoder_blocks(model)[1], [], [], allow_low_coverage=False)
    Traceback (most recent call last):
        ...
    globalopt.errors.UnsupportedModelError: Only 0.0% of the 4,416 block parameters of LlamaForCausalLM ...
    """
    coverage = count_coverage(model, blocks, [module for _, _, module in taken], [module for _, _, module in apart])
    if taken and (coverage.share >= LEAST_SHARE or allow_low_coverage):
        return coverage
    covered, unreached = ({id(module.weight) for _, _, module in some} for some in (taken, apart))
    inside = _skipped(blocks, covered, None, unreached)
    missing = ", ".join(f"{what} ({count:,})" for what, count in inside.items())
    raise UnsupportedModelError(
        f"Only {coverage.share:.1%} of the {coverage.block_params:,} block parameters of {type(model).__name__} "
        f"can be compressed. Not covered: {missing}."
        + (" Pass --allow-low-coverage to compress the rest." if taken else "")
    )


def count_coverage(
    model: PreTrainedModel, blocks: nn.ModuleList, modules: Sequence[Linear], apart: Sequence[Linear] = ()
) -> Coverage:
    """Count the parameters of `modules`, of the blocks, and of the rest of the model, with `apart` by itself.

    >>> from globalopt.models.decoder import decoder_blocks
    >>> from globalopt.reference.tiny import tiny_llama
    >>> model = tiny_llama()
    >>> count_coverage(model, decoder_blocks(model)[1], [model.get_submodule("model.layers.1.mlp.up_proj")]).covered
    384
    """
    weights = {id(module.weight): as_linear(module).numel() for module in modules}
    unreached = {id(module.weight) for module in apart}
    return Coverage(
        covered=sum(weights.values()),
        block_params=sum(parameter.numel() for parameter in blocks.parameters()),
        skipped=MappingProxyType(_skipped(model, set(weights), model.get_output_embeddings(), unreached)),
    )


def _skipped(root: nn.Module, covered: set[int], head: nn.Module | None, unreached: set[int]) -> dict[str, int]:
    """Count the parameters of `root` outside `covered` by what they are; both sets are ids of parameters."""
    counts: Counter[str] = Counter()
    seen = set(covered)
    for owner in root.modules():
        for parameter in owner.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                what = UNREACHED if id(parameter) in unreached else _what(owner, parameter, head)
                counts[what] += parameter.numel()
    return dict(counts)


def _what(owner: nn.Module, parameter: Tensor, head: nn.Module | None) -> str:
    """Name the category of a parameter that is not compressed."""
    if parameter.ndim <= 1:
        return "norms and biases"
    if isinstance(owner, nn.Embedding):
        return "embeddings"
    if owner is head:
        return "lm_head"
    if parameter.ndim == 3 and not isinstance(owner, nn.Conv1d):
        return "fused 3-D experts"
    return "other"
