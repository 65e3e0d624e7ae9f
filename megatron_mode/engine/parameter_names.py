"""Say what every parameter of a model is called in DeepSpeed's checkpoints, and how it is cut.

Asked of the modules themselves, built without memory on the meta device from the links that stages
are built from: a parameter that is added, moved or cut otherwise is known here at once.
"""

from __future__ import annotations

import torch
from deepspeed.pipe import TiedLayerSpec

from megatron_mode.config.fields import ModelConfig
from megatron_mode.engine.pipeline import layer_spec
from megatron_mode.model.decoder import decoder_links
from megatron_mode.model.layers import transformer_config
from megatron_mode.model.sharding import Whole, whole_parameters


def checkpoint_parameters(model: ModelConfig, tensor: int) -> dict[str, Whole]:
    """Return every parameter of the chain by its name in checkpoints, in the chain's order.

    `tensor` is the size of the tensor-parallel group that this process is in. The names carry the
    link's place in the whole chain and a tied link's key, so they are the same for every layout
    and pipeline schedule.
    """
    core = transformer_config(model, tensor, torch.float32)
    core.use_cpu_initialization = True  # megatron-core names no device then: meta is taken
    found: dict[str, Whole] = {}
    with torch.device("meta"):
        for index, link in enumerate(decoder_links(model, core)):
            if link.shares is not None:
                continue
            spec = layer_spec(link, model.tied_embeddings)
            tied = isinstance(spec, TiedLayerSpec)
            prefix = f"tied_modules.{spec.key}" if tied else str(index)
            module = link.build(*link.args)
            found |= {
                f"{prefix}.{name}": whole
                for name, whole in whole_parameters(module, tensor).items()
            }
    return found
