"""Match blocks, and the whole model, to what the dense model answers."""
