"""Describe linear layers of a model, by place and size, and N:M patterns of their weights."""

from __future__ import annotations

from dataclasses import dataclass

from globalopt.errors import UnknownNameError, UsageError


@dataclass(frozen=True)
class NM:
    """Describe an N:M pattern: of every `of` consecutive weights of a row, `keep` may be nonzero.

    Raises:
        UsageError: not 0 < `keep` < `of`.

    >>> pattern = NM.parse("2:4")
    >>> pattern.keep, pattern.of
    (2, 4)
    >>> pattern.nnz(LayerSpec("q_proj", 0, "q_proj", "q_proj", d_out=8, d_in=8))
    32
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

    def nnz(self, spec: LayerSpec) -> int:
        """Count the nonzeros of a layer under this pattern.

        Raises:
            UsageError: the layer's `d_in` is no multiple of the group `of`.
        """
        if spec.d_in % self.of:
            raise UsageError(
                f"Pattern {self} needs d_in to be a multiple of {self.of}; layer {spec.name} has d_in = {spec.d_in}. "
                "Use --pattern unstructured."
            )
        return spec.numel // self.of * self.keep

    def __str__(self) -> str:
        """Write the pattern as it is parsed, "2:4"."""
        return f"{self.keep}:{self.of}"


@dataclass(frozen=True)
class LayerSpec:
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

    def __post_init__(self) -> None:
        if self.d_out < 1 or self.d_in < 1:
            raise UsageError(f"Layer {self.name} has shape {self.d_out} x {self.d_in}; both sizes must be at least 1.")

    @property
    def numel(self) -> int:
        """Count the weights, `d_out d_in`."""
        return self.d_out * self.d_in

    @property
    def max_rank(self) -> int:
        """Return the largest possible rank, `min(d_out, d_in)`."""
        return min(self.d_out, self.d_in)
