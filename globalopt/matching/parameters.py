"""Parametrise compressed layers so that training cannot leave their supports.

The parameters are the kept entries of `S`, the factors `U`, `V`, and the weights and biases of norms, all in float32;
the weight of a layer is made from them anew in every forward pass. An entry outside of the support is no parameter, so
that nothing has to be masked and no step can bring it back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from globalopt.kernels.grid import never_zero
from globalopt.kernels.low_rank import balanced
from globalopt.kernels.straight_through import scales_of, straight_levels
from globalopt.models.layers import ModelLayers
from globalopt.values.decomposition import Decomposition
from globalopt.values.storage import GROUP, Scales

ON_GRID = 0.5
"""Steps of numbers on grids, and of logarithms of their scales, as a share of those of other numbers.

On two blocks of the bundled model in 4/8 and 3/8 bits, half the rate left .74 to .83 of the held-out loss, the whole
rate .76 to .86.
"""


class TrainableLayer:
    """Parametrise `W = S + U V`, or `S + (U V) * signs`, by the nonzero values of `S` and the factors.

    Factors in 16 bits are balanced first, `Uᵀ U = V Vᵀ`, so that steps of equal relative size move both alike. Numbers
    that lie on grids are rounded to them in every forward pass, and the logarithms of their scales are parameters too
    (`kernels.straight_through`): weights, and the losses computed with them, are always those that can be stored.

    Args:
        value: the decomposition to start from, in any dtype.
        device: of the parameters.

    >>> S, U, V = torch.eye(2), torch.tensor([[9.0], [0.0]]), torch.tensor([[1.0, 0.0]])
    >>> layer = TrainableLayer(Decomposition(S, U, V), torch.device("cpu"))
    >>> layer.values.tolist(), [round(x, 3) for x in layer.U.abs().flatten().tolist()]
    ([1.0, 1.0], [3.0, 0.0])
    >>> layer.weight().round(decimals=3).tolist()
    [[10.0, 0.0], [0.0, 1.0]]
    """

    def __init__(self, value: Decomposition, device: torch.device) -> None:
        self.shape = value.S.shape
        self.dtype = value.S.dtype
        S = value.S.to(device, torch.float32).flatten()
        self.support = S.nonzero().squeeze(1)
        values = S[self.support]
        U, V = value.U.to(device, torch.float32), value.V.to(device, torch.float32)
        scales = value.scales
        self.storage = value.storage
        self.of_values = _Grid.of(None if scales is None else scales.S, self.storage.values, device)
        self.of_U = _Grid.of(None if scales is None else scales.U, self.storage.factors, device)
        self.of_V = _Grid.of(None if scales is None else scales.V, self.storage.factors, device)
        if self.of_U is None and self.of_V is None:
            U, V = balanced(U, V)
        self.values, self.U, self.V = nn.Parameter(values), nn.Parameter(U), nn.Parameter(V)
        self.signs = None if value.signs is None else value.signs.to(device)

    def parameters(self) -> list[nn.Parameter]:
        """List the values, `U` and `V`, without empty ones, then the logarithms of their scales."""
        numbers = [part for part in (self.values, self.U, self.V) if part.numel()]
        return numbers + [grid.log_scales for grid in (self.of_values, self.of_U, self.of_V) if grid is not None]

    def units(self) -> list[float]:
        """Compute the unit of the steps of every parameter, in the order of `parameters`.

        Of numbers it is their root mean square, of logarithms of scales 1; for both `ON_GRID` of that on grids.
        """
        grids = {id(self.values): self.of_values, id(self.U): self.of_U, id(self.V): self.of_V}
        scales = {id(grid.log_scales) for grid in grids.values() if grid is not None}
        found = []
        for part in self.parameters():
            share = ON_GRID if id(part) in scales or grids.get(id(part)) is not None else 1.0
            found.append(share * (1.0 if id(part) in scales else _root_mean_square(part)))
        return found

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Compute `S`, `U` and `V` as they are stored but for their dtype, differentiable in the parameters."""
        values = self.values if self.of_values is None else self.of_values.levels(self.values)
        U = self.U if self.of_U is None else self.of_U.levels(self.U.mT.flatten()).view(self.U.mT.shape).mT
        V = self.V if self.of_V is None else self.of_V.levels(self.V.flatten()).view(self.V.shape)
        return self.values.new_zeros(self.shape.numel()).scatter(0, self.support, values).view(self.shape), U, V

    def weight(self) -> Tensor:
        """Compute the weight (d_out, d_in), differentiable in the parameters."""
        S, U, V = self.parts()
        if not U.numel():
            return S
        L = U @ V
        return S + (L if self.signs is None else L * self.signs)

    @torch.no_grad()
    def value(self) -> Decomposition:
        """Return the current decomposition on the CPU, in the dtype of the one it was made from."""
        exact, U, V = self.parts()
        S, U, V = (part.to("cpu", self.dtype, copy=True) for part in (exact, U, V))
        signs = None if self.signs is None else self.signs.cpu()
        if self.storage.plain:
            return Decomposition(S, U, V, signs)
        grids = (self.of_values, self.of_U, self.of_V)
        scales = Scales(self.storage, *(None if grid is None else grid.scales().cpu() for grid in grids))
        return Decomposition(never_zero(S, exact.cpu()), U, V, signs, scales)


@dataclass(frozen=True, eq=False)
class _Grid:
    """Hold the grids of some numbers: the logarithms of their scales, which are trained, their kinds, and the bits."""

    log_scales: nn.Parameter
    mid_tread: Tensor
    bits: int

    @classmethod
    def of(cls, scales: Tensor | None, bits: int, device: torch.device) -> _Grid | None:
        """Make the grids of `scales`; None where there are none."""
        if scales is None or not scales.numel():
            return None
        placed = scales.to(device, torch.float32)
        return cls(nn.Parameter(placed.abs().log()), placed < 0, bits)

    def levels(self, numbers: Tensor) -> Tensor:
        """Round numbers (n,) to their levels."""
        return straight_levels(numbers, self.log_scales, self.bits, GROUP, self.mid_tread)

    def scales(self) -> Tensor:
        """Compute the scales as they are stored."""
        sizes = scales_of(self.log_scales.detach())
        return torch.where(self.mid_tread, -sizes, sizes)


class Trainable:
    """Parametrise some layers of a model, and the norms beside them.

    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama())
    >>> W = layers.weight("model.layers.0.mlp.up_proj")
    >>> kept = {"model.layers.0.mlp.up_proj": Decomposition(W * (W > 0), W[:, :0], W[:0])}
    >>> trainable = Trainable(layers, kept, ["model.layers.0"])
    >>> list(trainable.norms)
    ['model.layers.0.input_layernorm.weight', 'model.layers.0.post_attention_layernorm.weight']
    >>> [round(unit, 3) for unit in trainable.units()[-2:]]
    [1.0, 1.0]
    """

    def __init__(self, layers: ModelLayers, values: Mapping[str, Decomposition], roots: Iterable[str]) -> None:
        """Make the parameters.

        Args:
            values: decompositions of the layers, by name.
            roots: module paths; the norms at or below them are trained too.
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
        """List the parameters of all layers, then those of the norms."""
        return [part for layer in self.layers.values() for part in layer.parameters()] + list(self.norms.values())

    @torch.no_grad()
    def units(self) -> list[float]:
        """Compute the unit of the steps of every parameter: its root mean square, in the order of `parameters`.

        A parameter of a norm `y = w x + b` that is zero everywhere, such as the bias of a LayerNorm that was never
        trained, has no size of its own and would never move. It gets the largest unit among the parameters of its norm:
        `x` has a root mean square of 1, so that a step of `b` in units of `w` changes `y` as much as the same step of
        `w`. Where all of them are zero the unit is 1, the size of `x`. Values of `S` are never zero, and factors that
        are zero have no gradient.
        """
        norms = {name: _root_mean_square(norm) for name, norm in self.norms.items()}
        of_norm: dict[str, float] = {}
        for name, unit in norms.items():
            module = name.rpartition(".")[0]
            of_norm[module] = max(unit, of_norm.get(module, 0.0))
        parts = [unit for layer in self.layers.values() for unit in layer.units()]
        return parts + [unit or of_norm[name.rpartition(".")[0]] or 1.0 for name, unit in norms.items()]

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Compute the model's parameters from the trained ones, by name below `prefix`, in the model's dtypes."""
        made = {f"{name}.weight": self._layers.oriented(name, layer.weight()) for name, layer in self.layers.items()}
        made.update(self.norms)
        return {
            name.removeprefix(prefix): tensor.to(self._model.get_parameter(name).dtype)
            for name, tensor in made.items()
            if name.startswith(prefix)
        }

    def values(self) -> dict[str, Decomposition]:
        """Return the current decompositions of the layers, by name."""
        return {name: layer.value() for name, layer in self.layers.items()}

    def norm_values(self) -> dict[str, Tensor]:
        """Return the current parameters of the norms on the CPU, by name, in the model's dtypes."""
        return {
            name: norm.detach().to("cpu", self._model.get_parameter(name).dtype, copy=True)
            for name, norm in self.norms.items()
        }

    @torch.no_grad()
    def state(self) -> list[Tensor]:
        """Copy all parameters, in the order of `parameters`."""
        return [parameter.detach().clone() for parameter in self.parameters()]

    @torch.no_grad()
    def restore(self, state: Sequence[Tensor]) -> None:
        """Set all parameters to a copy that `state` made."""
        for parameter, kept in zip(self.parameters(), state, strict=True):
            parameter.copy_(kept)


def norm_parameters(model: nn.Module, root: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Find the parameters of the norms at or below module `root`, by their names in the model.

    A norm is a module whose class has "norm" in its name.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> [name for name, _ in norm_parameters(tiny_llama(blocks=1), "")]
    ['model.layers.0.input_layernorm.weight', 'model.layers.0.post_attention_layernorm.weight', 'model.norm.weight']
    """
    for path, module in model.get_submodule(root).named_modules():
        if "norm" in type(module).__name__.lower():
            for name, parameter in module.named_parameters(recurse=False):
                yield ".".join(part for part in (root, path, name) if part), parameter


def _root_mean_square(parameter: Tensor) -> float:
    """Compute the root mean square of a parameter."""
    return float(parameter.detach().square().mean().sqrt())
