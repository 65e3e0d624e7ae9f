"""Compute LM and mode loss in one operation that never keeps the N x V logits.

    mode_loss()  op            checks, token order, choice of the implementation
       |
       +-- triton     TritonLoss    triton_loss -> mode_kernels, lm_kernels
       +-- chunked    ChunkedLoss   chunked -> mode_terms, lm_pass
       +-- reference                reference: plain autograd, the oracle

Every implementation takes the same steps:

    hidden [N, D] --> mode logit z --> blocked tokens --> LM weights --> log-sum-exp, nll
                          |                                                |
                       mode_sum = sum c * bce                 lm_sum = sum a * (nll + z-loss)

Vocabulary
    token    one position of the micro-batch; N = B * T of them, n with an LM weight
    targets  what a token is judged by: target id, LM weight a, mode label m, mode weight c
    head     the LM head [V, D] gives logits, the mode head [D] gives the mode logit z
    shard    the columns of the vocabulary on this rank, with the collectives that join them
    piece    tokens or columns whose logits exist at one time in `chunked`
    tile     the block of logits of one Triton program; a slice is what one kernel call writes
    choices  everything of a call that is no tensor

Example:
    targets = Targets(target_BT, lm_weight_BT, mode_label_BT, mode_weight_BT)
    out = mode_loss(hidden_TBD, lm_weight_VD, mode_weight_D, mode_bias, targets)
    (out.lm_sum + out.mode_sum).backward()
"""

from megatron_mode.kernels.mode_loss.arguments import (
    Blocking,
    Implementation,
    TargetRangeError,
    Targets,
    VocabShard,
)
from megatron_mode.kernels.mode_loss.op import LossOutput, mode_loss, why_no_triton

__all__ = [
    "Blocking",
    "Implementation",
    "LossOutput",
    "TargetRangeError",
    "Targets",
    "VocabShard",
    "mode_loss",
    "why_no_triton",
]
