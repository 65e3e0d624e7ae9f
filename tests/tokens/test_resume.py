"""Kill preparations and merges at random moments; what comes out in the end is the same."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WriteLines = Callable[[Path, list[Any]], Path]
Dialogue = Callable[..., dict[str, Any]]

# Small units, so that a kill meets many states of the work folder.
PROGRAM = """
import sys
from megatron_mode.__main__ import main
from megatron_mode.tokens.prepare import buckets, units
if __name__ == "__main__":
    units.UNIT_BYTES = 1 << 16
    buckets.BUCKET_BYTES = 1 << 15
    sys.exit(main())
"""


def folder_bytes(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


@pytest.fixture
def inputs(tmp_path: Path, write_lines: WriteLines, dialogue: Dialogue) -> list[Path]:
    """Write lines of many sources with copies and repeated ids among them."""
    choose = random.Random(5)
    words = ["sea", "whale", "ship", "mast", "harbour", "storm", "anchor"]
    paths = []
    for file in range(2):
        lines: list[Any] = []
        for index in range(3000):
            text = " ".join(choose.choices(words, k=choose.randrange(1, 120)))
            source = f"s{index % 5}"
            if index % 5 < 3:
                lines.append({"id": str(choose.randrange(9000)), "source": source, "text": text})
            else:
                lines.append(dialogue(str(choose.randrange(9000)), text, "Aye.", source=source))
        paths.append(write_lines(tmp_path / f"{file}.jsonl.gz", lines + lines[:100]))
    return paths


def run_to_the_end(command: list[Any]) -> float:
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def kill_after(command: list[Any], seconds: float) -> bool:
    """Start a command and kill it and its workers; tell whether it was still running."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    time.sleep(seconds)
    was_running = process.poll() is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return was_running


def check_kills(
    tmp_path: Path, model_path: Path, inputs: list[Path], kills: int, seed: int
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    options = ["--tokenizer", model_path, "--workers", "2", "--valid-share", "0.1"]
    start = [sys.executable, program, "prepare", "--input", *inputs, *options, "--out"]
    whole, out = tmp_path / "whole", tmp_path / "d"
    seconds = run_to_the_end([*start, whole])
    choose = random.Random(seed)
    done = 0
    while done < kills:
        # Bound to die before the end, and with time to get one step on, it dies a few times in a
        # row before one run is left alone.
        for _ in range(choose.randrange(1, 4)):
            done += kill_after([*start, out], choose.uniform(0.2, 1.0) * seconds)
        run_to_the_end([*start, out])
        assert folder_bytes(out) == folder_bytes(whole)
        assert not list(tmp_path.glob(".*"))


def test_two_kills(tmp_path: Path, model_path: Path, inputs: list[Path]) -> None:
    check_kills(tmp_path, model_path, inputs, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills(tmp_path: Path, model_path: Path, inputs: list[Path]) -> None:
    check_kills(tmp_path, model_path, inputs, kills=20, seed=time.time_ns() % 1000)


def test_a_killed_merge_resumes(tmp_path: Path, model_path: Path, inputs: list[Path]) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    options = ["--tokenizer", model_path, "--workers", "2", "--valid-share", "0.1"]
    start = [sys.executable, program, "prepare", "--input", *inputs, *options]
    run_to_the_end([*start, "--out", tmp_path / "whole"])
    for index in range(2):
        run_to_the_end([*start, "--out", tmp_path / "d", "--shard", f"{index}/2"])
    merge = [sys.executable, program, "merge", "--out", tmp_path / "d", "--workers", "1"]
    for seconds in (0.5, 0.8):
        kill_after(merge, seconds)
    if not (tmp_path / "d").exists():
        run_to_the_end(merge)
    assert folder_bytes(tmp_path / "d") == folder_bytes(tmp_path / "whole")
