"""Load, save and identify models, find their compressible layers, and walk them block by block.

`loading` loads a model: `location` tells where it is, `config`, `tokenizer` and `weights` read its parts, `structure`
makes one without weights, `streaming` reads blocks when they are needed, and `device` chooses where and in which type
it computes. `gguf` and `quantised` make ordinary checkpoints of others, and `refusals` refuses what cannot be read.
`decoder` finds the blocks of a model and `finding` their linear layers, whose weights `layers` reads and replaces;
`coverage` counts how much of the model they are. `walk` visits the blocks in order, by a `block_runner`, for texts in
a `batch` each.
"""
