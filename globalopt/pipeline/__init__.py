"""Run whole jobs on a model: search, compress, families of budgets, evaluation and estimates of what they take.

The steps of a search, in order: `options` checks what the user typed and `plan` resolves it into solver, allocator and
budget; `session` (or `live`, for a model in memory) loads the model and cuts the text; `addresses` names the artefact
folder of every stage, and `reuse` opens the run and finds artefacts of earlier runs there; `analyse` predicts the loss
of every option of every layer; `problem` poses the allocation of the budget, and `search` solves it; `finish` refines,
matches, saves and evaluates. `compress` starts from a budget file instead, and `family` stops at allocations. Beside
these, `score` evaluates saved models, `dry_run` estimates memory and time (with the timings of `timing`), and `doctor`
examines the installation.
"""
