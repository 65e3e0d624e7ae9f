"""Write the prepared sources of one source: sorted, without copies, ids unique.

The documents are spread over buckets that memory holds one at a time. Two passes over the buckets
follow: the first sees the ids, the second writes.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mode.errors import DataError
from megatron_mode.tokens.prepare import buckets
from megatron_mode.tokens.prepare.buckets import Buckets, Identifiers
from megatron_mode.tokens.prepare.request import HELD_OUT_CHAT, RENDERINGS, output_name
from megatron_mode.tokens.prepare.units import (
    LINE_BITS,
    RECORD,
    Block,
    Records,
    Unit,
    primary,
    without_copies,
)
from megatron_mode.tokens.source.seal import SEALED_SUFFIXES, read_info
from megatron_mode.tokens.source.shards import SourceWriter
from megatron_mode.tokens.vocabulary import Vocabulary

SCRATCH_FOLDER = "scratch"


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

    def total(self, fact: str) -> int:
        """Add up a fact about the source over the units."""
        return sum(unit.facts["sources"][self.source][fact] for unit in self.units)

    def output_name(self, code: int) -> str:
        """Return the name of the prepared source that an output code stands for."""
        return output_name(self.source, self.mode, code)


def assemble_source(assembly: Assembly) -> list[dict[str, Any]]:
    """Write the prepared sources of one source, unless a run did before; return each NAME.json."""
    found = {
        code for unit in assembly.units for code in unit.facts["sources"][assembly.source]["codes"]
    }
    names = sorted({assembly.output_name(code) for code in found})
    files = [f"{name}{suffix}" for name in names for suffix in (*SEALED_SUFFIXES, ".json")]
    if all((assembly.result / file).exists() for file in files):
        return [read_info(assembly.result, name) for name in names]
    scratch = assembly.result.with_name(SCRATCH_FOLDER) / assembly.source
    count = 1 + assembly.total("bytes") // buckets.BUCKET_BYTES
    count = min(count, buckets.MOST_BUCKETS)
    try:
        documents = Buckets(scratch / "documents", count, RECORD)
        for unit in assembly.units:
            block = unit.block(assembly.source)
            documents.add(block.records, block.payload)
        identifiers = Identifiers(scratch, assembly.total("documents"), count)
        facts = collect_identifiers(assembly, documents, identifiers)
        return write_outputs(assembly, documents, identifiers, facts)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def collect_identifiers(
    assembly: Assembly, documents: Buckets, identifiers: Identifiers
) -> dict[str, Any]:
    """Make the ids of all documents unique; return what the outputs share in NAME.json."""
    count = held_out = 0
    copies = assembly.total("copies")
    for bucket in range(documents.count):
        records = documents.rows(bucket)
        order, dropped = without_copies(records)
        records = primary(records[order])
        copies += dropped
        count += len(records)
        held_out += int((records["code"] >= HELD_OUT_CHAT).sum())
        identifiers.add(records)
    if assembly.refuses_repeated_ids:
        for first, second, *_ in identifiers.repeats():
            raise repeated_id_error(assembly, documents, first, second)
    identifiers.number()
    return {"duplicates_dropped": copies, "held_out_share": round(held_out / max(1, count), 6)}


def repeated_id_error(assembly: Assembly, documents: Buckets, *found: int) -> DataError:
    """Name the id that two documents share, and their places."""
    lines = (1 << LINE_BITS) - 1
    first, second = (f"{assembly.input_names[at >> LINE_BITS]}:{at & lines}" for at in found)
    identifier = next(
        document[2]
        for block in map(documents.take, range(documents.count))
        for at, document in zip(
            block.records["at"], block.documents(assembly.vocabulary.token_dtype), strict=True
        )
        if at == found[0]
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
    counts: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    """Documents of 2**k to 2**(k+1)-1 tokens, by k."""

    def count(self, records: Records) -> None:
        """Count documents."""
        self.lengths.update(np.log2(records["tokens"]).astype(np.int64).tolist())
        for key in ("tokens", "text_bytes"):
            self.counts[key] += int(records[key].sum(dtype=np.int64))
        self.counts["plain"] += int((records["code"] & 1).sum())

    def facts(self) -> dict[str, Any]:
        """Return the entries of NAME.json."""
        plain, text_bytes = self.counts["plain"], self.counts["text_bytes"]
        is_mixed = 0 < plain < self.lengths.total()
        return {
            "rendering": "mixed" if is_mixed else RENDERINGS[plain > 0],
            "plain_documents": plain,
            "repeated_ids": self.counts["renamed"],
            "text_bytes": text_bytes,
            "tokens_per_byte": round(self.counts["tokens"] / max(1, text_bytes), 6),
            "lengths_log2": [self.lengths[k] for k in range(max(self.lengths) + 1)],
        }


def write_outputs(
    assembly: Assembly, documents: Buckets, identifiers: Identifiers, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Write all documents of a source; return NAME.json of each output."""
    outputs: dict[str, Output] = {}
    with contextlib.ExitStack() as stack:
        for bucket in range(documents.count):
            block = documents.take(bucket)
            block = block.take(without_copies(block.records)[0])
            numbers = identifiers.numbers_of(bucket, block.records)
            code_of = block.records["code"]
            for code in np.unique(code_of).tolist():
                name = assembly.output_name(code)
                if name not in outputs:
                    writer = SourceWriter(
                        assembly.result,
                        name,
                        mode=assembly.mode,
                        vocabulary=assembly.vocabulary,
                        **assembly.info,
                    )
                    outputs[name] = Output(stack.enter_context(writer))
                outputs[name].count(block.records[code_of == code])
            write_block(assembly, block, numbers, outputs)
        for output in outputs.values():
            output.writer.info.update(output.facts(), **facts)
    return [outputs[name].writer.info for name in sorted(outputs)]


def write_block(
    assembly: Assembly, block: Block, numbers: list[int], outputs: dict[str, Output]
) -> None:
    """Write documents to the outputs by code; a number makes a repeated id unique."""
    documents = block.documents(assembly.vocabulary.token_dtype)
    for code, number, document in zip(
        block.records["code"].tolist(), numbers, documents, strict=True
    ):
        ids, flags, identifier = document
        output = outputs[assembly.output_name(code)]
        if number:
            output.counts["renamed"] += 1
            identifier = f"{identifier}#{number}"
        output.writer.add(
            ids, flags, id=identifier, source=assembly.source, rendering=RENDERINGS[code & 1]
        )
