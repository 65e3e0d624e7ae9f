"""Read documents from files of any supported format."""
