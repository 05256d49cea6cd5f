"""Compute on tensors: factorisations, projections, pruning sweeps and alternating minimisation.

Kernels take tensors and return new ones. They know no layers by name, read no files, and leave their inputs unchanged.
"""
