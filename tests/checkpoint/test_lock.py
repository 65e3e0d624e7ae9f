"""Where a file system has no locks a note says so, and a heartbeat shows the other run."""

from __future__ import annotations

import errno
import os

import pytest

from megatron_mode import atomic
from megatron_mode.checkpoint import lock
from megatron_mode.errors import CheckpointError


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """Give a folder of a file system that refuses flock."""

    def refuse(descriptor, operation):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(atomic.fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.25)
    return tmp_path


def test_the_second_run_is_refused_at_its_start(checkpoints, capfd):
    with lock.held(checkpoints, "process 7 on a", 0.3):
        with (
            pytest.raises(CheckpointError, match="is in use by process 7 on a: only one"),
            lock.held(checkpoints, "process 8 on b", 0.3),
        ):
            pass
        assert f"note: locks do not work in {checkpoints}; .heartbeat" in capfd.readouterr().err
        assert (checkpoints / ".heartbeat").read_text().startswith("process 7 on a")
    assert not (checkpoints / ".heartbeat").exists()


def test_a_heartbeat_that_a_kill_left_is_no_run(checkpoints):
    (checkpoints / ".heartbeat").write_text("process 7 on a\n1\n")
    with lock.held(checkpoints, "process 8 on b", 0.3):
        assert (checkpoints / ".heartbeat").read_text().startswith("process 8 on b")


def test_of_two_that_start_at_once_one_is_refused(checkpoints, monkeypatch):
    """The other writes its beat right after ours."""
    real = lock.write_whole

    def write(path, text):
        real(path, text)
        return real(path, "process 7 on a\n1\n")

    monkeypatch.setattr(lock, "write_whole", write)
    with (
        pytest.raises(CheckpointError, match="is in use by process 7 on a"),
        lock.held(checkpoints, "process 8 on b", 0.3),
    ):
        pass
