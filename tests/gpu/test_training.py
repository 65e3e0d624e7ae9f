"""What only a GPU can show; `make gpu-check` runs it. Never run on a GPU so far."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.gpu


def test_bench_against_peers(figure):
    """Time and memory at N = 8192, D = 4096, V = 128256 in bf16."""
    command = [sys.executable, "-m", "megatron_mode.kernels.bench", "--device", "cuda", "--json"]
    done = subprocess.run([*command, "--rounds", "5"], check=True, capture_output=True, text=True)
    for result in json.loads(done.stdout):
        for row in result["rows"]:
            name = f"{row['name']}, {result['dtype']}"
            figure(f"{name}: seconds", float(row["median_seconds"]))
            if row["extra_bytes"] is not None:
                figure(f"{name}: extra GiB", row["extra_bytes"] / 2**30)
            if row["name"].startswith("megatron_mode"):
                assert row["loss_error"] < 1e-3
                assert row["grad_error"] < 2e-2


def test_tiny_pretraining_in_bf16_learns(tmp_path, figure):
    """Train the tiny preset through DeepSpeed in bf16; the loss falls and the mode is told."""
    data, run_dir = tmp_path / "data", tmp_path / "run"
    verb = [sys.executable, "-m", "megatron_mode", "prepare", "--sample", "--out", str(data)]
    subprocess.run([*verb, "--vocab-size", "2048", "--valid-share", "0.05"], check=True)
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "1"]
    config = ["--config", str(ROOT / "configs/run/tiny.yaml")]
    overrides = [
        f"data.root={data}",
        f"run.dir={run_dir}",
        "run.precision=bf16",
        "loss.implementation=triton",
        "parallel.activation_checkpointing=selective",
    ]
    script = str(ROOT / "launch/pretrain.py")
    subprocess.run([*launcher, script, *config, *overrides], check=True)
    summary = json.loads((run_dir / "summary.json").read_text())
    for key in ("valid_lm_loss", "unigram_entropy", "valid_mode_auroc", "tokens_per_second"):
        figure(f"tiny in bf16 with triton: {key}", summary[key])
    assert summary["valid_lm_loss"] < summary["unigram_entropy"] - 0.5
    assert summary["valid_mode_auroc"] >= 0.95
