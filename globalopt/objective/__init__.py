"""The loss of an allocation: the KL divergence from the dense model, for candidates made without a solver."""
