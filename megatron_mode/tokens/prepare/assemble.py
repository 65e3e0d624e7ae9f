"""Write the prepared sources of one source: sorted, without copies, ids unique.

The documents are spread over buckets that memory holds one at a time. Two passes over the buckets
follow: the first sees the ids, the second writes.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mode.atomic import write_whole
from megatron_mode.errors import DataError
from megatron_mode.tokens.flags import CONTROL, MODE2, role_bits
from megatron_mode.tokens.prepare import buckets
from megatron_mode.tokens.prepare.buckets import Buckets, Identifiers
from megatron_mode.tokens.prepare.split import HELD_OUT_CHAT, RENDERINGS, output_name
from megatron_mode.tokens.prepare.units import (
    DIGEST_BYTES,
    Block,
    Records,
    Unit,
    codes,
    document_keys,
    is_primary,
    place,
    without_copies,
)
from megatron_mode.tokens.source.seal import SEALED_SUFFIXES
from megatron_mode.tokens.source.shards import SourceWriter
from megatron_mode.tokens.vocabulary import Vocabulary

SCRATCH_FOLDER = "scratch"
SUMMARY_KEYS = (
    "name", "mode", "rendering", "documents", "tokens", "text_bytes", "tokens_per_byte",
    "plain_documents", "repeated_ids", "duplicates_dropped", "held_out_share", "licence",
    "flags", "lengths_log2",
)  # fmt: skip
TRAINED_ASSISTANT = tuple(bytes([MODE2 | role_bits("assistant") | b]) for b in (0, CONTROL))


@dataclass(frozen=True)
class Assembly:
    """Hold what it takes to assemble one source."""

    source: str
    mode: int
    units: list[Unit]
    """Those that hold documents of the source."""
    result: Path
    vocabulary: Vocabulary
    input_names: list[str]
    refuses_repeated_ids: bool
    info: dict[str, Any]
    """Entries of NAME.json that all sources share."""

    @property
    def mark(self) -> Path:
        """Return the file that says that the source is done."""
        return self.result.with_name(f"{self.source}.done")

    def total(self, fact: str) -> int:
        """Add up a fact about the source over the units."""
        return sum(unit.sources[self.source][fact] for unit in self.units)


def finished(assembly: Assembly) -> list[dict[str, Any]] | None:
    """Return the summaries of a source that an earlier run completed."""
    try:
        summaries: list[dict[str, Any]] = json.loads(assembly.mark.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    complete = all(
        (assembly.result / f"{s['name']}{suffix}").exists()
        for s in summaries
        for suffix in (*SEALED_SUFFIXES, ".json")
    )
    return summaries if complete else None


def assemble_source(assembly: Assembly) -> list[dict[str, Any]]:
    """Write the prepared sources of one source and return a summary of each."""
    summaries = finished(assembly)
    if summaries is not None:
        return summaries
    scratch = assembly.result.with_name(SCRATCH_FOLDER) / assembly.source
    try:
        documents = Buckets(
            scratch / "documents", 1 + assembly.total("bytes") // buckets.BUCKET_BYTES
        )
        for unit in assembly.units:
            documents.add_block(unit.block(assembly.source))
        identifiers = Identifiers(scratch, assembly.total("documents"), documents.count)
        facts = collect_identifiers(assembly, documents, identifiers)
        summaries = write_outputs(assembly, documents, identifiers, facts)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    write_whole(assembly.mark, json.dumps(summaries))
    return summaries


def collect_identifiers(
    assembly: Assembly, documents: Buckets, identifiers: Identifiers
) -> dict[str, Any]:
    """Make the ids of all documents unique; return what the outputs share in NAME.json."""
    count = held_out = 0
    copies = assembly.total("copies")
    for bucket in range(documents.count):
        records = documents.records(bucket)
        order, dropped = without_copies(records)
        copies += dropped
        primary = records[order]
        primary = primary[is_primary(primary)]
        count += len(primary)
        held_out += int((codes(primary) >= HELD_OUT_CHAT).sum())
        identifiers.add(primary)
    if assembly.refuses_repeated_ids:
        for first, second, _ in identifiers.repeats():
            raise repeated_id_error(assembly, documents, first, second)
    identifiers.number()
    return {"duplicates_dropped": copies, "held_out_share": round(held_out / max(1, count), 6)}


def repeated_id_error(assembly: Assembly, documents: Buckets, *keys: bytes) -> DataError:
    """Name the id that two documents share, and their places."""
    found = [place(int.from_bytes(key[DIGEST_BYTES:], "big")) for key in keys]
    first, second = (f"{assembly.input_names[index]}:{line}" for index, line in found)
    identifier = next(
        found[2]
        for block in map(documents.block, range(documents.count))
        for key, found in zip(
            document_keys(block.records),
            block.documents(assembly.vocabulary.token_dtype),
            strict=True,
        )
        if key.tobytes() == keys[0]
    )
    return DataError(
        f"Source {assembly.source} has the id {identifier[:100]} at {first} and at {second} with "
        "different contents; --duplicate-ids error accepts each once, so mend one or give "
        "--duplicate-ids rename."
    )


@dataclass
class Output:
    """Hold the writer of one prepared source and count what it holds."""

    writer: SourceWriter
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    plain: int = 0
    renamed: int = 0
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(32, np.int64))
    trains_assistant: bool = False
    """Whether a token of an assistant's turn carries LM loss."""

    def count(self, records: Records, renamed: int) -> None:
        """Count documents, some of them with a new id."""
        lengths = records["tokens"].astype(np.int64)
        self.documents += len(records)
        self.tokens += int(lengths.sum())
        self.text_bytes += int(records["text_bytes"].sum(dtype=np.int64))
        self.plain += int((codes(records) & 1).sum())
        self.renamed += renamed
        bins = np.log2(lengths).astype(np.int64)
        self.lengths += np.bincount(bins, minlength=len(self.lengths))

    def facts(self) -> dict[str, Any]:
        """Return the entries of NAME.json.

        Bin k of lengths_log2 counts the documents of 2**k to 2**(k+1)-1 tokens.
        """
        is_mixed = 0 < self.plain < self.documents
        return {
            "rendering": "mixed" if is_mixed else RENDERINGS[self.plain > 0],
            "plain_documents": self.plain,
            "repeated_ids": self.renamed,
            "text_bytes": self.text_bytes,
            "tokens_per_byte": round(self.tokens / max(1, self.text_bytes), 6),
            "lengths_log2": np.trim_zeros(self.lengths, "b").tolist(),
        }


def write_outputs(
    assembly: Assembly, documents: Buckets, identifiers: Identifiers, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Write all documents of a source; return a summary of each output."""
    outputs: dict[str, Output] = {}
    with contextlib.ExitStack() as stack:
        for bucket in range(documents.count):
            block = documents.block(bucket)
            documents.remove(bucket)
            block = block.take(without_copies(block.records)[0])
            numbers = identifiers.numbers_of(bucket, block.records)
            code_of = codes(block.records)
            targets = {}
            for code in np.unique(code_of).tolist():
                name = output_name(assembly.source, assembly.mode, code)
                if name not in outputs:
                    outputs[name] = Output(stack.enter_context(source_writer(assembly, name)))
                targets[code] = outputs[name]
                mine = code_of == code
                targets[code].count(block.records[mine], int((numbers[mine] > 0).sum()))
            write_block(assembly, block, numbers.tolist(), targets)
        for output in outputs.values():
            output.writer.info.update(output.facts(), **facts)
    return [
        {
            **{key: output.writer.info[key] for key in SUMMARY_KEYS},
            "trains_assistant": output.trains_assistant,
        }
        for _, output in sorted(outputs.items())
    ]


def source_writer(assembly: Assembly, name: str) -> SourceWriter:
    """Open the writer of an output."""
    a = assembly
    return SourceWriter(a.result, name, mode=a.mode, vocabulary=a.vocabulary, **a.info)


def write_block(
    assembly: Assembly, block: Block, numbers: list[int], targets: dict[int, Output]
) -> None:
    """Write documents to the outputs by code; a number makes a repeated id unique."""
    documents = block.documents(assembly.vocabulary.token_dtype)
    for code, number, document in zip(
        codes(block.records).tolist(), numbers, documents, strict=True
    ):
        ids, flags, identifier = document
        output = targets[code]
        output.trains_assistant |= any(flag in flags for flag in TRAINED_ASSISTANT)
        output.writer.add(
            ids,
            flags,
            id=f"{identifier}#{number}" if number else identifier,
            source=assembly.source,
            rendering=RENDERINGS[code & 1],
        )
