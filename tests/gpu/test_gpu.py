"""What only a GPU can show; `make gpu-check` runs it. Never run on a GPU so far."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_loss_on_cuda_equals_fp64(implementation, dtype):
    """Loss and gradients stay within twice plain torch's error in the same dtype."""
    from megatron_mode.kernels.mode_loss import Targets, mode_loss

    tokens, hidden_size, vocab = 513, 128, 5003
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, hidden_size, generator=generator)
    weight = torch.randn(vocab, hidden_size, generator=generator) * 0.1
    mode_weight = torch.randn(hidden_size, generator=generator) * 0.1
    target = torch.randint(0, vocab, (tokens,), generator=generator)
    lm_weight = (torch.rand(tokens, generator=generator) < 0.8).float()
    label = (torch.rand(tokens, generator=generator) < 0.5).float()
    ones = torch.ones(tokens)

    def plain(kind, device):
        leaves = [t.to(device, kind).requires_grad_() for t in (hidden, weight, mode_weight)]
        logits = leaves[0] @ leaves[1].t()
        nll = torch.nn.functional.cross_entropy(
            logits.double() if kind == torch.float64 else logits.float(),
            target.to(device),
            reduction="none",
        )
        z = (leaves[0] @ leaves[2]).to(nll.dtype)
        bce = torch.nn.functional.binary_cross_entropy_with_logits(
            z, label.to(device, nll.dtype), reduction="none"
        )
        total = (nll * lm_weight.to(device)).sum() + 0.3 * bce.sum()
        total.backward()
        return [total.detach(), *(leaf.grad for leaf in leaves)]

    truth = plain(torch.float64, "cpu")
    eager = plain(dtype, "cuda")
    leaves = [t.to("cuda", dtype).requires_grad_() for t in (hidden, weight, mode_weight)]
    targets = Targets(*(t.cuda() for t in (target, lm_weight, label, ones)))
    bias = torch.zeros(1, device="cuda", dtype=dtype)
    result = mode_loss(*leaves, bias, targets, implementation=implementation)
    total = result.lm_sum + 0.3 * result.mode_sum
    total.backward()
    ours = [total.detach(), *(leaf.grad for leaf in leaves)]
    for found, other, expected in zip(ours, eager, truth, strict=True):
        scale = expected.norm()
        error = (found.cpu().double() - expected).norm() / scale
        assert error <= 2 * (other.cpu().double() - expected).norm() / scale + 1e-6


def test_tiny_pretraining_in_bf16_learns(tmp_path):
    """Train the tiny preset through DeepSpeed in bf16; the loss falls and the mode is told."""
    data, run_dir = tmp_path / "data", tmp_path / "run"
    verb = [sys.executable, "-m", "megatron_mode", "prepare", "--sample", "--out", str(data)]
    subprocess.run([*verb, "--vocab-size", "2048", "--valid-share", "0.05"], check=True)
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "1"]
    config = ["--config", str(ROOT / "configs/run/tiny.yaml")]
    overrides = [f"data.root={data}", f"run.dir={run_dir}", "run.precision=bf16"]
    script = str(ROOT / "launch/pretrain.py")
    subprocess.run([*launcher, script, *config, *overrides], check=True)
    summary = json.loads((run_dir / "summary.json").read_text())
    print(json.dumps({k: v for k, v in summary.items() if isinstance(v, int | float)}, indent=1))
    assert summary["valid_lm_loss"] < summary["unigram_entropy"] - 0.5
    assert summary["valid_mode_auroc"] >= 0.95
