"""Attribute the loss of a compressed model to its layers, by one forward and one backward pass.

Replace the weights `W_l` of all layers by `W_l - t_l E_l`. At `t = 1` the derivative of the loss `L` by `t_l` is
`-<dL/dW_l, E_l>`, which one backward pass gives for all layers. A loss that is quadratic in the residuals is
homogeneous of degree two in `t`, and then by Euler's theorem

    L = sum over l of L_l,   L_l = -1/2 <dL/dW_l, E_l>

so that `L_l` is the share of a layer: its own loss, and half of what it loses together with every other layer. The loss
with that layer alone replaced, which costs a forward pass of its own, does not contain the second part. Far from the
dense model the loss does not grow as the square and the shares do not add up to it, but which layers have the large
ones is still seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from globalopt.analysis.sensitivity import backward_sweep
from globalopt.machine import ranks
from globalopt.models.block_runner import BlockRunner
from globalopt.objective.kl_to_dense import ModelObjective, Weight
from globalopt.values.attribution import Attribution
from globalopt.values.layer import LayerSpec


def attribute(
    model: ModelObjective,
    weights: Mapping[str, Weight],
    chunks: Sequence[int],
    device: torch.device | None = None,
) -> Attribution:
    """Attribute the KL divergence from the dense model to the layers that are replaced; chunks are shared by processes.

    Args:
        model: of the dense model; between calls it may hold replacements.
        weights: of the replaced layers, by name.
        chunks: numbers of the chunks of windows.
        device: where a block is moved for its turn; None leaves it.
    Raises:
        NumericalError: a loss or a gradient is not finite, or no gradient reaches a layer.

    >>> from globalopt.models.batch import Batch
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> model = ModelObjective(BlockRunner(layers, [Batch(torch.arange(48).reshape(3, 16))]))
    >>> noise = torch.Generator().manual_seed(0)
    >>> def rounded(W):
    ...     return W + 0.2 * torch.randn(W.shape, generator=noise) * W.norm() / W.numel() ** 0.5
    >>> found = attribute(model, {spec.name: rounded(layers.weight(spec.name)) for spec in layers.specs}, [0])
    >>> whole = sum(float(share.mean()) for share in found.shares.values())
    >>> abs(whole / float(found.losses.mean()) - 1) < 0.1  # nearly quadratic
    True
    >>> model.close()
    """
    own = [chunks[i] for i in ranks.span(len(chunks))]
    parts = [part for part in ranks.gathered(_of_chunks(model, weights, own, device) if own else None) if part]
    shares = {name: torch.cat([part.shares[name] for part in parts]) for name in parts[0].shares}
    return Attribution(torch.cat([part.losses for part in parts]), shares)


def _of_chunks(
    model: ModelObjective, weights: Mapping[str, Weight], chunks: Sequence[int], device: torch.device | None
) -> Attribution:
    """Attribute the losses of some chunks, by one forward and one backward pass over them."""
    runner = BlockRunner(model.runner.layers, [model.runner.batches[chunk] for chunk in chunks])
    inputs: list[list[Tensor]] = [[] for _ in range(len(runner.layers.blocks))]
    losses, upstream = [], []
    for chunk in chunks:
        *before, last = model.hidden_states(weights, chunk)
        for states, hidden in zip(inputs, before, strict=True):
            states.append(hidden)
        loss, gradient = model.kl_gradient(chunk, last)
        losses.append(loss)
        upstream.append(gradient)
    specs = [spec for spec in runner.layers.specs if spec.name in weights]

    def residual(spec: LayerSpec) -> Tensor:
        weight = weights[spec.name]
        dense = model.dense(spec.name)
        placed = weight if isinstance(weight, Tensor) else weight()
        return (dense - placed.to(dense)).to(runner.layers.device_of(spec.block))

    # Shares are estimates from a few windows; the losses themselves are those of products in float32.
    found = backward_sweep(runner, inputs, specs, upstream, device, changes=residual, rough=True)
    shares = {layer.spec.name: -layer.products / 2 for layer in found if layer.products is not None}
    return Attribution(torch.cat(losses), {spec.name: shares[spec.name] for spec in specs})
