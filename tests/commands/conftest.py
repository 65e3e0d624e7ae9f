"""Prepare a few documents and train a very small model on them, once for all tests."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside the tests

import forked_pretrain
import tiny_run
from tiny_run import Outcome, Trained

from megatron_mode.__main__ import run_verb
from megatron_mode.command_line import exit_status
from megatron_mode.commands import train as train_command
from megatron_mode.process import failures


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, server: forked_pretrain.Server) -> Trained:
    """Train for three steps by the command line; checkpoints after the second and the third."""
    folder = tmp_path_factory.mktemp("trained")
    files = Trained(folder / "run.yaml", folder / "data", folder / "run", folder / "in.jsonl")
    tiny_run.prepare(files.data, tiny_run.write_jsonl(files.input, tiny_run.documents()))
    files.config.write_text(tiny_run.RUN_FILE)
    places = (f"data.root={files.data}", f"run.dir={files.run}")
    outcome = server.run("--config", files.config, *places)
    assert outcome.status == 0, outcome.err
    return files


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> forked_pretrain.Server:
    """Offer runs of launch/pretrain.py that need not import torch again."""
    return forked_pretrain.Server(tmp_path_factory.mktemp("said"))


@pytest.fixture
def pretrain(
    server: forked_pretrain.Server, trained: Trained, tmp_path: Path
) -> Callable[..., Outcome]:
    """Train with overrides on the small corpus, by default into a folder of the test's own."""

    def call(*overrides: str, **more: Any) -> Outcome:
        places = (f"data.root={trained.data}", f"run.dir={tmp_path / 'run'}")
        return server.run("--config", trained.config, *places, *overrides, **more)

    return call


@pytest.fixture
def verb(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a verb in this process."""

    def call(*words: str | Path) -> Outcome:
        capsys.readouterr()
        # With a thread a core, a busy machine makes small matrices slow.
        threads = ("--threads", "1") if words[0] in ("score", "generate") else ()
        status = exit_status(lambda: run_verb([*map(str, words), *threads]))
        return Outcome(status, *capsys.readouterr())

    return call


@pytest.fixture
def call_program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Outcome]]:
    """Call a program in this process; one that trains ends where training would begin."""
    trainer = types.ModuleType("megatron_mode.train")
    vars(trainer)["train"] = lambda config, process, request: None
    monkeypatch.setitem(sys.modules, "megatron_mode.train", trainer)
    monkeypatch.setattr(failures, "_is_joined", lambda: False)  # by tests before this one
    for name in [n for n in os.environ if n.startswith(("RANK", "WORLD_", "LOCAL_", "SLURM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(train_command.os, "_exit", sys.exit)
    environment = dict(os.environ)
    # The program takes both signals for itself; a test run must still end on them.
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(program: str, words: list[str]) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if program == "pretrain":
                with pytest.raises(SystemExit) as end:
                    train_command.main(words)
                status = end.value.code
            else:
                status = exit_status(lambda: run_verb([program, *words]))
        os.environ.clear()
        os.environ.update(environment)
        return Outcome(status, out.getvalue(), err.getvalue())

    with warnings.catch_warnings():
        yield call


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
def mount() -> Iterator[Callable[[Path, str], Path]]:
    """Mount a tmpfs at a folder with these options for the time of a test."""
    with contextlib.ExitStack() as stack:
        mounting = contextlib.contextmanager(mounted)
        yield lambda folder, options: stack.enter_context(mounting(folder, options))


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk that takes nothing, not even from root, whom modes do not stop."""
    yield from mounted(tmp_path / "fixed", "size=256k,ro")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk that holds a run folder's first files but no checkpoint of the small model."""
    yield from mounted(tmp_path / "small", "size=256k")
