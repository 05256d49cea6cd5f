"""Fit every layer to its target, block by block."""
