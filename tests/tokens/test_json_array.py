"""A .json file of one array gives its elements, whatever the pieces it is read in."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from written_formats import OBJECTS, Objects, zstd

from megatron_mode.errors import DataError
from megatron_mode.tokens.documents import read_documents
from megatron_mode.tokens.read.readers import open_reader


@given(objects=OBJECTS, indent=st.sampled_from([None, 1]))
@settings(max_examples=40)
def test_an_array_is_read_by_element(
    tmp_path_factory: pytest.TempPathFactory, objects: Objects, indent: int | None
) -> None:
    folder = tmp_path_factory.mktemp("arrays")
    for name in ("a.json", "a.json.gz", "a.json.zst"):
        data = json.dumps(objects, indent=indent).encode("utf-8-sig")
        pack = {".gz": gzip.compress, ".zst": zstd}.get(Path(name).suffix, bytes)
        (folder / name).write_bytes(pack(data))
        with (
            pytest.MonkeyPatch.context() as patch,
            open_reader(folder / name) as reader,
        ):
            patch.setattr("megatron_mode.tokens.read.json_array.READ_BYTES", 3)
            found = [(number, json.loads(line)) for number, line in reader]
        assert found == list(enumerate(objects, 1))


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ('[{"text": "a"}, {"text"}]', ":2: element 2 of the JSON array is malformed"),
        ('[{"text": "a"}, ', ":2: element 2 of the JSON array is malformed"),
        ('[{"text": "a"} {"text": "a"}]', "followed by '{\"text\": \"' where ']' is expected"),
        ('[{"text": "a"}', "is followed by 'the end of the file'"),
        ('[{"text": "a"}]\n[]', "text follows the array"),
        ('[{"text": "\udcff"}]', "is not UTF-8"),
    ],
)
def test_a_broken_array_is_named(tmp_path: Path, text: str, fragment: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=re.escape(fragment)):
        list(read_documents(tmp_path / "a.json"))
