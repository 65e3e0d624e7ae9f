"""Build the decoder: embedding, megatron-core layers, final norm, LM head and mode head."""
