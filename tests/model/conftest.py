"""Build small decoders for the tests of the model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mode.config.fields import ModelConfig

# The loops that attention is judged by stand beside its tests.
sys.path.insert(0, str(Path(__file__).parent))


def model_config(**changes: Any) -> ModelConfig:
    fields = {
        "name": "test",
        "layers": 2,
        "hidden_size": 48,
        "ffn_hidden_size": 40,
        "attention_heads": 6,
        "kv_heads": 2,
        "seq_len": 32,
        "vocab_size": 256,
    }
    return ModelConfig.model_validate(fields | changes)


def build_decoder(model: ModelConfig, seed: int | None = 0) -> torch.nn.Module:
    """Return a decoder in fp32; without a seed its weights are left as they are."""
    from megatron_mode.model.decoder import Decoder
    from megatron_mode.model.init import initialise
    from megatron_mode.model.layers import transformer_config

    decoder = Decoder(model, transformer_config(model, 1, torch.float32))
    if seed is not None:
        initialise(decoder.named_links(), model, seed)
    return decoder


@pytest.fixture(name="model_config")
def _model_config() -> Any:
    return model_config


@pytest.fixture(name="build_decoder")
def _build_decoder(alone: None) -> Any:
    return build_decoder
