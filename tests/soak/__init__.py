"""The soak: a long capture under every trouble at once, then training; run by hand as `make soak`."""
