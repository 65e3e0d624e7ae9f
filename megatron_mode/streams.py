"""Keep a program running when its output cannot be written, and escape what an encoding lacks.

A log's reader that dies, a full disk and a closed descriptor must not end the work of many hours.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import json
import os
import sys
from collections.abc import Callable
from typing import TextIO

ESCAPE = "megatron_mode.escape"
Note = Callable[[str], bool]


class LastingOutput(io.FileIO):
    """Write to a descriptor and drop what it refuses; the text layers above never see an error."""

    def __init__(self, descriptor: int, name: str, note: Note) -> None:
        """Call `note` with a sentence at each loss, until it returns True."""
        super().__init__(descriptor, "w", closefd=False)
        self.name, self._note, self._is_noted = name, note, False

    def write(self, data: object, /) -> int:
        """Write some bytes and return how many; all are counted where they are dropped."""
        block = memoryview(data)  # type: ignore[arg-type]  # typeshed has no name for it in 3.11
        try:
            return os.write(self.fileno(), block)
        except OSError as error:
            if error.errno == errno.EPIPE:
                # A reader never comes back, and subprocesses would die of SIGPIPE.
                _discard(self.fileno())
            if not self._is_noted:
                self._is_noted = self._note(
                    f"{self.name} cannot be written ({error.strerror}): what the program prints "
                    "is lost, its files are not"
                )
        return block.nbytes


def open_streams() -> None:
    """Make stdout and stderr fit for every verb: open, encodable, and stderr never an error.

    A character that the encoding lacks is written as JSON writes it, so JSON remains valid.
    """
    codecs.register_error(ESCAPE, _escape)
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        if stream is None:  # closed by the caller: the next file opened would get its number
            _discard(descriptor)
    sys.stdout = sys.stdout or os.fdopen(os.dup(1), "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=ESCAPE)
    sys.stderr = _lasting(sys.stderr, 2, "stderr", lambda _: True)


def outlast_readers(note: Note) -> None:
    """Let no write to stdout or stderr fail from now on.

    At a loss `note` gets a sentence, until it returns True for one.
    """
    noted: list[str] = []

    def note_once(sentence: str) -> bool:
        if not noted and note(sentence):
            noted.append(sentence)
        return bool(noted)

    sys.stdout = _lasting(sys.stdout, 1, "stdout", note_once)
    sys.stderr = _lasting(sys.stderr, 2, "stderr", note_once)


def discard_stdout() -> None:
    """Drop what stdout still holds: Python writes it once more at exit."""
    with contextlib.suppress(OSError):
        _discard(sys.stdout.fileno())


def _lasting(stream: TextIO | None, descriptor: int, name: str, note: Note) -> TextIO:
    """Return a stream that lasts; a stream that is not the descriptor's own is left alone."""
    encoding = None
    if stream is not None:
        try:
            stream.flush()
            is_own = stream.fileno() == descriptor
        except (OSError, ValueError):
            is_own = False
        if not is_own:
            return stream
        encoding = stream.encoding
    raw = io.BufferedWriter(LastingOutput(descriptor, name, note))
    return io.TextIOWrapper(raw, encoding=encoding, errors=ESCAPE, line_buffering=True)


def _discard(descriptor: int) -> None:
    """Point a descriptor at nothing, also for subprocesses."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
    os.set_inheritable(descriptor, True)


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end
