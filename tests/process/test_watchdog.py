"""The watchdog counts only the time in which this process could have moved, and names the late."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_mode.config.fields import HealthConfig
from megatron_mode.process import watchdog
from megatron_mode.process.watchdog import Arrival, Watchdog

STALL_SECONDS = 0.5


def make_dog(
    folder: Path, stall_seconds: float = STALL_SECONDS, start_stall_seconds: float = 0.1
) -> Watchdog:
    health = HealthConfig(stall_seconds=stall_seconds, start_stall_seconds=start_stall_seconds)
    return Watchdog(folder, health)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Stand for a group of one rank; note the end of a run instead of exiting."""
    monkeypatch.setattr(watchdog.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(watchdog.dist, "get_world_size", lambda: 20)
    monkeypatch.setattr(watchdog.dist, "broadcast_object_list", lambda objects, src: None)
    event = threading.Event()

    def note(self: Watchdog) -> None:
        event.set()
        self._ended.wait()

    monkeypatch.setattr(Watchdog, "_end_run", note)
    return event


def test_beats_keep_a_run_alive_and_silence_ends_it(ended: threading.Event, tmp_path: Path) -> None:
    with make_dog(tmp_path) as dog:
        begin = time.monotonic()
        while time.monotonic() - begin < 3 * STALL_SECONDS:
            dog.beat("step 1")
            time.sleep(0.05)
        assert not ended.is_set()
        assert ended.wait(20)


def test_a_start_and_long_work_may_take_longer(ended: threading.Event, tmp_path: Path) -> None:
    with make_dog(tmp_path, STALL_SECONDS, 60.0) as dog:
        assert not ended.wait(3 * STALL_SECONDS)
        dog.beat("step 0", is_long=True)
        assert not ended.wait(3 * STALL_SECONDS)
        assert "no progress for 60 s (health.start_stall_seconds) in step 0" in dog._sentence({})
        dog.beat("step 1")
        assert ended.wait(20)
        assert "no progress for 0.5 s (health.stall_seconds) in step 1" in dog._sentence({})


def test_a_call_of_another_rank_ends_it_at_once(ended: threading.Event, tmp_path: Path) -> None:
    dog = make_dog(tmp_path, 1000.0)
    dog._interval_seconds = 0.01
    with dog:
        dog._call.parent.mkdir()
        dog._call.touch()
        assert ended.wait(5)


def test_zero_watches_nothing(ended: threading.Event, tmp_path: Path) -> None:
    with make_dog(tmp_path, 0.0) as dog:
        assert not dog._thread.is_alive()


def test_time_in_which_the_process_was_stopped_does_not_count(
    ended: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks of a laptop that was closed for an hour look as if they had stalled."""
    clock: Callable[[], float] = time.monotonic
    jump = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock() + jump[0])
    with make_dog(tmp_path, 5.0):
        jump[0] = 3600.0
        assert not ended.wait(2.0)


@pytest.mark.parametrize("blocked", [True, False])
def test_a_stall_is_told_also_where_no_stacks_can_be_written(
    blocked: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The disk may be the reason of it."""
    monkeypatch.setattr(watchdog.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(watchdog.dist, "get_world_size", lambda: 2)
    told: list[str] = []
    statuses: list[int] = []
    monkeypatch.setattr(watchdog.os, "_exit", statuses.append)
    if blocked:
        (tmp_path / "stacks").touch()
    dog = make_dog(tmp_path)
    dog.report = told.append
    dog._number, dog._call, dog._grace_seconds = "7", tmp_path / "stacks/stall-7", 0.2
    dog.beat("step 3")
    dog._end_run()
    assert statuses == [4]
    assert len(told) == 1
    assert "in step 3: rank 0 has not arrived" in told[0]
    assert (tmp_path / "stacks/rank-00001.txt").exists() is not blocked


def test_the_sentence_names_who_is_missing_or_behind(
    ended: threading.Event, tmp_path: Path
) -> None:
    dog = make_dog(tmp_path, 3.0)
    there = {rank: Arrival(7, "step 6") for rank in range(20)}
    assert "in step 6: all ranks are inside it" in dog._sentence(there)
    behind = {**there, 4: Arrival(6, "step 5")}
    assert "in step 6: rank 4 has not arrived" in dog._sentence(behind)
    missing = {rank: there[rank] for rank in range(20) if rank not in (0, 19)}
    assert "in step 6: ranks 0, 19 have not arrived" in dog._sentence(missing)
    alone = {3: there[3]}
    assert "ranks 0, 1, 2, 4, 5, 6, 7, 8 and 11 more have not arrived" in dog._sentence(alone)
