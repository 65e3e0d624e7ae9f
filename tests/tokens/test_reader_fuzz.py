"""Random, cut and flipped bytes give documents or one sentence: no crash, no hang, no loss.

READER_FUZZ_SECONDS sets the time to spend (default 60). Each example is read in a child process
that is forked once for many, because a crash inside a library would take this process with it.
"""

from __future__ import annotations

import gzip
import io
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from written_formats import OBJECTS, WRITERS, json_lines, zstd

from megatron_mode.errors import DataError
from megatron_mode.tokens.documents import BadLineError, parse_line
from megatron_mode.tokens.read import readers
from megatron_mode.tokens.read.lines import RefusedLine
from megatron_mode.tokens.read.readers import open_reader

# A damaged page header makes pyarrow allocate up to 2 GiB before it refuses: 13 s when busy.
HANG_SECONDS = 90
FILES_PER_EXAMPLE = 25
MAGIC = tuple(magic for kinds in readers.MAGIC.values() for magic in kinds)
PIECES = [
    *(b'{"text": "', b'"}', b"\n", b"\r\n", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"[" * 50),
    *(b'{"messages": [{"role": "user", "content": "a"}]', b', "tools": "', b"\\ud800"),
    *(b"\x1f\x8b\x08\0", b"\x28\xb5\x2f\xfd", b"PAR1", b"ARROW1\0\0", b"\xff" * 4),
]


def outcome(path: Path) -> tuple[int, int, bool]:
    """Return (documents, bad lines, whether the file was refused); anything else is a bug."""
    good = bad = 0
    try:
        with open_reader(path) as reader:
            for number, line in reader:
                try:
                    parse_line(line, "s", number)
                    good += 1
                except BadLineError as reason:
                    bad += bool(str(reason))
    except DataError as error:
        if str(path) not in str(error):
            raise
        return good, bad, True
    return good, bad, False


def serve(connection: Connection) -> None:
    """Read one file after the other; ended by SIGALRM when one takes too long."""
    while True:
        path = connection.recv()
        signal.alarm(HANG_SECONDS)
        try:
            connection.send(outcome(path))
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")
        signal.alarm(0)


class Child:
    """Hold the process that reads; a new one takes the place of one that died."""

    def __init__(self) -> None:
        self.executions = 0
        self.start()

    def start(self) -> None:
        self._connection, other = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("fork").Process(
            target=serve, args=(other,), daemon=True
        )
        self._process.start()
        other.close()

    def read(self, path: Path) -> tuple[int, int, bool]:
        self.executions += 1
        try:
            self._connection.send(path)
            found = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            self.start()
            raise AssertionError(f"the reader died with exit code {code}") from None
        assert not isinstance(found, str), found
        documents, bad_lines, refused = found
        return documents, bad_lines, refused

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()


def expected_lines(data: bytes) -> int:
    """Count the lines of plain text that are not blank."""
    return sum(not line.isspace() for line in io.BytesIO(data.removeprefix(b"\xef\xbb\xbf")))


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Return a file with some of its bytes flipped, cut off, dropped, doubled or put in."""
    changed = bytearray(data)
    for _ in range(chance.choice([0, 1, 1, 1, 2, 3, 8])):
        place = chance.randrange(len(changed) + 1)
        length = chance.randrange(40)
        how = chance.choice(["flip", "byte", "cut", "drop", "double", "insert"])
        if how == "flip" and place < len(changed):
            changed[place] ^= 1 << chance.randrange(8)
        elif how == "byte" and place < len(changed):
            changed[place] = chance.choice([0, 1, 10, 34, 92, 127, 128, 255])
        elif how == "cut":
            del changed[place:]
        elif how == "drop":
            del changed[place : place + length]
        elif how == "double":
            changed[place:place] = changed[place : place + length]
        elif how == "insert":
            changed[place:place] = chance.choice(PIECES)
    return bytes(changed)


@st.composite
def valid(draw: st.DrawFn) -> tuple[str, bytes]:
    """Return a file of any format."""
    name = draw(st.sampled_from(list(WRITERS)))
    return name, WRITERS[name](draw(OBJECTS))


@st.composite
def made_up(draw: st.DrawFn) -> tuple[str, bytes]:
    """Return a file of pieces of formats, perhaps packed whole, so that the lines are reached."""
    data = b"".join(draw(st.lists(st.sampled_from(PIECES) | st.binary(max_size=8), max_size=12)))
    name = draw(st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"]))
    pack = {"a.jsonl": bytes, "a.jsonl.gz": gzip.compress, "a.jsonl.zst": zstd}[name]
    return name, pack(data)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_anything_is_read_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = float(os.environ.get("READER_FUZZ_SECONDS", "60"))
    deadline = time.monotonic() + seconds
    child, tally = Child(), {"read": 0, "refused": 0, "bad lines": 0}
    phases = [Phase.generate, Phase.target, Phase.shrink]

    def check(file: tuple[str, bytes], seed: int) -> None:
        name, data = file
        path, chance = tmp_path / name, random.Random(seed)
        for _ in range(FILES_PER_EXAMPLE):
            changed = damaged(data, chance)
            path.write_bytes(changed)
            documents, bad_lines, refused = child.read(path)
            tally["refused" if refused else "read"] += 1
            tally["bad lines"] += bad_lines
            if name.endswith(".jsonl") and not refused and not changed.startswith(MAGIC):
                assert documents + bad_lines == expected_lines(changed)

    while time.monotonic() < deadline:
        settings(
            max_examples=100, database=None, phases=phases, suppress_health_check=list(HealthCheck)
        )(given(valid() | made_up(), st.integers(0, 2**32))(check))()
    child.stop()
    with capsys.disabled():
        print(f"\n{child.executions} files in {seconds:.0f} s: {tally}")
    assert child.executions > 10 * seconds


def test_refused_lines_travel_to_workers() -> None:
    """They keep their type when pickled, or a worker would parse the reason as JSON."""
    import pickle

    line = pickle.loads(pickle.dumps(RefusedLine(b"too long")))
    with pytest.raises(BadLineError, match="too long"):
        parse_line(line, "s", 1)
    assert expected_lines(json_lines([{"a": 1}] * 3)) == 3
