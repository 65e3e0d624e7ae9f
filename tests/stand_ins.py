"""Stand in for what only a GPU has: flash-attention's function, and gradients of flex attention.

T tokens of a sequence, N tokens of all, H query heads, K head size.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.nn.functional import scaled_dot_product_attention


def flash_attn_varlen_func(q, k, v, begins_q, begins_k, most_q, most_k, softmax_scale, causal):
    """Do what flash-attention 2 documents, sequence by sequence: [N, H, K] to the same."""
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert begins_q.dtype == begins_k.dtype == torch.int32
    assert begins_q[-1] == len(q)
    assert causal
    pieces = []
    for begin, end in zip(begins_q.tolist(), begins_q.tolist()[1:], strict=False):
        assert end - begin <= min(most_q, most_k)
        heads = [x[begin:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        piece = scaled_dot_product_attention(
            *heads, is_causal=True, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        pieces.append(piece.squeeze(0).transpose(0, 1))
    return torch.cat(pieces)


FLASH_ATTN = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)


def let_flex_train_on_a_cpu(set_attribute):
    """torch's plain form has gradients on a CPU; a check in front of it says that no kernel has.

    Run as it is, without tracing it first, which takes seconds in every process.
    """
    from torch.nn.attention import flex_attention

    set_attribute(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    set_attribute(flex_attention, "_validate_device", lambda *_: None)
