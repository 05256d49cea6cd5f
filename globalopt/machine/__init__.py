"""Measure the time and memory of a run, and keep tensors in files where memory is short."""
