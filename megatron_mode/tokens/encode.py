"""Turn batches of JSON lines into staged parts, in this process or in several.

Batches are cut the same way and come back in order whatever the number of workers, so the result
does not depend on it.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mode.errors import DataError
from megatron_mode.tokens.documents import BadLineError, Document, file_stem, parse_line
from megatron_mode.tokens.readers import open_reader
from megatron_mode.tokens.split import Output, Split, mode_token_key
from megatron_mode.tokens.template import render_batch
from megatron_mode.tokens.tokenizer import Tokenizer

BATCH_BYTES = 1 << 20
BATCH_LINES = 1024
PENDING_BATCHES_PER_WORKER = 3

RENDERING_CODES = ("chat", "plain")

ReportProgress = Callable[[int], None]


@dataclass
class StagedPart:
    """Hold the documents of one batch that go to one prepared source."""

    name: str
    source: str
    mode: int
    tokens: bytearray = field(default_factory=bytearray)
    flags: bytearray = field(default_factory=bytearray)
    renderings: bytearray = field(default_factory=bytearray)
    ids: bytearray = field(default_factory=bytearray)
    id_lengths: array[int] = field(default_factory=lambda: array("i"))
    lengths: array[int] = field(default_factory=lambda: array("i"))
    keys: array[int] = field(default_factory=lambda: array("Q"))

    def add(self, tokens: NDArray[Any], flags: bytes, rendering: str, id: str, key: int) -> None:
        """Append one document."""
        self.tokens += tokens.tobytes()
        self.flags += flags
        self.renderings.append(RENDERING_CODES.index(rendering))
        name = id.encode()
        self.ids += name
        self.id_lengths.append(len(name))
        self.lengths.append(len(flags))
        self.keys.append(key)


@dataclass
class LineBatch:
    """Hold consecutive lines of one file with their numbers."""

    path: Path
    numbers: list[int] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)


@dataclass
class EncodedBatch:
    """Hold what became of a batch: parts by prepared source, and the lines that were bad."""

    path: Path
    parts: list[StagedPart]
    bad_lines: list[tuple[int, str]]
    lines: int


def line_batches(paths: Sequence[Path], report_progress: ReportProgress) -> Iterator[LineBatch]:
    """Cut files into batches; report_progress gets the bytes of disk read since the last call."""
    for path in paths:
        with open_reader(path) as lines:
            batch, size_bytes, position_bytes = LineBatch(path), 0, 0
            for number, line in lines:
                batch.numbers.append(number)
                batch.lines.append(line)
                size_bytes += len(line)
                if size_bytes >= BATCH_BYTES or len(batch.lines) >= BATCH_LINES:
                    yield batch
                    report_progress(lines.position_bytes - position_bytes)
                    batch, size_bytes, position_bytes = LineBatch(path), 0, lines.position_bytes
            if batch.lines:
                yield batch
            report_progress(lines.position_bytes - position_bytes)


def parse_batch(batch: LineBatch) -> tuple[list[tuple[int, Document]], list[tuple[int, str]]]:
    """Return (line number, document) of good lines and (line number, reason) of bad ones."""
    documents: list[tuple[int, Document]] = []
    bad_lines: list[tuple[int, str]] = []
    default_source = file_stem(batch.path)
    for number, line in zip(batch.numbers, batch.lines, strict=True):
        try:
            documents.append((number, parse_line(line, default_source, number)))
        except BadLineError as reason:
            bad_lines.append((number, str(reason)))
    return documents, bad_lines


def encode_batch(batch: LineBatch, tokenizer: Tokenizer, split: Split) -> EncodedBatch:
    """Parse, render and tokenise a batch."""
    numbered, bad_lines = parse_batch(batch)
    routed: list[tuple[Document, Output]] = [
        (document, output)
        for number, document in numbered
        for output in split.outputs(document, number)
    ]
    rendered = render_batch(
        [document for document, _ in routed],
        [output.rendering for _, output in routed],
        tokenizer,
    )
    parts: dict[tuple[str, str, int], StagedPart] = {}
    dtype = np.dtype(tokenizer.vocabulary.token_dtype)
    control = tokenizer.control
    for (document, output), without in zip(routed, rendered, strict=True):
        places_key = mode_token_key(split.seed, document)
        ids, flags = split.mode_tokens.insert(without, control, places_key)
        where = (output.name, document.source, document.mode)
        part = parts.setdefault(where, StagedPart(*where))
        key = split.order_key(document.source, document.id)
        part.add(np.array(ids, dtype), flags, output.rendering, document.id, key)
    return EncodedBatch(batch.path, list(parts.values()), bad_lines, len(batch.lines))


@functools.lru_cache(maxsize=1)
def load_once(model_path: Path) -> Tokenizer:
    """Load a tokenizer once in each worker."""
    return Tokenizer.from_bytes(model_path.read_bytes(), str(model_path))


def encode_in_worker(batch: LineBatch, model_path: Path, split: Split) -> EncodedBatch:
    """Do encode_batch in a worker."""
    return encode_batch(batch, load_once(model_path), split)


def follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end when the parent is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def encoded_batches(
    batches: Iterator[LineBatch], model_path: Path, split: Split, workers: int
) -> Iterator[EncodedBatch]:
    """Yield the batches encoded, in order, with a bounded number of them in flight."""
    if workers == 1:
        for batch in batches:
            yield encode_in_worker(batch, model_path, split)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=follow_parent
    )
    pending: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(encode_in_worker, batch, model_path, split))
            if len(pending) >= PENDING_BATCHES_PER_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            f"A tokenising worker died (--workers {workers}); it was probably out of memory, so "
            "give fewer --workers."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
