"""Read what runs wrote, to compare it."""

from __future__ import annotations

import json
import re

import torch

CLOCK_AND_MEMORY = re.compile(r"seconds|per_second|mfu|memory")


def metrics(run_dir):
    """Return the lines of a run without what a clock or the system says; none before it began."""
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in line.items() if not CLOCK_AND_MEMORY.search(k)} for line in lines]


def assert_same(one, other, where):
    """Compare nested states to the last bit."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], (where, key))
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, (where, number))
    elif not hasattr(one, "cur_scale"):  # the loss scaler has no equality
        assert one == other, where
