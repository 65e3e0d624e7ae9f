"""Start one Slurm for the tests of this folder, and prepare what its jobs train on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "commands")]

import cluster as cluster_  # noqa: E402  # they lie beside the tests
import tiny_run  # noqa: E402


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster_.Cluster]:
    """Start Slurm; skip where that cannot be, fail where MEGATRON_MODE_REQUIRE_SLURM is 1."""
    reason = cluster_.reason_to_skip()
    if reason and os.environ.get("MEGATRON_MODE_REQUIRE_SLURM") == "1":
        pytest.fail(f"MEGATRON_MODE_REQUIRE_SLURM is 1, but {reason}")
    if reason:
        pytest.skip(reason)
    started = cluster_.Cluster(tmp_path_factory.mktemp("cluster"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare a small corpus and return a run file that trains on it for some seconds."""
    folder = tmp_path_factory.mktemp("corpus")
    documents = tiny_run.write_jsonl(folder / "in.jsonl", tiny_run.documents())
    tiny_run.prepare(folder / "data", documents)
    text = tiny_run.RUN_FILE.replace("steps: 3,", "steps: 150,")
    text = text.replace("eval_every_steps: 2", "eval_every_steps: 50")
    text = text.replace("every_steps: 2}", "every_steps: 0}")
    path = folder / "run.yaml"
    path.write_text(f"{text}data: {{root: {folder}/data}}\n")
    return path
