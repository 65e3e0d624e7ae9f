"""Turn the decoder's chain into a DeepSpeed PipelineModule, the only one, for either schedule.

    1F1B, three stages:

      (input_BT, position_BT)                                                  loss
                | in                                                            ^
         +------v-------+   packed   +--------------+   packed   +--------------+------+
         | embedding    | ---------> | layers       | ---------> | layers, mode head,  |
         | layers       | <--------- |              | <--------- | LM head; StepLoss   |
         +--------------+  gradient  +--------------+  gradient  +---------------------+
         first: reads rows                                       last: reads labels, keeps outputs

    DualPipeV: rank r holds stages r and 2p - 1 - r, so rank 0 is the first and the last.

One packed tensor travels between stages: hidden states with the positions written behind them as
base-256 digits, which are exact in bf16. Rotary tables and attention masks follow from positions
alone, so every stage builds its own. Under sequence parallelism a rank's T/p hidden states carry
the positions of all T tokens, p of them each.

T row length, B rows, D hidden size, p tensor ranks, or 1 without sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
import torch.distributed as dist
from deepspeed.pipe import DualPipeVModule, LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mode.config.fields import ModelConfig
from megatron_mode.cost.topology import Layout
from megatron_mode.model.decoder import Link, context_builder, decoder_links
from megatron_mode.model.layers import transformer_config
from megatron_mode.model.sharding import Whole, whole_parameters

POSITION_DIGITS = 3
DIGIT_BASE = 256


def pack(hidden_TBD: Tensor, position_BT: Tensor) -> Tensor:
    """Append the positions' base-256 digits to hidden states [T/p, B, D]: [T/p, B, D + 3p]."""
    length, rows, _ = hidden_TBD.shape
    rest_TBX = position_BT.t().reshape(-1, length, rows).permute(1, 2, 0)
    digits = []
    for _ in range(POSITION_DIGITS):
        digits.append(rest_TBX % DIGIT_BASE)
        rest_TBX = rest_TBX // DIGIT_BASE
    return torch.cat((hidden_TBD, torch.cat(digits, dim=-1).to(hidden_TBD.dtype)), dim=-1)


def unpack(packed_TBX: Tensor, parts: int = 1) -> tuple[Tensor, Tensor]:
    """Undo `pack` for p = `parts`: hidden states [T/p, B, D] and int64 positions [B, T]."""
    hidden_TBD = packed_TBX[..., : -POSITION_DIGITS * parts]
    digits_TBX = packed_TBX[..., -POSITION_DIGITS * parts :].detach().long()
    scale_X = DIGIT_BASE ** torch.arange(POSITION_DIGITS, device=packed_TBX.device)
    digits_TBXp = digits_TBX.view(*digits_TBX.shape[:-1], POSITION_DIGITS, parts)
    position_TBp = (digits_TBXp * scale_X.unsqueeze(-1)).sum(dim=-2)
    return hidden_TBD, position_TBp.permute(1, 2, 0).flatten(1)


class ModePipeline(PipelineModule):
    """Hold one stage of the chain."""

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        layout: Layout,
        loss_fn: Callable[..., Tensor],
    ) -> None:
        self.links = decoder_links(model, config)
        self.context = context_builder(model, config)
        self.sequence_parts = layout.tensor if config.sequence_parallel else 1
        super().__init__(
            layers=[layer_spec(link, model.tied_embeddings) for link in self.links],
            topology=PipeModelDataParallelTopology(
                num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data
            ),
            loss_fn=loss_fn,
            partition_method="type:DecoderLayer",
            checkpointable_layers=["DecoderLayer"],
        )

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the stage, as DeepSpeed does when it is built; weights that are only shapes stay."""
        if any(parameter.is_meta for parameter in self.parameters()):
            return self
        moved: Self = super().to(*args, **kwargs)
        return moved

    def named_links(self) -> list[tuple[str, nn.Module]]:
        """Return (global name, module) of this stage's links that hold parameters.

        A tied link on the last stage goes by the name of the link that it shares.
        """
        found: dict[str, nn.Module] = {}
        for index, module in self.local_links():
            link = self.links[index]
            if link.shares is not None:
                module = self.tied_modules[link.shares]
            found.setdefault(link.shares or link.name, module)
        return list(found.items())

    def local_links(self) -> Iterator[tuple[int, Any]]:
        """Give (index in the chain, module or function) of what this rank holds."""
        return enumerate(self.forward_funcs, start=self._local_start)

    def forward(self, forward_input: Any) -> Any:
        """Run the stage: (input_BT, position_BT) or a packed tensor in, packed or heads out."""
        packed = isinstance(forward_input, Tensor)
        parts = self.sequence_parts
        state_B, position_BT = unpack(forward_input, parts) if packed else forward_input
        state = super().forward((state_B, *self.context(position_BT)))
        last = self._local_stop == len(self.links)
        return state if last else pack(state[0], position_BT)

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
        """List the weights whose gradients DeepSpeed sums over a group before the data ranks'.

        Tied weights by DeepSpeed's own rule; under sequence parallelism also those that saw only
        this rank's tokens, which DeepSpeed would leave as they are.
        """
        group = parallel_state.get_tensor_model_parallel_group()
        partial = [w for w in self.parameters() if getattr(w, "sequence_parallel", False)]
        return [*super().get_tied_weights_and_groups(), *((weight, group) for weight in partial)]


class DualPipeVPipeline(ModePipeline, DualPipeVModule):
    """Hold stages r and 2*p - 1 - r of 2*p on rank r of p, the first of them active at a time.

    Micro-batches run to the last rank and back: rank 0 reads the data and computes the loss.
    """

    def local_links(self) -> Iterator[tuple[int, Any]]:
        """Give the links of both stages."""
        for (start, _), functions in zip(self.phase_bounds, self.phase_funcs, strict=True):
            yield from enumerate(functions, start=start)


PIPELINES = {"1f1b": ModePipeline, "dualpipev": DualPipeVPipeline}


def layer_spec(link: Link, tied: bool) -> LayerSpec:
    """Return DeepSpeed's description of a link; a link that is shared becomes a TiedLayerSpec."""
    if link.shares is None and not (tied and link.name == "embedding"):
        return LayerSpec(link.build, *link.args)
    return TiedLayerSpec(
        link.shares or link.name,
        link.build,
        *link.args,
        forward_fn=link.shared_forward,
        tied_weight_attr=["word.weight"],
    )


def checkpoint_parameters(model: ModelConfig, tensor: int) -> dict[str, Whole]:
    """Return every parameter by its name in DeepSpeed's checkpoints, in the chain's order.

    `tensor` is the size of the tensor-parallel group that this process is in. The names carry the
    link's place in the chain and a tied link's key, so they are the same for every layout and
    schedule. Asked of the modules themselves, built without memory on the meta device: a parameter
    that is added, moved or cut otherwise is known here at once.
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
            parameters = whole_parameters(link.build(*link.args), tensor)
            found |= {f"{prefix}.{name}": whole for name, whole in parameters.items()}
    return found
