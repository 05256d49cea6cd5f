"""Layers of a model: where a linear layer is, how large it is, and N:M patterns of its weights."""

from __future__ import annotations

from dataclasses import dataclass

from globalopt.errors import UnknownNameError, UsageError


@dataclass(frozen=True)
class NM:
    """An N:M pattern: of every `of` consecutive weights of a row exactly `keep` may be nonzero."""

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.of:
            raise UsageError(f"Pattern {self.keep}:{self.of} must keep at least 1 and fewer than all of its group.")

    @classmethod
    def parse(cls, text: str) -> NM | None:
        """Read "2:4" (keep 2 of 4) or "unstructured" (None)."""
        if text == "unstructured":
            return None
        keep, colon, of = text.partition(":")
        if not (colon and keep.isdecimal() and of.isdecimal()):
            raise UnknownNameError("pattern", text, ("unstructured", "2:4", "4:8", "1:4", "2:8"))
        return cls(int(keep), int(of))

    def nnz(self, spec: LayerSpec) -> int:
        """Nonzeros of a layer under this pattern; `UsageError` where `d_in` is no multiple of the group."""
        if spec.d_in % self.of:
            raise UsageError(
                f"Pattern {self} needs d_in to be a multiple of {self.of}; layer {spec.name} has d_in = {spec.d_in}. "
                "Use --pattern unstructured."
            )
        return spec.numel // self.of * self.keep

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"


@dataclass(frozen=True)
class LayerSpec:
    """One compressible linear layer: where it is and how large.

    `name` is the module path; `site` names the input tensor it shares with other layers; `kind` is the shortest
    name that tells the layers of one block apart ("q_proj").
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
        return self.d_out * self.d_in

    @property
    def max_rank(self) -> int:
        return min(self.d_out, self.d_in)
