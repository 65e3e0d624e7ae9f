"""Files are hashed as they are written, read back, and held against their records."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mode.checkpoint import files
from megatron_mode.checkpoint.files import FileRecord, differences, save_tensors


def record_of(path):
    data = path.read_bytes()
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def test_the_record_is_that_of_the_bytes_on_the_disk(tmp_path):
    state = {"weight": torch.arange(100_000.0), "step": 7, "nested": [torch.ones(3, 5)]}
    record = save_tensors(state, tmp_path / "state.pt")
    assert record == record_of(tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.equal(loaded["weight"], state["weight"])
    assert loaded["step"] == 7
    assert torch.equal(loaded["nested"][0], state["nested"][0])


def test_a_disk_that_keeps_other_bytes_is_told(tmp_path, monkeypatch):
    """The file is read back: here the disk loses its last byte between both."""
    path = tmp_path / "state.pt"
    describe = files.describe

    def torn(of):
        of.write_bytes(of.read_bytes()[:-1] + b"?")
        return describe(of)

    monkeypatch.setattr(files, "describe", torn)
    with pytest.raises(OSError, match=r"kept other bytes of .*state\.pt"):
        save_tensors({"a": torch.ones(10)}, path)


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_full_disk_is_an_oserror_whatever_torch_makes_of_it(size):
    with pytest.raises(OSError, match="No space left on device"):
        save_tensors({"a": torch.ones(size)}, Path("/dev/full"))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_changed_byte_is_found(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("files")
    contents = data.draw(
        st.dictionaries(st.sampled_from("abcdef"), st.binary(min_size=1, max_size=300), min_size=1)
    )
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    records = {name: record_of(folder / name) for name in contents}
    assert differences(folder, records, records) == {}
    name = data.draw(st.sampled_from(sorted(contents)))
    old = contents[name]
    at = data.draw(st.integers(0, len(old) - 1))
    change = data.draw(st.integers(1, 255))
    (folder / name).write_bytes(old[:at] + bytes([old[at] ^ change]) + old[at + 1 :])
    assert "has SHA-256" in differences(folder, records, records)[name]
    (folder / name).write_bytes(old[: data.draw(st.integers(0, len(old) - 1))])
    assert f"bytes instead of {len(old)}" in differences(folder, records, records)[name]
    (folder / name).unlink()
    assert differences(folder, records, records) == {name: "is missing"}
