"""Token embedding and head in few bits: find them, round them, and put the rounded ones into the model."""
