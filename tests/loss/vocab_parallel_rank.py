"""Run the sharded loss on one of four gloo ranks and save what it returns; started by a test.

Arguments: rank, rendezvous file, output file. Letters: N tokens, D hidden size, V vocabulary.
"""

import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_mode.config.fields import BlockingConfig, LossConfig
from megatron_mode.kernels.mode_loss import Targets, lm_pass, mode_loss, tiling
from megatron_mode.loss.blocking import blocking_of
from megatron_mode.loss.mode_loss import ModeLoss
from megatron_mode.loss.vocab_parallel import vocab_shard

VOCAB_SIZE, PADDED_SIZE, ROWS, LENGTH, HIDDEN_SIZE = 300, 384, 3, 24, 16
SHARDS = {
    "equal 2": (192, 192),
    "unequal 2": (100, 284),
    "all padding 2": (300, 84),
    "equal 4": (96, 96, 96, 96),
    "unequal 4": (150, 30, 110, 94),
    "all padding 4": (150, 130, 60, 44),
}
SEQUENCE_CASES = ("unequal 2", "equal 4", "all padding 4")
BLOCKING = BlockingConfig(policy="both", direction="both", tau=0.8, cap=0.2)


def draw_inputs(dtype):
    """Draw the replicated inputs, the same on every rank."""
    draw = torch.Generator().manual_seed(0)
    grid = (ROWS, LENGTH)
    targets = Targets(
        torch.randint(0, VOCAB_SIZE, grid, generator=draw),
        torch.rand(grid, generator=draw).round(),
        torch.rand(grid, generator=draw),
        torch.rand(grid, generator=draw).round(),
    )
    hidden_TBD = torch.randn(LENGTH, ROWS, HIDDEN_SIZE, generator=draw)
    weight_VD = torch.randn(PADDED_SIZE, HIDDEN_SIZE, generator=draw)
    mode_weight_D = torch.randn(HIDDEN_SIZE, generator=draw)
    return [hidden_TBD.to(dtype), weight_VD.to(dtype), mode_weight_D, torch.ones(1)], targets


def run(begin, end, group, implementation, dtype, *, sequence=False, rows=False, reduce=None):
    """Return outputs and gradients of the shard [begin, end) by the op, in chunks of 25 tokens.

    With `sequence` this rank holds a part of the hidden states, and the gradient of its part is
    gathered; with `rows` the op is told the tokens with an LM weight.
    """
    lm_pass.CPU_LOGITS_BYTES = 25 * 4 * VOCAB_SIZE // (1 if group is None else group.size())
    lm_pass.CPU_COLUMNS_BYTES = lm_pass.CPU_LOGITS_BYTES
    lm_pass.ROWS_MIN = lm_pass.COLUMNS_MIN = 1
    (hidden, weight, *head), targets = draw_inputs(dtype)
    if sequence:
        hidden = hidden.chunk(group.size())[dist.get_rank(group)]
    if rows:
        rows_n = targets.lm_weight_BT.reshape(-1).nonzero().squeeze(1)
        targets = replace(targets, lm_rows_n=rows_n)
    leaves = [value.clone().requires_grad_() for value in (hidden, weight[begin:end], *head)]
    output = mode_loss(
        *leaves,
        targets,
        shard=vocab_shard(
            group,
            end - begin,
            VOCAB_SIZE,
            hidden.device,
            sequence_parallel=sequence,
            reduce_dtype=reduce,
        ),
        z_weight=0.01,
        blocking=blocking_of(BLOCKING, active=True),
        implementation=implementation,
    )
    result = collect(output, leaves)
    if sequence:
        parts = [torch.empty_like(result["hidden_grad"]) for _ in range(group.size())]
        dist.all_gather(parts, result["hidden_grad"].contiguous(), group=group)
        result["hidden_grad"] = torch.cat(parts)
    return result


def run_module(begin, end, group):
    """Return outputs and gradients of the shard by the public module."""
    (hidden, weight, *head), targets = draw_inputs(torch.float32)
    leaves = [value.clone().requires_grad_() for value in (hidden, weight[begin:end], *head)]
    loss = ModeLoss(LossConfig(z_weight=0.01, blocking=BLOCKING), VOCAB_SIZE, group)
    loss(*leaves, targets)
    return collect(loss(*leaves, targets), leaves)


def collect(output, leaves):
    """Return a dict of detached tensors; both sums get upstream gradients of their own."""
    (0.7 * output.lm_sum - 2.0 * output.mode_sum).backward()
    result = {name: getattr(output, name).detach() for name in output.__dataclass_fields__}
    names = ("hidden_grad", "lm_weight_grad", "mode_weight_grad", "mode_bias_grad")
    return result | {name: leaf.grad for name, leaf in zip(names, leaves, strict=True)}


def main(rank, rendezvous, out):
    """Run every case on this rank and save {case: result}."""
    torch.set_num_threads(1)
    tiling.INTERPRETER = replace(tiling.INTERPRETER, BLOCK_N=64, BLOCK_V=128)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=4)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results = {}
    for case, sizes in SHARDS.items():
        group = pairs[rank // 2] if len(sizes) == 2 else dist.group.WORLD
        index = rank % len(sizes)
        begin, end = sum(sizes[:index]), sum(sizes[: index + 1])
        dtypes = (torch.float32, torch.bfloat16) if case == "unequal 4" else (torch.float32,)
        for dtype in dtypes:
            for implementation in ("chunked", "reference", "triton"):
                key = (case, implementation, str(dtype))
                if implementation == "triton" and dtype == torch.bfloat16:
                    continue  # the interpreter cuts bf16 off
                results[key] = run(begin, end, group, implementation, dtype)
        if case in SEQUENCE_CASES:
            for implementation in ("chunked", "reference", "triton"):
                key = (case, f"{implementation} sequence", "torch.float32")
                results[key] = run(
                    begin, end, group, implementation, torch.float32, sequence=True, rows=True
                )
            # Three runs have the same bits.
            for _ in range(2):
                again = run(begin, end, group, "triton", torch.float32, sequence=True, rows=True)
                last = results[case, "triton sequence", "torch.float32"]
                assert all(torch.equal(again[name], last[name]) for name in last)
            results[case, "bf16 sum", "torch.float32"] = run(
                begin, end, group, "chunked", torch.float32, reduce=torch.bfloat16
            )
        results[case, "module", "torch.float32"] = run_module(begin, end, group)
    for dtype in (torch.float32, torch.bfloat16):
        results["whole", str(dtype)] = run(0, PADDED_SIZE, None, "reference", dtype)
    torch.save(results, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
