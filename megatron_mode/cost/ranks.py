"""Work out what each rank of a layout holds and writes, from the config alone (no torch).

Nothing here asks DeepSpeed or megatron-core; the tests compare it with what they build.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_mode.config import Config
from megatron_mode.config.fields import ModelConfig
from megatron_mode.cost.topology import Layout
from megatron_mode.model.size import link_parameters

FP32_BYTES, BF16_BYTES = 4, 2
MOMENTS = 2  # AdamW's
# ZeRO pads a flat group of parameters to a multiple of this many elements a data rank.
ALIGNMENT_ELEMENTS = 2


class RankPlan(NamedTuple):
    """Say what one rank holds between two steps; activations come on top."""

    links: tuple[str, ...]
    """Names of the links of its stages, in the order of the chain."""
    parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    """AdamW's moments, and under ZeRO its fp32 copy of the weights; a share of a data rank."""
    tied_ranks: tuple[int, ...]
    """Ranks that reduce the gradient of a shared embedding with this one; none on other stages."""


def plan_rank(config: Config, layout: Layout, rank: int, *, bf16: bool) -> RankPlan:
    """Work out what a rank holds."""
    at = layout.coordinates(rank)
    links = held_links(config, layout.pipeline)[at.pipeline]
    sizes, is_tied = link_parameters(config.model, layout.tensor), config.model.tied_embeddings
    # A tied LM head uses the embedding of its own stage.
    shared = {"lm_head"} if is_tied and "embedding" in links else set()
    owned = [sizes[link] for link in links if link not in shared]
    groups = [sum(size) for size in zip(*owned, strict=True)]
    parameters = padded = sum(groups)
    optimizer_bytes = MOMENTS * FP32_BYTES * parameters
    if config.parallel.zero_stage:
        multiple = ALIGNMENT_ELEMENTS * layout.data
        padded = sum(size + -size % multiple for size in groups)
        optimizer_bytes = (1 + MOMENTS) * FP32_BYTES * padded // layout.data
    # A bf16 gradient is added to the fp32 sum as it arrives, and not kept.
    in_bf16 = (BF16_BYTES * padded, FP32_BYTES * padded)
    in_fp32 = (FP32_BYTES * padded, FP32_BYTES * parameters)
    weights_bytes, gradients_bytes = in_bf16 if bf16 else in_fp32
    along = layout.ranks_along("pipeline", rank)
    ends = (along[0], along[-1])
    # DualPipeV holds both ends of the chain on one rank, which adds up by itself.
    is_apart = len(along) > 1 and config.parallel.schedule == "1f1b"
    tied_ranks = ends if is_tied and is_apart and rank in ends else ()
    return RankPlan(links, parameters, weights_bytes, gradients_bytes, optimizer_bytes, tied_ranks)


def held_links(config: Config, pipeline: int) -> list[tuple[str, ...]]:
    """Return the links of every pipeline rank: its stage, or under DualPipeV r and 2*p - 1 - r."""
    if config.parallel.schedule == "1f1b":
        return stage_links(config.model, pipeline)
    stages = stage_links(config.model, 2 * pipeline)
    return [stages[rank] + stages[-1 - rank] for rank in range(pipeline)]


def stage_links(model: ModelConfig, pipeline: int) -> list[tuple[str, ...]]:
    """Return the links of every stage: layers evenly, one more on the first stages for the rest.

    The embedding comes before the layers of the first stage, both heads after those of the last.
    """
    least, rest = divmod(model.layers, pipeline)
    stages, begin = [], 0
    for stage in range(pipeline):
        end = begin + least + (stage < rest)
        stages.append([f"layers.{index}" for index in range(begin, end)])
        begin = end
    stages[0].insert(0, "embedding")
    stages[-1] += ["mode_head", "lm_head"]
    return [tuple(stage) for stage in stages]


def checkpoint_files(config: Config, layout: Layout, rank: int, *, bf16: bool) -> list[str]:
    """Name the files that a rank writes into a checkpoint folder.

    The first data rank writes one file a link, but none for a tied LM head, and its model state;
    under ZeRO every rank writes its share of the optimizer, else that is in the model state.
    """
    at = layout.coordinates(rank)
    chain = list(link_parameters(config.model, layout.tensor))
    model_rank = at.pipeline * layout.tensor + at.tensor
    files = []
    if at.data == 0:
        tied_head = "lm_head" if config.model.tied_embeddings else None
        files += [
            layer_file(chain.index(link), at.tensor)
            for link in held_links(config, layout.pipeline)[at.pipeline]
            if link != tied_head
        ]
        files.append(model_state_file(model_rank))
    if config.parallel.zero_stage:
        files.append(optimizer_file(at.data, model_rank, bf16=bf16))
    return files


def layer_file(link: int, tensor_part: int) -> str:
    """Name DeepSpeed's file of a link of the chain."""
    return f"layer_{link:02d}-model_{tensor_part:02d}-model_states.pt"


def model_state_file(model_rank: int) -> str:
    """Name DeepSpeed's file of what is not a parameter; model rank = stage * tensor size + part."""
    return f"mp_rank_{model_rank:02d}_model_states.pt"


def optimizer_file(data_rank: int, model_rank: int, *, bf16: bool) -> str:
    """Name DeepSpeed's file of a data rank's share of the optimizer state."""
    kind = "bf16_zero" if bf16 else "zero"
    return f"{kind}_pp_rank_{data_rank}_mp_rank_{model_rank:02d}_optim_states.pt"
