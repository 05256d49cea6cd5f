"""The true loss of an allocation: KL to the dense model, for candidates made without new fits."""
