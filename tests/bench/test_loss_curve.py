"""The tiny preset's loss curve does not depend on the implementation of the loss.

To 1e-5 for twenty steps. Adam divides noise of 1e-9 in a gradient by its own size, so that two
fp32 runs which differ in one rounding part afterwards, whatever the implementation.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def curve(data_root, folder, implementation, steps):
    """Train and return the loss of every step."""
    overrides = [
        f"data.root={data_root}",
        f"run.dir={folder}",
        f"loss.implementation={implementation}",
        f"run.steps={steps}",
        "run.eval_every_steps=1000",
    ]
    command = [sys.executable, str(ROOT / "launch/pretrain.py")]
    config = ["--config", str(ROOT / "configs/run/tiny.yaml")]
    subprocess.run([*command, *config, *overrides], check=True, capture_output=True)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_chunked_and_reference_agree(tmp_path):
    root = tmp_path / "data"
    verb = [sys.executable, "-m", "megatron_mode", "prepare", "--sample", "--out", str(root)]
    subprocess.run([*verb, "--vocab-size", "2048", "--valid-share", "0.05"], check=True)
    curves = [
        curve(root, tmp_path / implementation, implementation, steps=21)
        for implementation in ("chunked", "reference")
    ]
    assert len(curves[0]) == 21
    assert curves[0][-1] < curves[0][0] - 0.5
    for chunked, reference in list(zip(*curves, strict=True))[:20]:
        assert chunked == pytest.approx(reference, rel=1e-5)
