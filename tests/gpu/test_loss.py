"""Judge the fused loss on a GPU against fp64. Never run on a GPU so far: `make gpu-check`.

Letters: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from megatron_mode.kernels.mode_loss import Blocking, Targets, VocabShard, mode_loss

pytestmark = pytest.mark.gpu

VOCABULARIES = (1, 2, 127, 128, 129, 507, 50257)
HIDDEN_SIZES = (1, 31, 64, 123, 512)
TOKENS = (0, 1, 15, 513)
MASKS = ("none", "some", "all")
EPSILON = {torch.float32: 4e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
UPS = (0.5, -3.0)


def draw(tokens, hidden_size, vocab_size, mask="some", seed=0):
    """Return ([hidden, lm weight, mode weight, bias], targets) on the CPU in fp32."""
    generator = torch.Generator().manual_seed(seed)
    share = {"none": 0.0, "some": 0.4, "all": 1.0}[mask]

    def weights():
        kept = torch.rand(tokens, generator=generator) >= share
        return (torch.rand(tokens, generator=generator) + 0.5) * kept

    heads = [
        torch.randn(tokens, hidden_size, generator=generator),
        torch.randn(vocab_size, hidden_size, generator=generator) * 2 / hidden_size**0.5,
        torch.randn(hidden_size, generator=generator),
        torch.randn(1, generator=generator),
    ]
    target_N = torch.randint(0, vocab_size, (tokens,), generator=generator)
    label_N = torch.rand(tokens, generator=generator).round()
    return heads, Targets(target_N, weights(), label_N, weights())


def on(device, targets, *, rows=False):
    names = ("target_BT", "lm_weight_BT", "mode_label_BT", "mode_weight_BT")
    rows_n = targets.lm_weight_BT.nonzero().squeeze(1).to(device) if rows else None
    return Targets(*(getattr(targets, name).to(device) for name in names), rows_n)


def plain(heads, targets, dtype, device):
    """Return both sums and all gradients as plain torch has them."""
    leaves = [value.to(device, dtype).requires_grad_() for value in heads]
    targets = on(device, targets)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    nll_N = torch.nn.functional.cross_entropy(
        (leaves[0] @ leaves[1].T).to(wide), targets.target_BT, reduction="none"
    )
    bce_N = torch.nn.functional.binary_cross_entropy_with_logits(
        (leaves[0] @ leaves[2] + leaves[3]).to(wide),
        targets.mode_label_BT.to(wide),
        reduction="none",
    )
    lm_sum = (targets.lm_weight_BT.to(wide) * nll_N).sum()
    mode_sum = (targets.mode_weight_BT.to(wide) * bce_N).sum()
    (UPS[0] * lm_sum + UPS[1] * mode_sum).backward()
    return [lm_sum.detach(), mode_sum.detach(), *(leaf.grad for leaf in leaves)]


def ours(heads, targets, dtype, implementation, *, rows=False, **options):
    """Return the same by the op on the GPU."""
    leaves = [value.to("cuda", dtype).requires_grad_() for value in heads]
    output = mode_loss(
        *leaves, on("cuda", targets, rows=rows), implementation=implementation, **options
    )
    (UPS[0] * output.lm_sum + UPS[1] * output.mode_sum).backward()
    return [output.lm_sum.detach(), output.mode_sum.detach(), *(leaf.grad for leaf in leaves)]


def error(value, truth):
    """Return the L2 distance relative to the truth, absolute where the truth is below 1."""
    return float((value.cpu().double() - truth).norm() / truth.norm().clamp(min=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["triton", "chunked"])
def test_whole_matrix(implementation, dtype, figure):
    worst = 0.0
    masks = itertools.cycle(MASKS)
    for vocab_size, hidden_size, tokens in itertools.product(VOCABULARIES, HIDDEN_SIZES, TOKENS):
        mask = next(masks)
        heads, targets = draw(tokens, hidden_size, vocab_size, mask)
        truth = [v.cpu() for v in plain(heads, targets, torch.float64, "cuda")]
        eager = plain(heads, targets, dtype, "cuda")
        for rows in (False, True):
            found = ours(heads, targets, dtype, implementation, rows=rows)
            for value, other, expected in zip(found, eager, truth, strict=True):
                bound = 2 * error(other, expected) + EPSILON[dtype]
                worst = max(worst, error(value, expected) / bound)
                place = (vocab_size, hidden_size, tokens, mask, rows)
                assert error(value, expected) <= bound, place
    figure(f"{implementation} {dtype}: worst error, share of its bound", worst)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_kept_logits_are_as_good_as_plain_torch(scale):
    """Plain torch keeps logits in bf16 too; at scale 10 many tokens are certain."""
    heads, targets = draw(513, 64, 5003)
    heads[0] *= scale
    truth = plain(heads, targets, torch.float64, "cuda")
    eager = plain(heads, targets, torch.bfloat16, "cuda")
    found = ours(heads, targets, torch.bfloat16, "triton", keep_logits_bytes=2**30)
    for value, other, expected in zip(found, eager, truth, strict=True):
        assert error(value, expected.cpu()) <= 2 * error(other, expected.cpu()) + 4e-3


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_and_a_poisoned_row(scale):
    heads, targets = draw(40, 64, 507, "none")
    heads[0][:, 0], heads[1][:, 0] = scale, torch.linspace(-1, 1, 507)
    clean = ours(heads, targets, torch.float32, "triton")
    truth = plain(heads, targets, torch.float64, "cuda")
    assert all(torch.isfinite(value).all() for value in clean)
    assert error(clean[0], truth[0].cpu()) <= 1e-3 * float(truth[0])
    heads[0][5] = float("nan")
    dirty = ours(heads, targets, torch.float32, "triton")
    others = torch.arange(40, device="cuda") != 5
    assert torch.equal(dirty[2][others], clean[2][others])


@pytest.mark.parametrize(("lm", "mode"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("cap", [(1, 5), (1, 1)])
def test_blocking_equals_the_reference(lm, mode, cap):
    blocking = Blocking(0.4, watch_mode1=True, watch_mode2=True, cap=cap, lm=lm, mode=mode)
    heads, targets = draw(300, 64, 507)
    results = [
        ours(heads, targets, torch.float32, implementation, blocking=blocking)
        for implementation in ("triton", "reference")
    ]
    for value, other in zip(*results, strict=True):
        assert error(value, other.cpu().double()) <= 1e-5


def test_the_host_never_waits_and_runs_repeat_bitwise():
    heads, targets = draw(513, 128, 5003)
    leaves = [value.to("cuda", torch.bfloat16).requires_grad_() for value in heads]
    given, shard = on("cuda", targets, rows=True), VocabShard(vocab_size=5000)
    blocking = Blocking(0.4, watch_mode1=True, watch_mode2=True, cap=(1, 5), lm=True, mode=True)
    runs = []
    for attempt in range(4):
        for leaf in leaves:
            leaf.grad = None
        torch.cuda.synchronize()
        if attempt:  # the first run compiles
            torch.cuda.set_sync_debug_mode("error")
        try:
            output = mode_loss(
                *leaves, given, shard=shard, blocking=blocking, implementation="triton"
            )
            (output.lm_sum + output.mode_sum).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        runs.append([output.lm_sum, output.nll_BT, *(leaf.grad for leaf in leaves)])
    for run in runs[1:]:
        assert all(torch.equal(*pair) for pair in zip(run, runs[0], strict=True))


def test_a_target_outside_the_vocabulary_ends_the_process():
    program = (
        "import torch; from megatron_mode.kernels.mode_loss import *; h = torch.ones(4, 16).cuda();"
        "one = torch.ones(4).cuda(); t = Targets(torch.full((4,), 99).cuda(), one, one, one);"
        "mode_loss(h, torch.ones(32, 16).cuda(), one.new_ones(16), one.new_ones(1), t,"
        "          implementation='triton', check_targets=True); torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert "assert" in done.stderr.lower()
