"""Predict the loss of every option of every layer: spans, fits, sensitivities, surfaces."""
