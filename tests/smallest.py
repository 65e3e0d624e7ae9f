"""Describe the smallest model, for tests that need a valid config and no model."""

MODEL = {
    "name": "t",
    "layers": 1,
    "hidden_size": 8,
    "ffn_hidden_size": 8,
    "attention_heads": 1,
    "kv_heads": 1,
    "seq_len": 16,
}
