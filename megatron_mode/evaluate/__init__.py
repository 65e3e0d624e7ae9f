"""Evaluate a model on held-out sources and score passages."""
