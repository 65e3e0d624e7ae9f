"""Say how each weight is cut into tensor-parallel parts, derived from the modules themselves.

A part is named by its index among equal parts; nothing here knows who holds it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import Tensor, nn


class Cut(NamedTuple):
    """Cut dimension `dim` after viewing it as `blocks` equal blocks, each cut on its own."""

    dim: int
    blocks: int = 1


class Whole(NamedTuple):
    """Describe a parameter before it was cut: its full shape, and its cut (None: every part)."""

    shape: tuple[int, ...]
    cut: Cut | None


def parameter_cuts(module: nn.Module) -> dict[str, Cut]:
    """Return the cut of every sharded parameter below `module`, by parameter name.

    The fused SwiGLU matrix holds gate and up one after the other: two blocks, so that each part
    gets its own share of both. Fused QKV rows are ordered by key/value group and cut plainly.
    """
    cuts: dict[str, Cut] = {}
    for name, child in module.named_modules():
        if isinstance(child, RowParallelLinear):
            cut = Cut(dim=1)
        elif isinstance(child, ColumnParallelLinear):
            cut = Cut(dim=0, blocks=2 if name.endswith("linear_fc1") else 1)
        elif isinstance(child, VocabParallelEmbedding):
            cut = Cut(dim=0)
        else:
            continue
        cuts[f"{name}.weight" if name else "weight"] = cut
    return cuts


def take_part(full: Tensor, cut: Cut, part: int, parts: int) -> Tensor:
    """Return part `part` of `parts` of a full tensor (a copy when blocks are joined)."""
    pieces = [block.chunk(parts, dim=cut.dim)[part] for block in full.chunk(cut.blocks, cut.dim)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=cut.dim)


def join_parts(shards: list[Tensor], cut: Cut) -> Tensor:
    """Undo `take_part`: put the parts, in order, together again."""
    blocks = zip(*(shard.chunk(cut.blocks, dim=cut.dim) for shard in shards), strict=True)
    return torch.cat([piece for block in blocks for piece in block], dim=cut.dim)


def full_shape(parameter: Tensor, cut: Cut | None, parts: int) -> tuple[int, ...]:
    """Return the shape of a parameter before it was cut."""
    shape = list(parameter.shape)
    if cut is not None:
        shape[cut.dim] *= parts
    return tuple(shape)


def part_shape(whole: Whole, parts: int) -> tuple[int, ...]:
    """Return the shape of one part of a parameter; undoes `full_shape`."""
    shape = list(whole.shape)
    if whole.cut is not None:
        shape[whole.cut.dim] //= parts
    return tuple(shape)


def whole_parameters(module: nn.Module, parts: int) -> dict[str, Whole]:
    """Return what every parameter below `module`, built as one of `parts`, is a part of."""
    cuts = parameter_cuts(module)
    return {
        name: Whole(full_shape(parameter, cuts.get(name), parts), cuts.get(name))
        for name, parameter in module.named_parameters()
    }


def mark_parameters(module: nn.Module) -> None:
    """Set megatron-core's marks, which gradient norms and optimizers read.

    megatron-core sets them only when it draws the weights itself, which we do not let it do.
    """
    for name, cut in parameter_cuts(module).items():
        parameter: Any = module.get_parameter(name)
        parameter.tensor_model_parallel = True
        parameter.partition_dim = cut.dim
        parameter.partition_stride = cut.blocks
