"""The first process that fails gives all of them its status; the others keep quiet."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_mode.errors import ExitStatus
from megatron_mode.process import failures


@pytest.fixture
def joined(monkeypatch):
    """Stand for a group that has been joined, with a store of its own."""
    store = dist.HashStore()
    monkeypatch.setattr(failures, "_store", lambda: store)
    monkeypatch.setattr(failures, "_is_joined", lambda: True)
    monkeypatch.setattr(failures, "OUTLAST_SECONDS", 0.2)
    return store


def ranks(count):
    return [{"RANK": str(rank), "WORLD_SIZE": str(count)} for rank in range(count)]


@pytest.mark.parametrize("status", [1, 2, 3, 4])
def test_the_others_leave_with_the_status_of_the_first(joined, status):
    first, *others = ranks(3)
    assert failures.note_failure(status) == 1
    assert [failures.peers_status(other) for other in others] == [status] * 2
    failures.outlast_peers(first)
    assert int(joined.add(failures.COUNT_KEY, 0)) == 3


def test_the_first_to_fail_with_a_fault_is_one_itself(joined):
    first, second = ranks(2)
    assert failures.peers_status(first) is None
    assert failures.peers_status(second) == ExitStatus.FAULT


def test_one_speaks_and_one_writes_it_down(joined):
    first, second = ranks(2)
    assert failures.wait_to_speak(first, 2, lambda: False)
    assert not failures.wait_to_speak(second, 2, lambda: False)
    assert [failures.is_first_to_tell() for _ in range(3)] == [True, False, False]


def test_a_status_that_is_still_on_its_way_is_waited_for(joined):
    joined.set_timeout(timedelta(seconds=5))
    joined.add(failures.COUNT_KEY, 1)
    late = threading.Timer(0.05, joined.set, (failures.STATUS_KEY, "3"))
    late.start()
    assert failures.peers_status(ranks(2)[1]) == 3
    late.join()
    joined.delete_key(failures.STATUS_KEY)
    assert failures.peers_status(ranks(2)[1]) == ExitStatus.FAULT, "it never comes"


def test_a_lost_peer_is_told_from_a_file_that_does_not_fit():
    lost = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
    for error in (
        RuntimeError(lost),
        dist.DistNetworkError("timed out"),
        dist.DistBackendError(""),
    ):
        assert failures.is_torn(error)
    for error in (RuntimeError("size mismatch for weight"), OSError("reset by peer"), ValueError()):
        assert not failures.is_torn(error)


def test_a_rank_whose_store_is_gone_says_nothing_new(joined, monkeypatch):
    def gone():
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(failures, "_store", gone)
    first, second = ranks(2)
    assert failures.peers_status(second) == ExitStatus.FAULT
    assert failures.peers_status(first) is None, "it holds the store, so this is its own fault"
