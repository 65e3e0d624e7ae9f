"""A line of 200 MB, plain or unpacked from 200 kB, is one bad line and is never held."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from written_formats import zstd

LINE_BYTES = 200_000_000
GOOD = b'{"text": "a"}\n'
# ru_maxrss would be that of the process that started it.
PROGRAM = r"""
import json, re, sys
from pathlib import Path
from megatron_mode.tokens.read.lines import RefusedLine
from megatron_mode.tokens.read.readers import open_reader
def peak():
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
import megatron_mode.tokens.read.columns
before = peak()
with open_reader(Path(sys.argv[1])) as reader:
    refused = [isinstance(line, RefusedLine) for _, line in reader]
assert sum(refused) == int(sys.argv[2]), refused
print(json.dumps([len(refused) - sum(refused), (peak() - before) // 1024]))
"""


def pieces() -> Iterator[bytes]:
    yield GOOD
    yield b'{"text": "'
    for _ in range(LINE_BYTES // 1_000_000):
        yield b"x" * 1_000_000
    yield b'"}\n' + GOOD


def read_in_process(path: Path, bad_lines: int) -> tuple[int, int]:
    """Return the number of documents read and how much memory that took, in MiB."""
    words = [sys.executable, "-c", PROGRAM, str(path), str(bad_lines)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    documents, mebibytes = json.loads(done.stdout)
    return documents, mebibytes


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_line_of_200_megabytes_is_not_held(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.jsonl.zst":
        path.write_bytes(zstd(b"".join(pieces())))
    else:
        with path.open("wb") if name == "a.jsonl" else gzip.open(path, "wb", 1) as stream:
            stream.writelines(pieces())
    assert path.stat().st_size < 2_000_000 or name == "a.jsonl"
    documents, mebibytes = read_in_process(path, bad_lines=1)
    print(f"{path.name}: {mebibytes} MiB")
    path.unlink()
    assert documents == 2
    assert mebibytes < 100


def test_a_table_of_200_megabytes_streams(tmp_path: Path) -> None:
    """Arrow streams are mapped, which counts as memory though the system may drop it: not here."""
    texts = [f"{i:06} " + "sea " * 2500 for i in range(1000)]
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(tmp_path / "a.parquet", schema, compression="none") as writer:
        table = pa.table({"text": [text + str(n) for n in range(20) for text in texts]})
        writer.write_table(table, row_group_size=len(table))
    assert (tmp_path / "a.parquet").stat().st_size > LINE_BYTES
    documents, mebibytes = read_in_process(tmp_path / "a.parquet", bad_lines=0)
    print(f"a.parquet: {mebibytes} MiB")
    assert documents == 20_000
    assert mebibytes < 200
