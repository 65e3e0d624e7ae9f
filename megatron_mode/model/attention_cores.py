"""Attend from each token to its document up to itself, in three ways with one result.

`dense` reads an additive T x T mask in torch's scaled_dot_product_attention: CPUs. `flex` compiles
a kernel that skips blocks without a common document (FlexAttention, Dong et al., 2024): GPUs.
`flash` runs flash-attention over documents laid end to end (Dao, 2023): GPUs, bf16.

T row length (S for keys), B rows, H query heads, G key/value groups, K head size, N = B*T tokens,
Q blocks of a row.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal, assert_never

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

CoreName = Literal["dense", "flex", "flash"]
AttentionCore = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]
"""Attend: queries [T, B, H, K], keys and values [T, B, G, K], scale (None: 1 / sqrt(K)) to
attended values [T, B, H*K]. Built from positions once a micro-batch; every layer uses it."""
CPU_BLOCK_TOKENS = 256
MOST_FLEX_KERNELS = 64
FLEX_BLOCK_TOKENS = 128


def attention_core(name: CoreName, position_BT: Tensor, dtype: torch.dtype) -> AttentionCore:
    """Build the core of a micro-batch; a position of 0 opens a document.

    The running count of zeros numbers the documents of a row.
    """
    match name:
        case "flash":
            return functools.partial(attend_packed, *packed_documents(position_BT))
        case "flex":
            return functools.partial(attend_blocks, block_mask((position_BT == 0).cumsum(dim=1)))
        case "dense":
            mask_B1TT = dense_mask((position_BT == 0).cumsum(dim=1), dtype)
            return functools.partial(attend_masked, mask_B1TT)
        case _:
            assert_never(name)


def attend_masked(
    mask_B1TT: Tensor, query_TBHK: Tensor, key_TBGK: Tensor, value_TBGK: Tensor, scale: float | None
) -> Tensor:
    """Add a mask of 0 and -inf to the scores, in blocks of queries on a CPU.

    torch's CPU kernel computes masked-out scores too: with blocks of 256, which see only the keys
    before their end, a row of 512 takes 0.82 of the time; shorter blocks lose by overhead what they
    save. A GPU kernel gets one block.
    """
    length = query_TBHK.shape[0]
    blocks = []
    for begin in range(0, length, length if query_TBHK.is_cuda else CPU_BLOCK_TOKENS):
        end = length if query_TBHK.is_cuda else min(begin + CPU_BLOCK_TOKENS, length)
        out_BHTK = scaled_dot_product_attention(
            query_TBHK[begin:end].permute(1, 2, 0, 3),
            key_TBGK[:end].permute(1, 2, 0, 3),
            value_TBGK[:end].permute(1, 2, 0, 3),
            attn_mask=mask_B1TT[..., begin:end, :end],
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


def attend_blocks(
    mask: BlockMask, query_TBHK: Tensor, key_TBGK: Tensor, value_TBGK: Tensor, scale: float | None
) -> Tensor:
    """Compute only the blocks of scores in which a query and a key share a document."""
    out_BHTK = flex_kernel(query_TBHK.device.type)(
        query_TBHK.permute(1, 2, 0, 3),
        key_TBGK.permute(1, 2, 0, 3),
        value_TBGK.permute(1, 2, 0, 3),
        block_mask=mask,
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
    kernel: Callable[..., Tensor] = flex_attention
    if device_type == "cuda":
        from torch._dynamo import config as dynamo  # a second that CPUs need not spend

        # Beyond this many kernels torch falls back to the plain form without a word.
        dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_FLEX_KERNELS)
        kernel = torch.compile(flex_attention, dynamic=False)
    return kernel


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
    full_BQQ = (last_BQ.unsqueeze(2) == first_BQ.unsqueeze(1)).tril_(-1)
    if T % FLEX_BLOCK_TOKENS:  # a block that reaches beyond the row is not full
        full_BQQ[:, -1] = False
    diagonal_QQ = torch.eye(first_BQ.shape[1], dtype=torch.bool, device=document_BT.device)

    def allowed(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document_BT[row, query] == document_BT[row, key]) & (key <= query)

    return BlockMask.from_kv_blocks(
        *listed((shares_BQQ & ~full_BQQ) | diagonal_QQ),
        *listed(full_BQQ),
        BLOCK_SIZE=FLEX_BLOCK_TOKENS,
        mask_mod=allowed,
        seq_lengths=(T, T),
    )


def listed(wanted_BQQ: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many key blocks each query block wants, and their numbers, wanted ones first."""
    count_B1Q = wanted_BQQ.sum(dim=-1, dtype=torch.int32).unsqueeze(1)
    number_BQQ = wanted_BQQ.int().argsort(dim=-1, descending=True, stable=True)
    return count_B1Q, number_BQQ.int().unsqueeze(1)


def attend_packed(
    begin_n: Tensor,
    longest_tokens: int,
    query_TBHK: Tensor,
    key_TBGK: Tensor,
    value_TBGK: Tensor,
    scale: float | None,
) -> Tensor:
    """Lay the documents of all rows end to end; scores exist inside a document only."""
    flash: Any = importlib.import_module("flash_attn")
    T, B = query_TBHK.shape[:2]
    out_NHK = flash.flash_attn_varlen_func(
        *(part.transpose(0, 1).flatten(0, 1) for part in (query_TBHK, key_TBGK, value_TBGK)),
        begin_n,
        begin_n,
        longest_tokens,
        longest_tokens,
        softmax_scale=scale,
        causal=True,
    )
    attended: Tensor = out_NHK.reshape(B, T, -1).transpose(0, 1)
    return attended


def packed_documents(position_BT: Tensor) -> tuple[Tensor, int]:
    """Return where documents begin among all N tokens, int32, with N last, and the longest one.

    A row begins one whatever its position. Waits for the device.
    """
    begins_BT = position_BT == 0
    begins_BT[:, 0] = True
    begin_n = begins_BT.flatten().nonzero().squeeze(1)
    begin_n = torch.cat((begin_n, begin_n.new_tensor([begins_BT.numel()])))
    return begin_n.int(), int(begin_n.diff().max())
