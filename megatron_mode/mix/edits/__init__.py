"""Apply controlled edits to single documents without moving any other row."""
