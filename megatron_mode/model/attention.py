"""Attend inside documents: rotary positions and a causal mask that stops at document borders.

T row length, B rows, H query heads, G key/value groups, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

CPU_BLOCK_TOKENS = 256


class AttentionContext(NamedTuple):
    """Hold what every layer of a stage needs beside the hidden states; built once a micro-batch."""

    cos_TB1K: Tensor
    sin_TB1K: Tensor
    mask_B1TT: Tensor


def attention_context(
    position_BT: Tensor, head_size: int, rope_base: float, dtype: torch.dtype
) -> AttentionContext:
    """Derive rotary tables and the attention mask from positions alone.

    A position of 0 opens a document, so the running count of zeros numbers the documents of a
    row. `sin` carries the sign of rotate_half (RoFormer, eq. 34) in its first half, which saves a
    negation in each layer. Angles are taken in fp32 whatever `dtype` is.
    """
    half = torch.arange(0, head_size, 2, device=position_BT.device, dtype=torch.float32)
    frequency_K2 = rope_base ** (-half / head_size)
    angle_TBK2 = position_BT.t().unsqueeze(-1).float() * frequency_K2
    cos_TBK2, sin_TBK2 = angle_TBK2.cos(), angle_TBK2.sin()
    cos_TB1K = torch.cat((cos_TBK2, cos_TBK2), dim=-1).unsqueeze(2).to(dtype)
    sin_TB1K = torch.cat((-sin_TBK2, sin_TBK2), dim=-1).unsqueeze(2).to(dtype)
    document_BT = (position_BT == 0).cumsum(dim=1)
    allowed_BTT = (document_BT.unsqueeze(2) == document_BT.unsqueeze(1)).tril_()
    # Additive: torch would turn a boolean mask into this form again in every layer.
    mask_B1TT = torch.zeros(allowed_BTT.shape, dtype=dtype, device=position_BT.device)
    mask_B1TT = mask_B1TT.masked_fill_(~allowed_BTT, float("-inf")).unsqueeze(1)
    return AttentionContext(cos_TB1K, sin_TB1K, mask_B1TT)


class Rotate(torch.autograd.Function):
    """Rotate pairs of features by position; the gradient is the rotation back.

    Written out because autograd's own graph would keep two more copies of queries and keys alive.
    """

    @staticmethod
    def forward(ctx: Any, features_TBHK: Tensor, cos_TB1K: Tensor, sin_TB1K: Tensor) -> Tensor:
        """Rotate [T, B, H, K] by tables [T, B, 1, K]."""
        ctx.save_for_backward(cos_TB1K, sin_TB1K)
        return rotate(features_TBHK, cos_TB1K, sin_TB1K)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Rotate the gradient by the opposite angles."""
        cos_TB1K, sin_TB1K = ctx.saved_tensors
        return rotate(grads[0], cos_TB1K, -sin_TB1K), None, None


def rotate(features_TBHK: Tensor, cos_TB1K: Tensor, sin_TB1K: Tensor) -> Tensor:
    """Return features * cos + swap_halves(features) * signed sin."""
    half = features_TBHK.shape[-1] // 2
    rotated_TBHK = features_TBHK * cos_TB1K
    rotated_TBHK[..., :half].addcmul_(features_TBHK[..., half:], sin_TB1K[..., :half])
    rotated_TBHK[..., half:].addcmul_(features_TBHK[..., :half], sin_TB1K[..., half:])
    return rotated_TBHK


class DocumentAttention(nn.Module):
    """Serve as megatron-core's core attention: rotary positions and document-aware attention.

    megatron-core hands `attention_mask` through untouched; here it is the AttentionContext.
    """

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()
        self.scale = config.softmax_scale

    def forward(
        self, query_TBHK: Tensor, key_TBGK: Tensor, value_TBGK: Tensor, context: Any, /, **_: Any
    ) -> Tensor:
        """Return attended values [T, B, H*K]."""
        cos_TB1K, sin_TB1K, mask_B1TT = context
        turn = cast(Callable[..., Tensor], Rotate.apply)
        query_TBHK = turn(query_TBHK, cos_TB1K, sin_TB1K)
        key_TBGK = turn(key_TBGK, cos_TB1K, sin_TB1K)
        blocks = []
        for begin, end in query_blocks(query_TBHK):
            mask_B1TS = mask_B1TT[..., begin:end, :end]
            blocks.append(
                self.attend(query_TBHK[begin:end], key_TBGK[:end], value_TBGK[:end], mask_B1TS)
            )
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def attend(
        self, query_TBHK: Tensor, key_SBGK: Tensor, value_SBGK: Tensor, mask_B1TS: Tensor
    ) -> Tensor:
        """Attend from T queries to S keys; returns [T, B, H*K]."""
        out_BHTK = scaled_dot_product_attention(
            query_TBHK.permute(1, 2, 0, 3),
            key_SBGK.permute(1, 2, 0, 3),
            value_SBGK.permute(1, 2, 0, 3),
            attn_mask=mask_B1TS,
            scale=self.scale,
            enable_gqa=query_TBHK.shape[2] != key_SBGK.shape[2],
        )
        return out_BHTK.permute(2, 0, 1, 3).flatten(2)


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
