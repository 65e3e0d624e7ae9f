"""Write and read prepared sources."""
