"""Trust: tests, on the very model at hand, of what everything else relies on."""
