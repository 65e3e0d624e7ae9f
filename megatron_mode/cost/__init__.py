"""Compute layouts, memory and hardware limits from the config alone (no torch)."""
