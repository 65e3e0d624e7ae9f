"""Prepare a few documents and train a very small model on them, once for all tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_mode.__main__ import exit_status, run_verb

ROOT = Path(__file__).resolve().parents[2]
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


def command(*words: str | Path, **variables: str) -> Outcome:
    """Run Python with these words on one thread, in the repository."""
    environment = {
        **os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "", **variables
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def pretrain(config: Path, *overrides: str, **variables: str) -> Outcome:
    """Start a training process."""
    return command(ROOT / "launch" / "pretrain.py", "--config", config, *overrides, **variables)


def refusal(outcome: Outcome) -> str:
    """Return the one sentence of a refused command, after checking that it is one."""
    assert outcome.status == 2, outcome.err
    assert outcome.err.startswith("error: "), outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    return outcome.err


def lines() -> list[dict[str, object]]:
    """Return a few texts and dialogues, some longer than a row of the small model."""
    texts: list[dict[str, object]] = [
        {"id": f"t{i}", "source": "books", "text": f"The {sea} sea, page {i}. " * (1 + i % 9)}
        for i, sea in enumerate(SEAS * 5)
    ]
    for i, sea in enumerate(SEAS * 5):
        turns = [("user", f"Where is the {sea} sea?"), ("assistant", f"Look at page {i}.")]
        messages = [{"role": role, "content": content} for role, content in turns * (1 + i % 3)]
        texts.append({"id": f"d{i}", "source": "chat", "messages": messages})
    return texts


def write_jsonl(path: Path, objects: list[dict[str, object]]) -> Path:
    """Write objects as JSON lines."""
    path.write_text("".join(json.dumps(value) + "\n" for value in objects))
    return path


def prepare(out: Path, path: Path, *more: str) -> None:
    """Prepare a corpus with a vocabulary of 320 pieces."""
    words = ["--out", str(out), "--input", str(path), "--vocab-size", "320", "--json"]
    assert run_verb(["prepare", *words, "--valid-share", "0.3", *more]) == 0


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train for three steps through the command line; a checkpoint after the second and third."""
    folder = tmp_path_factory.mktemp("trained")
    files = Trained(folder / "run.yaml", folder / "data", folder / "run", folder / "in.jsonl")
    prepare(files.data, write_jsonl(files.input, lines()))
    files.config.write_text(RUN_FILE)
    outcome = pretrain(files.config, f"data.root={files.data}", f"run.dir={files.run}")
    assert outcome.status == 0, outcome.err
    return files


class Verb:
    """Run a verb in this process and keep what it said."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str | Path) -> Outcome:
        self._capsys.readouterr()
        status = exit_status(lambda: run_verb([str(word) for word in words]))
        return Outcome(status, *self._capsys.readouterr())


@pytest.fixture
def verb(capsys: pytest.CaptureFixture[str]) -> Verb:
    """Return the runner of verbs."""
    return Verb(capsys)


def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount a tmpfs for the time of a test; skip the test where that is not permitted."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "fixed", "size=256k,ro")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk that holds a run folder's first files but no checkpoint of the small model."""
    yield from mounted(tmp_path / "small", "size=300k")
