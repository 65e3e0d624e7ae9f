"""Start a run under a launcher."""
