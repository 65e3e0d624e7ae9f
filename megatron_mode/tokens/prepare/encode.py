"""Turn batches of JSON lines into records and payload, in this process or in several.

Batches are cut the same way and come back in order whatever the number of workers, so the result
does not depend on it.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import itertools
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mode.tokens.documents import BadLineError, Document, file_stem, parse_line
from megatron_mode.tokens.flags import CONTROL, MODE2, role_bits
from megatron_mode.tokens.prepare.request import (
    DRAW_RANGE,
    RENDERINGS,
    Split,
    draw,
    mode_token_key,
)
from megatron_mode.tokens.prepare.units import (
    LINE_BITS,
    RECORD,
    Block,
    EncodedBatch,
)
from megatron_mode.tokens.prepare.verdicts import BadLines, empty_corpus
from megatron_mode.tokens.read.readers import open_reader
from megatron_mode.tokens.template import content_bytes, plain_text, render_batch
from megatron_mode.tokens.tokenizer import Tokenizer

BATCH_BYTES = 1 << 20
BATCH_LINES = 1024
LONGEST_NUMBER = 18
# Training on this much takes 6 s at 32,768 pieces and 0.3 GB; more text changes few pieces.
TOKENIZER_SAMPLE_BYTES = 24 << 20

# The flags of tokens in an assistant's turn that carry LM loss: pieces of text, control pieces.
TRAINED_ASSISTANT = [bytes([MODE2 | role_bits("assistant") | bits]) for bits in (0, CONTROL)]

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


@functools.lru_cache(maxsize=1)
def load_once(model_path: Path) -> Tokenizer:
    """Load a tokenizer once in each worker."""
    return Tokenizer(model_path.read_bytes(), str(model_path))


def encode_batch(model_path: Path, split: Split, batch: LineBatch) -> EncodedBatch:
    """Parse, render and tokenise a batch."""
    tokenizer = load_once(model_path)
    documents, bad_lines = parse_batch(batch)
    routed = [
        (document, batch.input_index << LINE_BITS | number, code)
        for number, document in documents
        for code in split.outputs(document, number)
    ]
    renderings = [RENDERINGS[code & 1] for _, _, code in routed]
    rendered = render_batch([document for document, _, _ in routed], renderings, tokenizer)
    rows: dict[tuple[str, int], list[tuple[Any, ...]]] = {}
    payloads: dict[tuple[str, int], bytearray] = {}
    for (document, at, code), (ids, flags) in zip(routed, rendered, strict=True):
        if split.mode_tokens.placement != "none":
            key = mode_token_key(split.seed, document)
            with_tokens = split.mode_tokens.insert((ids.tolist(), flags), tokenizer.control, key)
            ids, flags = array("i", with_tokens[0]), with_tokens[1]
        source = document.source, document.mode
        payload = payloads.setdefault(source, bytearray())
        begin = len(payload)
        payload += np.frombuffer(ids, np.int32).astype(tokenizer.vocabulary.token_dtype).tobytes()
        payload += flags
        payload += document.id.encode()
        row = record(split, document, at, code, flags, len(payload) - begin)
        rows.setdefault(source, []).append(row)
    blocks = {key: Block(np.array(rows[key], RECORD), bytes(payloads[key])) for key in rows}
    end = (batch.input_index, batch.numbers[-1])
    ignored = Counter(name for _, document in documents for name in document.ignored)
    return EncodedBatch(batch.path, end, blocks, bad_lines, ignored)


def record(
    split: Split, document: Document, at: int, code: int, flags: bytes, size: int
) -> tuple[Any, ...]:
    """Return the fields of RECORD; size is the bytes of payload."""
    contents = content_bytes(document)
    # The contents of a dialogue name the role of each turn, which is no text.
    text_bytes = sum(map(len, contents if document.mode == 1 else contents[1::2]))
    base, number = numbered(document.id)
    ids = (id_digest(document.id), id_digest(base) if number else b"", number)
    key = (split.order_digest(document.source, at, contents), at, code)
    trains_assistant = any(flag in flags for flag in TRAINED_ASSISTANT)
    return *key, len(flags), text_bytes, size, *ids, trains_assistant


def id_digest(identifier: str) -> bytes:
    """Return the digest by which ids of a source are compared."""
    return hashlib.blake2b(identifier.encode(), digest_size=16).digest()


def numbered(identifier: str) -> tuple[str, int]:
    """Return ("a", 2) for the id "a#2", ("", 0) for an id without such a number."""
    base, mark, digits = identifier.rpartition("#")
    canonical = digits.isascii() and digits.isdigit() and digits[0] != "0"
    if not mark or not canonical or len(digits) > LONGEST_NUMBER:
        return "", 0
    return base, int(digits)


def sample_texts(
    inputs: Sequence[Path], split: Split, max_bad_lines: int, report_progress: ReportProgress
) -> list[str]:
    """Return up to TOKENIZER_SAMPLE_BYTES of text to train a tokenizer on, in input order.

    Each document is equally likely to be in it. Held-out documents are left out unless there is
    nothing else.
    """
    # Negative draw, number in input order, text: those with the smallest draws stay.
    heap: list[tuple[int, int, str]] = []
    order, held_bytes = itertools.count(), 0
    bad_lines = BadLines(max_bad_lines)
    for batch in line_batches(list(enumerate(inputs)), report_progress):
        documents, found = parse_batch(batch)
        bad_lines.add(batch.path, found)
        for number, document in documents:
            drawn = draw(split.seed, "tokenizer", document.source, document.id, str(number))
            drawn += DRAW_RANGE * split.is_held_out(document)
            text = plain_text(document)
            heapq.heappush(heap, (-drawn, next(order), text))
            held_bytes += len(text.encode())
            while held_bytes > TOKENIZER_SAMPLE_BYTES and len(heap) > 1:
                held_bytes -= len(heapq.heappop(heap)[2].encode())
    if not heap:
        raise empty_corpus(inputs)
    trained = [entry for entry in heap if -entry[0] < DRAW_RANGE]
    return [text for _, _, text in sorted(trained or heap, key=lambda entry: entry[1])]
