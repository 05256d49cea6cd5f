"""Compressed layers as parameters that can be trained without leaving their supports.

The parameters are the kept entries of `S`, the factors `U`, `V`, and the weights of norms, all in float32; the weight
of a layer is made from them anew in every forward pass. An entry outside of the support is no parameter, so that
nothing has to be masked and no step can bring it back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from globalopt.models.layers import ModelLayers
from globalopt.values.decomposition import Decomposition


class TrainableLayer:
    """`W = S + U V` (or `S + (U V) * signs`) with `S` as its nonzero values.

    The factors are balanced first, `Uᵀ U = V Vᵀ`, as steps of equal relative size should move both alike.
    """

    def __init__(self, value: Decomposition, device: torch.device) -> None:
        self.shape = value.S.shape
        self.dtype = value.S.dtype
        S = value.S.to(device, torch.float32).flatten()
        self.support = S.nonzero().squeeze(1)
        self.values = nn.Parameter(S[self.support])
        U, V = _balanced(value.U.to(device, torch.float32), value.V.to(device, torch.float32))
        self.U, self.V = nn.Parameter(U), nn.Parameter(V)
        self.signs = None if value.signs is None else value.signs.to(device)

    def parameters(self) -> list[nn.Parameter]:
        return [part for part in (self.values, self.U, self.V) if part.numel()]

    def weight(self) -> Tensor:
        """(d_out, d_in), differentiable in the parameters."""
        S = self.values.new_zeros(self.shape.numel()).scatter(0, self.support, self.values).view(self.shape)
        if not self.U.numel():
            return S
        L = self.U @ self.V
        return S + (L if self.signs is None else L * self.signs)

    @torch.no_grad()
    def value(self) -> Decomposition:
        """The decomposition as it now is, in the dtype it came in."""
        S = self.values.new_zeros(self.shape.numel()).scatter(0, self.support, self.values).view(self.shape)
        U, V = self.U.detach(), self.V.detach()
        signs = None if self.signs is None else self.signs.cpu()
        S, U, V = (part.to("cpu", self.dtype, copy=True) for part in (S, U, V))
        return Decomposition(S, U, V, signs)


class Trainable:
    """Some layers of a model, and norms, as parameters to train."""

    def __init__(self, layers: ModelLayers, values: Mapping[str, Decomposition], roots: Iterable[str]) -> None:
        """
        Args:
            values: by layer.
            roots: module paths; the norms below them are trained too.
        """
        self._model = layers.model
        self._layers = layers
        self.layers = {name: TrainableLayer(value, layers.module(name).weight.device) for name, value in values.items()}
        self.norms = {
            name: nn.Parameter(parameter.detach().float().clone())
            for root in roots
            for name, parameter in norm_parameters(layers.model, root)
        }

    def parameters(self) -> list[nn.Parameter]:
        return [part for layer in self.layers.values() for part in layer.parameters()] + list(self.norms.values())

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """What the model computes with, by parameter name below `prefix`, in the model's own dtypes."""
        made = {f"{name}.weight": self._layers.oriented(name, layer.weight()) for name, layer in self.layers.items()}
        made.update(self.norms)
        return {
            name.removeprefix(prefix): tensor.to(self._model.get_parameter(name).dtype)
            for name, tensor in made.items()
            if name.startswith(prefix)
        }

    def values(self) -> dict[str, Decomposition]:
        return {name: layer.value() for name, layer in self.layers.items()}

    def norm_values(self) -> dict[str, Tensor]:
        """Weights of the norms by parameter name, in the model's dtypes."""
        return {
            name: norm.detach().to("cpu", self._model.get_parameter(name).dtype, copy=True)
            for name, norm in self.norms.items()
        }

    @torch.no_grad()
    def state(self) -> list[Tensor]:
        """Copies of all parameters."""
        return [parameter.detach().clone() for parameter in self.parameters()]

    @torch.no_grad()
    def restore(self, state: Sequence[Tensor]) -> None:
        for parameter, kept in zip(self.parameters(), state, strict=True):
            parameter.copy_(kept)


def norm_parameters(model: nn.Module, root: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of the normalisations at or below module `root`, by name in the model."""
    for path, module in model.get_submodule(root).named_modules():
        if "norm" in type(module).__name__.lower():
            for name, parameter in module.named_parameters(recurse=False):
                yield ".".join(part for part in (root, path, name) if part), parameter


def _balanced(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    if not U.numel():
        return U, V
    Qu, Ru = torch.linalg.qr(U.double())
    Qv, Rv = torch.linalg.qr(V.double().mT)
    P, s, Qh = torch.linalg.svd(Ru @ Rv.mT)
    root = s.sqrt()
    return ((Qu @ P) * root).float(), (root[:, None] * (Qh @ Qv.mT)).float()
