"""Describe linear layers of a model, by place and size, and N:M patterns of their weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from globalopt.errors import UnknownNameError, UsageError

_NUMBER = re.compile(r"(?<![^._])\d+(?![^.])")
"""A number that is a part of a module path of its own, as in `experts.7` and `expert_7`, but not in `fc1`."""


@dataclass(frozen=True)
class NM:
    """Describe an N:M pattern: of every `of` consecutive weights of a row exactly `keep` may be nonzero.

    >>> NM.parse("2:4")
    NM(keep=2, of=4)
    >>> NM(2, 4).nnz(Shape(16, 24))
    192
    """

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.of:
            raise UsageError(f"Pattern {self.keep}:{self.of} must keep at least 1 and fewer than all of its group.")

    @classmethod
    def parse(cls, text: str) -> NM | None:
        """Parse "2:4" (keep 2 of 4), or "unstructured" as None.

        Raises:
            UnknownNameError: the text is neither.
        """
        if text == "unstructured":
            return None
        keep, colon, of = text.partition(":")
        if not (colon and keep.isdecimal() and of.isdecimal()):
            raise UnknownNameError("pattern", text, ("unstructured", "2:4", "4:8", "1:4", "2:8"))
        return cls(int(keep), int(of))

    def nnz(self, layer: HasShape) -> int:
        """Count the nonzeros of a layer under this pattern.

        Raises:
            UsageError: the layer's `d_in` is no multiple of the group `of`.
        """
        if layer.d_in % self.of:
            raise UsageError(
                f"{layer.label} has d_in = {layer.d_in}; pattern {self} needs a multiple of {self.of}. "
                "Use --pattern unstructured."
            )
        return layer.numel // self.of * self.keep

    def __str__(self) -> str:
        """Write the pattern as it is parsed, "2:4"."""
        return f"{self.keep}:{self.of}"


class HasShape:
    """Give a class with the sizes `d_out` and `d_in` its counts: the base of `Shape` and of `LayerSpec`.

    Parameters, bytes and patterns depend on nothing else, so `Target` accepts either. It is no dataclass itself: its
    fields would come before the name of a `LayerSpec`.

    >>> Shape(16, 24).numel, Shape(16, 24).max_rank
    (384, 16)
    """

    d_out: int
    d_in: int

    def __post_init__(self) -> None:
        if self.d_out < 1 or self.d_in < 1:
            raise UsageError(f"{self.label} has shape {self.d_out} x {self.d_in}; both sizes must be at least 1.")

    @property
    def numel(self) -> int:
        """Weights of the dense matrix."""
        return self.d_out * self.d_in

    @property
    def max_rank(self) -> int:
        """The largest rank the matrix can have."""
        return min(self.d_out, self.d_in)

    def solve_cost(self) -> float:
        """Multiplications of the weight with a Gram on either side, to which the time of a solver is in proportion.

        >>> Shape(16, 24).solve_cost()
        15360.0
        """
        return float(self.numel * (self.d_out + self.d_in))

    @property
    def label(self) -> str:
        """The words that begin a message about it: "Layer of 4096 x 1024", or "Layer NAME" where it has a name."""
        return f"Layer of {self.d_out} x {self.d_in}"


@dataclass(frozen=True)
class Shape(HasShape):
    """Give the sizes of one linear layer whose place in a model does not matter.

    >>> from globalopt.values.budget import Target
    >>> Target(rank=2, nnz=100).params(Shape(16, 24))
    180
    """

    d_out: int
    d_in: int


@dataclass(frozen=True)
class LayerSpec(HasShape):
    """Describe one compressible linear layer: where it is in the model, and its shape.

    Args:
        name: module path in the model.
        block: index of its decoder block.
        site: input site: the name of the first layer of the block that reads the same input tensor; q, k and v share
            one.
        kind: the shortest suffix of the path that tells the layers of one block apart ("q_proj").
        d_out, d_in: shape of the weight, as in `nn.Linear`.
    Raises:
        UsageError: a size is below 1.

    >>> attention = "model.layers.3.self_attn"
    >>> spec = LayerSpec(f"{attention}.k_proj", block=3, site=f"{attention}.q_proj", kind="k_proj", d_out=128, d_in=256)
    >>> spec.numel, spec.max_rank
    (32768, 128)
    """

    name: str
    block: int
    site: str
    kind: str
    d_out: int
    d_in: int

    @property
    def label(self) -> str:
        return f"Layer {self.name}"

    def siblings(self, specs: Iterable[LayerSpec]) -> list[LayerSpec]:
        """Find the layers of the same kind and shape in the same block, such as those of other experts.

        Their paths differ in a number alone; a layer is not its own sibling.

        >>> experts = [LayerSpec(f"blocks.0.experts.{i}.up", 0, "in", f"{i}.up", 4, 4) for i in range(3)]
        >>> [spec.name for spec in experts[1].siblings(experts)]
        ['blocks.0.experts.0.up', 'blocks.0.experts.2.up']
        """

        def like(spec: LayerSpec) -> tuple[int, str, int, int]:
            return spec.block, _NUMBER.sub("*", spec.name), spec.d_out, spec.d_in

        return [spec for spec in specs if spec != self and like(spec) == like(self)]
