"""What torch raises on a full disk becomes one sentence; other errors stay what they are."""

from __future__ import annotations

import pytest

from megatron_mode.checkpoint.save import failure_of, told_in_a_sentence
from megatron_mode.errors import CheckpointError


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"),
        OSError(28, "No space left on device"),
    ],
)
def test_a_torn_file_is_told_and_removed(error, tmp_path):
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    told = pytest.raises(CheckpointError, match=r"cannot be written \(.*\): the disk has")
    with told, told_in_a_sentence(folder):
        raise error
    assert not folder.exists()


def test_another_error_is_left_alone(tmp_path):
    told = pytest.raises(RuntimeError, match="Connection closed by peer")
    with told, told_in_a_sentence(tmp_path):
        raise RuntimeError("Connection closed by peer")


def test_a_fault_of_the_program_is_not_called_a_full_disk(tmp_path):
    said = failure_of(tmp_path / "step-00000001.partial", TypeError("no such state"))
    assert "step-00000001 cannot be written (TypeError: no such state): start the run" in said
    assert "disk" not in said
