"""Whole jobs: search, compress, families of budgets, evaluation, estimates."""
