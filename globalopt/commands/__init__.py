"""The commands of the program, one file each, and the modules that they share."""
