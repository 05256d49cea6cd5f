"""Budget files: read, write, compare, convert."""
