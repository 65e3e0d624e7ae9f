"""Offer the verbs of `megatron-mode`, one module each."""
