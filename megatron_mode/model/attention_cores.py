"""Attend from each token to its document up to itself, in three ways with one result.

`dense` reads an additive T x T mask in torch's scaled_dot_product_attention: CPUs. `flex` compiles
a kernel that skips blocks without a common document (FlexAttention, Dong et al., 2024): GPUs.
`flash` runs flash-attention over documents laid end to end (Dao, 2023): GPUs, bf16. A core is built
from positions once a micro-batch; every layer of the stage uses it.

T row length (S for keys), B rows, H query heads, G key/value groups, K head size, N = B*T tokens,
Q blocks of a row.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, assert_never

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

CoreName = Literal["dense", "flex", "flash"]
CPU_BLOCK_TOKENS = 256
MOST_FLEX_KERNELS = 64
FLEX_BLOCK_TOKENS = 128


class AttentionCore(Protocol):
    """Attend from all queries of a micro-batch to its keys."""

    def attend(
        self, query_TBHK: Tensor, key_TBGK: Tensor, value_TBGK: Tensor, scale: float | None
    ) -> Tensor:
        """Return attended values [T, B, H*K]; without a scale it is 1 / sqrt(K)."""


def attention_core(name: CoreName, position_BT: Tensor, dtype: torch.dtype) -> AttentionCore:
    """Build the core of a micro-batch; a position of 0 opens a document.

    The running count of zeros numbers the documents of a row.
    """
    match name:
        case "flash":
            return varlen_core(position_BT)
        case "flex":
            return FlexCore(block_mask((position_BT == 0).cumsum(dim=1)))
        case "dense":
            return DenseCore(dense_mask((position_BT == 0).cumsum(dim=1), dtype))
        case _:
            assert_never(name)


@dataclass(frozen=True)
class DenseCore:
    """Add a mask of 0 and -inf to all T x T scores."""

    mask_B1TT: Tensor

    def attend(
        self, query_TBHK: Tensor, key_TBGK: Tensor, value_TBGK: Tensor, scale: float | None
    ) -> Tensor:
        """Attend in blocks of queries on a CPU, at once on a GPU."""
        blocks = []
        for begin, end in query_blocks(query_TBHK):
            out_BHTK = scaled_dot_product_attention(
                query_TBHK[begin:end].permute(1, 2, 0, 3),
                key_TBGK[:end].permute(1, 2, 0, 3),
                value_TBGK[:end].permute(1, 2, 0, 3),
                attn_mask=self.mask_B1TT[..., begin:end, :end],
                scale=scale,
                enable_gqa=query_TBHK.shape[2] != key_TBGK.shape[2],
            )
            blocks.append(out_BHTK.permute(2, 0, 1, 3).flatten(2))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def dense_mask(document_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where a token may look and -inf elsewhere, [B, 1, T, T].

    Additive: torch would turn a boolean mask into this form again in every layer.
    """
    allowed_BTT = (document_BT.unsqueeze(2) == document_BT.unsqueeze(1)).tril_()
    mask_BTT = torch.zeros(allowed_BTT.shape, dtype=dtype, device=document_BT.device)
    return mask_BTT.masked_fill_(~allowed_BTT, float("-inf")).unsqueeze(1)


def query_blocks(query_TBHK: Tensor) -> list[tuple[int, int]]:
    """Cut the queries into blocks that see only the keys before their end.

    torch's CPU kernel computes masked-out scores too: with blocks of 256 a row of 512 takes 0.82 of
    the time; shorter blocks lose by overhead what they save. A GPU kernel gets one block.
    """
    length = query_TBHK.shape[0]
    if query_TBHK.is_cuda:
        return [(0, length)]
    return [
        (begin, min(begin + CPU_BLOCK_TOKENS, length))
        for begin in range(0, length, CPU_BLOCK_TOKENS)
    ]


@dataclass(frozen=True)
class FlexCore:
    """Compute only the blocks of scores in which a query and a key share a document."""

    block_mask: BlockMask

    def attend(
        self, query_TBHK: Tensor, key_TBGK: Tensor, value_TBGK: Tensor, scale: float | None
    ) -> Tensor:
        """Attend with torch's flex kernel, compiled on a GPU."""
        out_BHTK = flex_kernel(query_TBHK.device.type)(
            query_TBHK.permute(1, 2, 0, 3),
            key_TBGK.permute(1, 2, 0, 3),
            value_TBGK.permute(1, 2, 0, 3),
            block_mask=self.block_mask,
            scale=scale,
            enable_gqa=query_TBHK.shape[2] != key_TBGK.shape[2],
        )
        return out_BHTK.permute(2, 0, 1, 3).flatten(2)


@functools.cache
def flex_kernel(device_type: str) -> Callable[..., Tensor]:
    """Compile on a GPU; elsewhere take torch's plain form, which builds all T x T scores.

    Each shape gets a kernel of its own: with symbolic sizes the kernel of a resumed run, which
    meets the probe's short rows first, would be another one than that of the run before.
    """
    if device_type == "cuda":
        from torch._dynamo import config as dynamo  # a second that CPUs need not spend

        # Beyond this many kernels torch falls back to the plain form without a word.
        dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_FLEX_KERNELS)
        return torch.compile(flex_attention, dynamic=False)
    plain: Callable[..., Tensor] = flex_attention
    return plain


def block_mask(document_BT: Tensor) -> BlockMask:
    """List the blocks of keys that each block of queries needs, without a T x T mask.

    Document numbers never fall along a row, so two blocks share a document iff the earlier one ends
    in the document in which the later one begins, and are of one document throughout (no mask is
    applied in them) iff the earlier one begins in that in which the later one ends.
    """
    B, T = document_BT.shape
    padding_B1 = document_BT[:, -1:].expand(B, -T % FLEX_BLOCK_TOKENS)
    document_BT = torch.cat((document_BT, padding_B1), dim=1)
    first_BQ = document_BT[:, ::FLEX_BLOCK_TOKENS]
    last_BQ = document_BT[:, FLEX_BLOCK_TOKENS - 1 :: FLEX_BLOCK_TOKENS]
    shares_BQQ = (first_BQ.unsqueeze(2) == last_BQ.unsqueeze(1)).tril_(-1)
    whole_BQQ = (last_BQ.unsqueeze(2) == first_BQ.unsqueeze(1)).tril_(-1)
    if T % FLEX_BLOCK_TOKENS:  # a block that reaches beyond the row is not whole
        whole_BQQ[:, -1] = False
    diagonal_QQ = torch.eye(first_BQ.shape[1], dtype=torch.bool, device=document_BT.device)

    def allowed(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document_BT[row, query] == document_BT[row, key]) & (key <= query)

    return BlockMask.from_kv_blocks(
        *listed((shares_BQQ & ~whole_BQQ) | diagonal_QQ),
        *listed(whole_BQQ),
        BLOCK_SIZE=FLEX_BLOCK_TOKENS,
        mask_mod=allowed,
        seq_lengths=(T, T),
    )


def listed(wanted_BQQ: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many key blocks each query block wants, and their numbers, wanted ones first."""
    count_B1Q = wanted_BQQ.sum(dim=-1, dtype=torch.int32).unsqueeze(1)
    number_BQQ = wanted_BQQ.int().argsort(dim=-1, descending=True, stable=True)
    return count_B1Q, number_BQQ.int().unsqueeze(1)


@dataclass(frozen=True)
class VarlenCore:
    """Lay the documents of all rows end to end; scores exist inside a document only."""

    begin_n: Tensor
    """int32: the first token of each document among all N, then N."""
    longest_tokens: int

    def attend(
        self, query_TBHK: Tensor, key_TBGK: Tensor, value_TBGK: Tensor, scale: float | None
    ) -> Tensor:
        """Attend with flash-attention's kernel for sequences of different length."""
        flash: Any = importlib.import_module("flash_attn")
        T, B = query_TBHK.shape[:2]
        out_NHK = flash.flash_attn_varlen_func(
            query_TBHK.transpose(0, 1).flatten(0, 1),
            key_TBGK.transpose(0, 1).flatten(0, 1),
            value_TBGK.transpose(0, 1).flatten(0, 1),
            self.begin_n,
            self.begin_n,
            self.longest_tokens,
            self.longest_tokens,
            softmax_scale=scale,
            causal=True,
        )
        attended: Tensor = out_NHK.reshape(B, T, -1).transpose(0, 1)
        return attended


def varlen_core(position_BT: Tensor) -> VarlenCore:
    """Find where documents begin; a row begins one whatever its position. Waits for the device."""
    begins_BT = position_BT == 0
    begins_BT[:, 0] = True
    begin_n = begins_BT.flatten().nonzero().squeeze(1)
    begin_n = torch.cat((begin_n, begin_n.new_tensor([begins_BT.numel()])))
    return VarlenCore(begin_n.int(), int(begin_n.diff().max()))
