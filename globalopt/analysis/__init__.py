"""Predict the loss of every option, a (rank, nonzeros) target, of every layer of a dense model.

The steps, in order: `collect` computes input Grams in a forward pass, and with them the spans (`spans`), spectra
(`curves`) and profiles (`profiles`) of layers, and output Grams in a backward pass; `grid` lists the options of a layer
and the anchors among them; `one_layer_losses` chooses the error metric of every layer; `anchors` solves every layer at
its anchors, and `solver_gap` compares the probe solver with that of the refinement; `one_layer_losses` evaluates the
smallest anchors on the model; `sensitivity` projects gradients onto what the options drop (`surfaces`), and
`predictions` puts all of it together. `layer_analysis` gives each step access to the results of earlier ones.
"""
