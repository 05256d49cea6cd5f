"""Load, save and identify models, find their compressible layers, and walk them block by block."""
