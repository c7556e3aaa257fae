"""Validation loss of small byte-level LLaMAs trained from scratch: every method at its own best learning rate."""
