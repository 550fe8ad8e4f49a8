"""bgray: sweeps you can trust for audio models."""
