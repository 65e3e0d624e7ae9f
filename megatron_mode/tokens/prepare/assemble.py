"""Turn the runs of one source into its prepared sources: merged, without copies, ids unique.

Two passes over the sorted records: the first sees the ids, the second writes. Memory holds a piece
of each run's records, some 16 MB of payload, and what the writers buffer.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mode.atomic import write_whole
from megatron_mode.errors import DataError
from megatron_mode.tokens.prepare.encoded import (
    HELD_OUT_CHAT,
    RENDERINGS,
    Block,
    Records,
    codes,
    document_keys,
    is_primary,
    output_name,
    place,
    positions,
)
from megatron_mode.tokens.prepare.identifiers import Identifiers, Numbers, Repeat
from megatron_mode.tokens.prepare.runs import (
    PartOfRun,
    Run,
    RunWriter,
    cut,
    exclusive_sum,
    gather,
    parts_of_source,
)
from megatron_mode.tokens.prepare.sorting import Copies, merge_sorted
from megatron_mode.tokens.prepare.tally import Tally
from megatron_mode.tokens.source.seal import SEALED_SUFFIXES
from megatron_mode.tokens.source.shards import SourceWriter
from megatron_mode.tokens.vocabulary import Vocabulary

SCRATCH_FOLDER = "scratch"
BLOCK_BYTES = 16 << 20
SUMMARY_KEYS = (
    "name", "mode", "rendering", "documents", "tokens", "text_bytes", "tokens_per_byte",
    "plain_documents", "repeated_ids", "duplicates_dropped", "held_out_share", "licence",
    "flags", "lengths_log2",
)  # fmt: skip


@dataclass(frozen=True)
class Assembly:
    """Hold what it takes to assemble one source."""

    source: str
    mode: int
    parts: list[PartOfRun]
    duplicates: int
    """Copies dropped on the way into the runs."""
    result: Path
    vocabulary: Vocabulary
    input_names: list[str]
    refuses_repeated_ids: bool
    info: dict[str, Any]
    """Entries of NAME.json that all sources share."""

    @property
    def scratch(self) -> Path:
        """Return the beginning of the names of temporary files."""
        return self.result.parent / SCRATCH_FOLDER / self.source

    @property
    def mark(self) -> Path:
        """Return the file that says that the source is done."""
        return self.result.with_name(f"{self.source}.done")


def survivors(parts: list[PartOfRun]) -> Iterator[tuple[Records, NDArray[np.intp], int]]:
    """Yield sorted records without later copies, the part of each, and the copies left out."""
    copies = Copies()
    for records, part_of in merge_sorted([part.reader() for part in parts]):
        kept = copies.is_first(records["key"])
        yield records[kept], part_of[kept], int(is_primary(records[~kept]).sum())


def blocks(parts: list[PartOfRun]) -> Iterator[tuple[Block, int]]:
    """Yield the surviving documents of a source in order, and how many copies were left out."""
    token_bytes = parts[0].token_bytes
    for records, part_of, dropped in survivors(parts):
        for piece in cut(records, BLOCK_BYTES, token_bytes):
            yield gather(parts, records[piece], part_of[piece]), 0
        yield Block(records[:0], b"", b"", b""), dropped


def merge_runs(base: Path, runs: list[Run]) -> Run:
    """Merge runs into one; they stay as they are."""
    done = Run.open(base)
    if done is not None:
        return done
    with RunWriter(base, runs[0].token_bytes) as writer:
        for source in sorted({name for run in runs for name in run.sources}):
            spans = [run.sources[source] for run in runs if source in run.sources]
            writer.add_source(source, spans[0].mode, sum(span.duplicates for span in spans))
            for block, dropped in blocks(parts_of_source(runs, source)):
                writer.append(block)
                writer.run.sources[source].duplicates += dropped
        return writer.finish()


def finished(assembly: Assembly) -> list[dict[str, Any]] | None:
    """Return the summaries of a source that an earlier run wrote as a whole."""
    try:
        summaries: list[dict[str, Any]] = json.loads(assembly.mark.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = all(
        (assembly.result / f"{s['name']}{suffix}").exists()
        for s in summaries
        for suffix in (*SEALED_SUFFIXES, ".json")
    )
    return summaries if whole else None


def assemble_source(assembly: Assembly) -> list[dict[str, Any]]:
    """Write the prepared sources of one source and return a summary of each."""
    summaries = finished(assembly)
    if summaries is not None:
        return summaries
    identifiers = Identifiers(assembly.scratch)
    try:
        facts = collect_identifiers(assembly, identifiers)
        written = write_outputs(assembly, identifiers.number(), facts)
    finally:
        identifiers.remove()
    summaries = [{key: info[key] for key in SUMMARY_KEYS} for info in written]
    write_whole(assembly.mark, json.dumps(summaries))
    return summaries


def collect_identifiers(assembly: Assembly, identifiers: Identifiers) -> dict[str, Any]:
    """Take the ids of all documents that survive; return what the outputs share in NAME.json."""
    documents = held_out = 0
    duplicates = assembly.duplicates
    for records, _, dropped in survivors(assembly.parts):
        duplicates += dropped
        primary = records[is_primary(records)]
        documents += len(primary)
        held_out += int((codes(primary) >= HELD_OUT_CHAT).sum())
        identifiers.add(primary)
    if assembly.refuses_repeated_ids:
        repeat = identifiers.first_repeat()
        if repeat is not None:
            raise repeated_id_error(assembly, repeat)
    share = round(held_out / max(1, documents), 6)
    return {"duplicates_dropped": duplicates, "held_out_share": share}


def repeated_id_error(assembly: Assembly, repeat: Repeat) -> DataError:
    """Name the id that two documents share, and their places."""
    keys = np.array(list(repeat), f"S{len(repeat.first)}")
    found = [place(int(at)) for at in positions(keys)]
    first, second = (f"{assembly.input_names[index]}:{line}" for index, line in found)
    identifier = ""
    for records, part_of, _ in survivors(assembly.parts):
        same = document_keys(records) == repeat.first
        if same.any():
            identifier = gather(assembly.parts, records[same], part_of[same]).ids.decode()
            break
    return DataError(
        f"Source {assembly.source} has the id {identifier[:100]} at {first} and at {second} with "
        "different contents; --duplicate-ids error accepts each once, so mend one or give "
        "--duplicate-ids rename."
    )


class Outputs:
    """Hold the writers of one source's outputs, each opened by its first document."""

    def __init__(self, assembly: Assembly, stack: contextlib.ExitStack) -> None:
        self._assembly, self._stack = assembly, stack
        self.open: dict[str, tuple[SourceWriter, Tally]] = {}

    def __getitem__(self, name: str) -> tuple[SourceWriter, Tally]:
        if name not in self.open:
            a = self._assembly
            writer = SourceWriter(a.result, name, mode=a.mode, vocabulary=a.vocabulary, **a.info)
            self.open[name] = self._stack.enter_context(writer), Tally()
        return self.open[name]


def write_outputs(
    assembly: Assembly, numbers: Numbers, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Write all documents of a source; return NAME.json of each output."""
    with contextlib.ExitStack() as stack:
        outputs = Outputs(assembly, stack)
        for block, _ in blocks(assembly.parts):
            if len(block.records):
                write_block(assembly, block, numbers.of(document_keys(block.records)), outputs)
        for writer, tally in outputs.open.values():
            writer.info.update(tally.facts(), **facts)
    return [outputs.open[name][0].info for name in sorted(outputs.open)]


def write_block(
    assembly: Assembly, block: Block, numbers: NDArray[np.uint64], outputs: Outputs
) -> None:
    """Write the documents of a block to their outputs; a number makes a repeated id unique."""
    records, code_of = block.records, codes(block.records)
    targets = {}
    for code in np.unique(code_of).tolist():
        writer, tally = outputs[output_name(assembly.source, assembly.mode, code)]
        targets[code] = writer
        mine = code_of == code
        tally.add(records[mine], int((numbers[mine] > 0).sum()))
    tokens = np.frombuffer(block.tokens, assembly.vocabulary.token_dtype)
    begins = exclusive_sum(records["tokens"])
    id_begins = exclusive_sum(records["id_bytes"])
    columns = (
        code_of, begins, begins + records["tokens"], id_begins, id_begins + records["id_bytes"],
        numbers,
    )  # fmt: skip
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for code, begin, end, id_begin, id_end, number in rows:
        identifier = block.ids[id_begin:id_end].decode()
        targets[code].add(
            tokens[begin:end],
            block.flags[begin:end],
            id=f"{identifier}#{number}" if number else identifier,
            source=assembly.source,
            rendering=RENDERINGS[code & 1],
        )
