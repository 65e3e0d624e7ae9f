"""What became of a checkpoint is one sentence; a fault of the program is not called a full disk."""

from __future__ import annotations

import errno

from megatron_mode.checkpoint.save import failure_of


def test_a_full_disk_is_told_with_what_is_left(tmp_path):
    error = OSError(errno.ENOSPC, "No space left on device")
    said = failure_of(tmp_path / "step-00000001.partial", error)
    assert "step-00000001 cannot be written (No space left on device): the disk has" in said
    assert "bytes left; free space and start the run again" in said


def test_a_fault_of_the_program_is_not_called_a_full_disk(tmp_path):
    said = failure_of(tmp_path / "step-00000001.partial", TypeError("no such state"))
    assert "step-00000001 cannot be written (TypeError: no such state): start the run" in said
    assert "disk" not in said
