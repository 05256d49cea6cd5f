"""Memory and clock of the machine a run is on."""
