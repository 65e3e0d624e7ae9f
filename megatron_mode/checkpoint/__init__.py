"""Save, find, check and load checkpoints."""
