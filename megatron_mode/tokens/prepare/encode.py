"""Turn batches of JSON lines into records and payload, in this process or in several.

Batches are cut the same way and come back in order whatever the number of workers, so the result
does not depend on it.
"""

from __future__ import annotations

import functools
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mode.tokens.documents import BadLineError, Document, file_stem, parse_line
from megatron_mode.tokens.prepare.records import (
    RECORD,
    Block,
    id_digest,
    numbered,
    output_code,
    position,
)
from megatron_mode.tokens.prepare.split import Output, Split, mode_token_key
from megatron_mode.tokens.prepare.workers import Workers
from megatron_mode.tokens.read.readers import open_reader
from megatron_mode.tokens.template import content_bytes, render_batch
from megatron_mode.tokens.tokenizer import Tokenizer

BATCH_BYTES = 1 << 20
BATCH_LINES = 1024

ReportProgress = Callable[[int], None]


@dataclass
class LineBatch:
    """Hold consecutive lines of one file with their numbers."""

    path: Path
    input_index: int
    number: int
    """Batches of the file before this one."""
    numbers: list[int] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)


@dataclass
class EncodedBatch:
    """Hold what became of a batch: rendered documents, and the lines that were bad."""

    path: Path
    end: tuple[int, int]
    """Input index and number of the last line."""
    blocks: dict[tuple[str, int], Block]
    """Documents by source and mode."""
    bad_lines: list[tuple[int, str]]
    ignored: Counter[str]
    """Fields of turns that change no text."""


def check_readable(paths: Sequence[Path]) -> None:
    """Raise DataError for a file that cannot be opened, before hours were spent on the others."""
    for path in paths:
        with open_reader(path):
            pass


def line_batches(
    inputs: Sequence[tuple[int, Path]], report_progress: ReportProgress
) -> Iterator[LineBatch]:
    """Cut (index, file) into batches; report_progress gets the bytes of disk read since then."""
    for index, path in inputs:
        with open_reader(path) as lines:
            batch, size_bytes, position_bytes = LineBatch(path, index, 0), 0, 0
            for number, line in lines:
                batch.numbers.append(number)
                batch.lines.append(line)
                size_bytes += len(line)
                if size_bytes >= BATCH_BYTES or len(batch.lines) >= BATCH_LINES:
                    yield batch
                    report_progress(lines.position_bytes - position_bytes)
                    batch = LineBatch(path, index, batch.number + 1)
                    size_bytes, position_bytes = 0, lines.position_bytes
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
    documents, bad_lines = parse_batch(batch)
    routed: list[tuple[Document, int, Output]] = [
        (document, number, output)
        for number, document in documents
        for output in split.outputs(document, number)
    ]
    rendered = render_batch(
        [document for document, _, _ in routed],
        [output.rendering for _, _, output in routed],
        tokenizer,
    )
    rows: dict[tuple[str, int], list[tuple[Any, ...]]] = {}
    payloads: dict[tuple[str, int], bytearray] = {}
    for (document, number, output), (ids, flags) in zip(routed, rendered, strict=True):
        if split.mode_tokens.placement != "none":
            key = mode_token_key(split.seed, document)
            with_tokens = split.mode_tokens.insert((ids.tolist(), flags), tokenizer.control, key)
            ids, flags = array("i", with_tokens[0]), with_tokens[1]
        source = document.source, document.mode
        payload = payloads.setdefault(source, bytearray())
        contents = content_bytes(document)
        name, (base, suffix) = document.id.encode(), numbered(document.id)
        row = (
            order_key(split, document, position(batch.input_index, number), output, contents),
            len(flags),
            len(name),
            text_bytes(document, contents),
            len(payload),
            id_digest(document.id),
            id_digest(base) if suffix else b"",
            suffix,
        )
        rows.setdefault(source, []).append(row)
        payload += np.frombuffer(ids, np.int32).astype(tokenizer.vocabulary.token_dtype).tobytes()
        payload += flags
        payload += name
    blocks = {key: Block(np.array(rows[key], RECORD), bytes(payloads[key])) for key in rows}
    end = (batch.input_index, batch.numbers[-1])
    ignored = Counter(name for _, document in documents for name in document.ignored)
    return EncodedBatch(batch.path, end, blocks, bad_lines, ignored)


def order_key(
    split: Split, document: Document, at: int, output: Output, contents: Sequence[bytes]
) -> bytes:
    """Return the key by which the renderings of a source's documents are sorted."""
    digest = split.order_digest(document.source, at, contents)
    return digest + at.to_bytes(8, "big") + bytes([output_code(output, document.source)])


def text_bytes(document: Document, contents: Sequence[bytes]) -> int:
    """Return the bytes of text in the contents of a document, which name the role of each turn."""
    return sum(map(len, contents if document.mode == 1 else contents[1::2]))


@functools.lru_cache(maxsize=1)
def load_once(model_path: Path) -> Tokenizer:
    """Load a tokenizer once in each worker."""
    return Tokenizer.from_bytes(model_path.read_bytes(), str(model_path))


def encode_in_worker(model_path: Path, split: Split, batch: LineBatch) -> EncodedBatch:
    """Do encode_batch in a worker."""
    return encode_batch(batch, load_once(model_path), split)


def encoded_batches(
    batches: Iterator[LineBatch], model_path: Path, split: Split, workers: Workers
) -> Iterator[EncodedBatch]:
    """Yield the batches encoded, in order."""
    return workers.map(functools.partial(encode_in_worker, model_path, split), batches)
