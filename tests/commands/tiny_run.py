"""Start commands as a user does, and give them a corpus and a config that take no time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mode.__main__ import run_verb

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ROOT / "launch" / "pretrain.py"
SEAS = ("Pacific", "Atlantic", "Indian", "Arctic", "Baltic", "Red", "Black", "Dead", "North")

RUN_FILE = """\
model: {name: smallest, layers: 2, hidden_size: 32, ffn_hidden_size: 48, attention_heads: 2,
        kv_heads: 1, seq_len: 32}
mix:
  mode1: {sources: [{name: books}]}
  mode2: {sources: [{name: chat}]}
  valid: {sources: [{name: books-valid}, {name: chat-valid-plain}, {name: chat-valid-chat}]}
run: {steps: 3, eval_every_steps: 2, eval_rows: 4, threads: 1}
batch: {global_rows: 4, micro_rows: 2}
optimizer: {learning_rate: 1e-3, schedule: constant}
checkpoint: {every_steps: 2}
"""


class Outcome(NamedTuple):
    """Hold what a command said and how it ended."""

    status: int
    out: str
    err: str


class Trained(NamedTuple):
    """Name what the small training run read and wrote."""

    config: Path
    data: Path
    run: Path
    input: Path


def variables(**more: str) -> dict[str, str]:
    """Return the environment of a command: one thread, no launcher's variables but those given."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "NO_COLOR")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
    return {**kept, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", **more}


def before_others(folder: Path) -> str:
    """Return a PYTHONPATH in which the modules of a folder come first."""
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def command(*words: str | Path, **more: str) -> Outcome:
    """Run Python with these words in the repository."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=variables(**more),
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def refusal(outcome: Outcome) -> str:
    """Return the sentence of a refused command, after checking that nothing else was said."""
    assert outcome.status == 2, outcome
    assert outcome.err.startswith("error: "), outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    return outcome.err


def checkpoint(run: Path, step: int) -> Path:
    """Return the folder of a run's checkpoint."""
    return run / "checkpoints" / f"step-{step:08d}"


def tree(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder with their bytes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def documents() -> list[dict[str, Any]]:
    """Return a few texts and dialogues, some longer than a row of the small model."""
    found: list[dict[str, Any]] = [
        {"id": f"t{i}", "source": "books", "text": f"The {sea} sea, page {i}. " * (1 + i % 9)}
        for i, sea in enumerate(SEAS * 5)
    ]
    for i, sea in enumerate(SEAS * 5):
        turns = [("user", f"Where is the {sea} sea?"), ("assistant", f"Look at page {i}.")]
        messages = [{"role": role, "content": content} for role, content in turns * (1 + i % 3)]
        found.append({"id": f"d{i}", "source": "chat", "messages": messages})
    return found


def write_jsonl(path: Path, objects: list[dict[str, Any]]) -> Path:
    """Write objects as JSON lines."""
    path.write_text("".join(json.dumps(value) + "\n" for value in objects), encoding="utf-8")
    return path


def prepare(out: Path, path: Path, *more: str) -> None:
    """Prepare a corpus with a vocabulary of 320 pieces, 384 with padding."""
    words = ["--out", str(out), "--input", str(path), "--vocab-size", "320", "--json"]
    assert run_verb(["prepare", *words, "--valid-share", "0.3", *more]) == 0
