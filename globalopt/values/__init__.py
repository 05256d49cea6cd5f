"""Define the values that pass between packages: layers, targets, budgets, metrics, decompositions, problems, results.

All are frozen dataclasses that check themselves when they are made; none reads a model, a file or the clock.
"""
