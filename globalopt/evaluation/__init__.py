"""Quality of a model: perplexity, KL to the dense model, zero-shot tasks, samples."""
