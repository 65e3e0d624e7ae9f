"""Turn hidden states into the LM loss and the mode loss of the global batch."""
