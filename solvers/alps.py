"""ALPS: a support found by ADMM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from globalopt.protocols import Outputs
from solvers.three_basil import ThreeBASiL


@dataclass(frozen=True)
class ALPS(ThreeBASiL):
    """`min tr(A (W - S) G (W - S)ᵀ)` by the search of `ThreeBASiL` at rank 0 (Meng et al. 2024, arXiv:2406.07831).

    Damping and metric are as published. Departures: those of `ThreeBASiL`, whose options are described there.
    """

    damping: float = 0.01
    diagonal_damping: float = 0.0
    outputs: Outputs = Outputs.NONE

    name: ClassVar[str] = "alps"
    paper: ClassVar[str] = "arXiv:2406.07831"
    low_rank: ClassVar[bool] = False
