"""Values that pass between rooms: layers, targets, budgets, metrics, decompositions, problems, results."""
