"""Rewrite a checkpoint for another layout."""
