"""Predict the loss of every option, a (rank, nonzeros) target, of every layer of a dense model, and correct it.

The steps, in order: `collect` computes input Grams in a forward pass and output Grams in a backward pass
(`sensitivity`), and with them the spans (`spans`), spectra (`curves`) and profiles (`profiles`) of layers; `grid` lists
the options of a layer and the anchors among them; `anchors` solves every layer at its anchors, `metric_choices` chooses
the error metric of layers whose loss contradicts its prediction, and `solver_gap` compares the probe solver with that
of the refinement; `predictions` makes error surfaces of all of it (`surfaces`). `attribution` measures the share of
every layer in the loss of a compressed model, and `corrections` corrects the surfaces by it. `layer_analysis` gives
each step access to the results of earlier ones.
"""
