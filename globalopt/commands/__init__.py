"""One file per command of the program, and what they share."""
