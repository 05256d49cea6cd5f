"""Models: load, save, identify; find their layers and walk them block by block."""
