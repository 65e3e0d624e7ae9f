"""Register the forward pass with torch.library, so that torch.compile takes it as one operator.

`torch.ops.megatron_mode.mode_loss_forward` holds every implementation but the reference, for a
whole vocabulary; a shard talks to other ranks and is called directly. Its schema has tensors and
numbers only; `Plan` is packed into them and back.

Letters: N tokens, n tokens with an LM weight, D hidden size, V columns of this shard.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_mode.kernels.mode_loss.arguments import (
    Blocking,
    TokenTargets,
    VocabShard,
    check_range,
)
from megatron_mode.kernels.mode_loss.chunked import chunked_forward
from megatron_mode.kernels.mode_loss.layout import TokenGrid
from megatron_mode.kernels.mode_loss.plan import (
    Implementation,
    ModeHead,
    Plan,
    Wants,
    keeps_logits,
    launch_device,
)
from megatron_mode.kernels.mode_loss.results import Kept, TokenLosses, accumulation_dtype
from megatron_mode.kernels.mode_loss.tiling import padded_columns

LOSSES = len(TokenLosses._fields)


def run_forward(
    hidden_ND: Tensor,
    lm_weight_VD: Tensor,
    head: ModeHead | None,
    targets: TokenTargets,
    plan: Plan,
) -> tuple[TokenLosses, Kept]:
    """Return the losses of the plan's implementation and what its backward pass needs.

    Raises TargetRangeError for a target outside the vocabulary (CPU).
    """
    vocab_size = plan.shard.vocab_size
    if vocab_size is not None and (plan.check_targets or hidden_ND.device.type == "cpu"):
        check_range(targets.target_N, targets.lm_weight_N, vocab_size, plan.grid.name)
    if plan.implementation == "triton":
        # Triton is imported where it is used: a machine without it has the other two.
        from megatron_mode.kernels.mode_loss.triton_forward import triton_forward

        with launch_device(hidden_ND):
            return triton_forward(hidden_ND, lm_weight_VD, head, targets, plan)
    return chunked_forward(hidden_ND, lm_weight_VD, head, targets, plan)


def forward(
    hidden_ND: Tensor,
    lm_weight_VD: Tensor,
    head: ModeHead | None,
    targets: TokenTargets,
    plan: Plan,
) -> tuple[TokenLosses, Kept]:
    """Run the forward pass, as the registered operator where a compiler or fake tensors look on.

    Otherwise directly: the first call of a registered operator imports torch._dynamo, which takes
    longer than the first step of a small model.
    """
    plain = type(hidden_ND) in (Tensor, Parameter) and hidden_ND.device.type != "meta"
    if not plan.shard.whole or (plain and not torch.compiler.is_compiling()):
        return run_forward(hidden_ND, lm_weight_VD, head, targets, plan)
    outputs = torch.ops.megatron_mode.mode_loss_forward(
        hidden_ND,
        lm_weight_VD,
        None if head is None else head.weight_D,
        None if head is None else head.bias,
        targets.target_N,
        targets.lm_weight_N,
        targets.mode_label_N,
        targets.mode_weight_N,
        targets.lm_rows_n,
        *pack(plan),
    )
    return TokenLosses(*outputs[:LOSSES]), Kept(*outputs[LOSSES:])


def pack(plan: Plan) -> tuple[str, list[int], list[float]]:
    """Return the plan as implementation, integers and floats."""
    blocking, shard = plan.blocking, plan.shard
    integers = [
        *plan.wants,
        plan.grid.rows_first,
        shard.start,
        -1 if shard.vocab_size is None else shard.vocab_size,
        -1 if plan.logits_bytes is None else plan.logits_bytes,
        plan.keep_logits_bytes,
        plan.check_targets,
        blocking is not None,
    ]
    floats = [plan.z_weight]
    if blocking is not None:
        integers += [
            blocking.watch_mode1,
            blocking.watch_mode2,
            *blocking.cap,
            blocking.lm,
            blocking.mode,
        ]
        floats.append(blocking.threshold)
    # The sizes stay as they are: a compiler may hold them symbolically.
    return plan.implementation, [*(int(number) for number in integers), *plan.grid.shape], floats


def unpack(implementation: str, integers: list[int], floats: list[float]) -> Plan:
    """Return the plan that `pack` packed."""
    wants, rest = Wants(*(bool(want) for want in integers[:4])), integers[4:]
    rows_first, start, vocab_size, logits_bytes, keep, check_targets, blocks = rest[:7]
    rest = rest[7:]
    blocking = None
    if blocks:
        watch_mode1, watch_mode2, numerator, denominator, lm, mode = rest[:6]
        rest = rest[6:]
        blocking = Blocking(
            threshold=floats[1],
            watch_mode1=bool(watch_mode1),
            watch_mode2=bool(watch_mode2),
            cap=(numerator, denominator),
            lm=bool(lm),
            mode=bool(mode),
        )
    return Plan(
        implementation=cast(Implementation, implementation),
        grid=TokenGrid(tuple(rest), bool(rows_first)),
        shard=VocabShard(start, None if vocab_size < 0 else vocab_size),
        wants=wants,
        z_weight=floats[0],
        blocking=blocking,
        logits_bytes=None if logits_bytes < 0 else logits_bytes,
        keep_logits_bytes=keep,
        check_targets=bool(check_targets),
    )


@torch.library.custom_op("megatron_mode::mode_loss_forward", mutates_args=())
def mode_loss_forward(
    hidden_ND: Tensor,
    lm_weight_VD: Tensor,
    mode_weight_D: Tensor | None,
    mode_bias: Tensor | None,
    target_N: Tensor,
    lm_weight_N: Tensor,
    mode_label_N: Tensor,
    mode_weight_N: Tensor,
    lm_rows_n: Tensor | None,
    implementation: str,
    integers: list[int],
    floats: list[float],
) -> list[Tensor]:
    """Return the fields of TokenLosses, then those of Kept."""
    head = None
    if mode_weight_D is not None and mode_bias is not None:
        head = ModeHead(mode_weight_D, mode_bias)
    targets = TokenTargets(target_N, lm_weight_N, mode_label_N, mode_weight_N, lm_rows_n)
    plan = unpack(implementation, integers, floats)
    losses, kept = run_forward(hidden_ND, lm_weight_VD, head, targets, plan)
    return [*losses, *kept]


@mode_loss_forward.register_fake
def _(
    hidden_ND: Tensor,
    lm_weight_VD: Tensor,
    mode_weight_D: Tensor | None,
    mode_bias: Tensor | None,
    target_N: Tensor,
    lm_weight_N: Tensor,
    mode_label_N: Tensor,
    mode_weight_N: Tensor,
    lm_rows_n: Tensor | None,
    implementation: str,
    integers: list[int],
    floats: list[float],
) -> list[Tensor]:
    """Return tensors of the right shapes without values."""
    plan = unpack(implementation, integers, floats)
    dtype, tokens = accumulation_dtype(hidden_ND), hidden_ND.shape[0]

    def new(*shape: int) -> Tensor:
        return hidden_ND.new_empty(shape, dtype=dtype)

    losses = TokenLosses(
        new(), new(), new(), new(tokens), new(tokens), new(tokens), new(tokens).bool()
    )
    chunked, wants = implementation == "chunked", plan.wants
    columns = plan.shard.real_columns(lm_weight_VD.shape[0])
    rows = tokens if lm_rows_n is None else lm_rows_n.shape[0]
    keeps = keeps_logits(plan, rows, columns, hidden_ND.dtype)
    half = lm_weight_VD.dtype == torch.bfloat16
    kept = Kept(
        dlogit_N=new(tokens),
        lm_weight_N=new(tokens),
        lse_N=new(0) if chunked else new(rows),
        logits_nV=hidden_ND.new_empty(rows, padded_columns(columns)) if keeps else new(0),
        hidden_gradient_ND=new(*hidden_ND.shape) if chunked and wants.hidden else new(0),
        lm_weight_gradient_VD=(
            lm_weight_VD.new_empty(lm_weight_VD.shape, dtype=torch.bfloat16 if half else dtype)
            if chunked and wants.lm_weight
            else new(0)
        ),
        mode_weight_gradient_D=(
            new(hidden_ND.shape[1])
            if chunked and wants.mode_weight and mode_weight_D is not None
            else new(0)
        ),
    )
    return [*losses, *kept]
