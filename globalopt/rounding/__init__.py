"""Rounding of decompositions to the grids in which they are stored."""
