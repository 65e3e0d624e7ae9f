"""What cannot be read may be whole: only other contents are damage."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace

import pytest

from megatron_mode.checkpoint import files
from megatron_mode.checkpoint.manifest import check_files
from megatron_mode.errors import CheckpointError, DamagedError


@pytest.fixture
def manifest(tmp_path):
    """Name two files of a folder as they are."""
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    return SimpleNamespace(files={name: files.describe(tmp_path / name) for name in ("a", "b")})


def test_another_content_is_damage(manifest, tmp_path):
    check_files(tmp_path, manifest, ["a", "b"])
    (tmp_path / "b").write_text("c")
    with pytest.raises(DamagedError, match="is damaged: b has SHA-256"):
        check_files(tmp_path, manifest, ["a", "b"])


def test_a_file_that_is_not_let_be_read_is_none(manifest, tmp_path, monkeypatch):
    """It would be set aside, and the next start would resume without it."""

    def denied(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(files, "describe", denied)
    with pytest.raises(CheckpointError, match=r"cannot be checked: a cannot be read") as caught:
        check_files(tmp_path, manifest, ["a"])
    assert not isinstance(caught.value, DamagedError)
