"""Prepare a corpus: encode, shuffle, remove duplicates and write sources."""
