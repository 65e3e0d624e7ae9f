"""Pin the order of a run by a chain of hashes and by the settings that it depends on.

d_s = SHA-256(d_(s-1) || rows of step s), d_(-1) being 32 zero bytes, and a row being four
little-endian int64 numbers: row index, source, source row, mode. Where a step reads documents that
edits change, as many rows of four follow: row index, source, document, -1 (drop) or -2 (replace).
Where a health policy left the step's update out, each of its rows follows once more: row index,
source, source row, -3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from decimal import Decimal
from typing import assert_never

import numpy as np

from megatron_mode.config.fields import Config
from megatron_mode.config.mix import SourceConfig
from megatron_mode.errors import CheckpointError
from megatron_mode.mix.edits.overrides import NO_EDITS, PlannedEdits
from megatron_mode.mix.order import Rows
from megatron_mode.mix.schedule import resolved_end_tokens
from megatron_mode.tokens.source.shards import Source

START_HEX = "00" * 32
LEFT_OUT = -3


class OrderDigest:
    """Hash the rows of one step after the other onto a chain."""

    def __init__(self, hex_digest: str = START_HEX) -> None:
        """Start a chain, or continue from the digest of the last step taken.

        Raises CheckpointError for a text that is no SHA-256 digest.
        """
        try:
            self._digest = bytes.fromhex(hex_digest)
        except ValueError:
            self._digest = b""
        if len(self._digest) != 32:
            raise CheckpointError(
                f"the order digest '{hex_digest}' is not 64 hexadecimal digits; the checkpoint is "
                "damaged, so resume from an older one"
            )

    @property
    def hex(self) -> str:
        """Return the chain's present digest as 64 hexadecimal digits."""
        return self._digest.hex()

    def update(self, rows: Rows, edits: PlannedEdits = NO_EDITS, *, left_out: bool = False) -> None:
        """Append the rows of one step, in order of their index (not as they were dealt).

        `left_out` is for a step whose update was left out.
        """
        columns = (rows.row, rows.source, rows.source_row)
        table = np.stack([*columns, rows.mode], axis=1)
        if edits.changed:
            table = np.concatenate([table, edits.changes(*columns)])
        if left_out:
            again = np.stack([*columns, np.full_like(rows.row, LEFT_OUT)], axis=1)
            table = np.concatenate([table, again])
        data = np.ascontiguousarray(table, dtype="<i8").tobytes()
        self._digest = hashlib.sha256(self._digest + data).digest()


def order_config(
    config: Config, sources: Sequence[Source], edits: PlannedEdits = NO_EDITS
) -> dict[str, object]:
    """Return everything that the order depends on, JSON-ready and flat.

    `sources` are the opened sources that training reads. Two runs whose dictionaries are equal take
    the same rows at the same steps, as far as both go. The run's length stands in it only through
    what ends with the run, so that a longer run whose past is unchanged compares equal.
    """
    mix = config.mix
    record: dict[str, object] = {
        "run.seed": config.run.seed,
        "model.seq_len": config.model.seq_len,
        "batch.global_rows": config.batch.global_rows,
        **_fraction_record(config),
    }
    opened = {source.name: source for source in sources}

    def row_table(name: str) -> str | None:
        return opened[name].row_table_digest(config.model.seq_len)

    mixed: set[str] = set()
    for mode, section in ((1, mix.mode1), (2, mix.mode2)):
        key = f"mix.mode{mode}.sources"
        record[key] = [entry.name for entry in section.sources]
        mixed.update(entry.name for entry in section.sources)
        for entry in section.sources:
            here = f"{key}.{entry.name}"
            record |= _source_record(here, entry) | _content_record(here, opened[entry.name])
            if entry.packing == "whole":
                record[f"{here}.row_table"] = row_table(entry.name)
    for source in sources:
        if source.name not in mixed:
            record |= _content_record(f"mix.edits.sources.{source.name}", source)
    for stream in edits.streams:
        if stream.packing == "whole":
            record[f"mix.edits.streams.{stream.name}.row_table"] = row_table(stream.name)
    return {**record, **edits.record}


def _content_record(key: str, source: Source) -> dict[str, object]:
    content = dict(sorted(source.content_digests.items()))
    record = {f"{key}.tokens": source.tokens, f"{key}.content": content}
    if source.mode_tokens:  # absent otherwise, as in older records
        record[f"{key}.mode_tokens"] = dict(source.mode_tokens)
    return record


def _source_record(key: str, entry: SourceConfig) -> dict[str, object]:
    """Return the plan of a source; keys at their defaults are left out, as older records do."""
    record = {"weight": _plain(entry.weight), "epochs_max": _plain(entry.epochs_max)}
    optional = {
        "onset_tokens": entry.onset_tokens,
        "ramp_tokens": entry.ramp_tokens,
        "weight_points": [[at, _plain(weight)] for at, weight in entry.weight_points],
        "when_dry": entry.when_dry if entry.when_dry != "share" else None,
        "packing": entry.packing if entry.packing != "stream" else None,
    }
    given = record | {name: value for name, value in optional.items() if value}
    return {f"{key}.{name}": value for name, value in given.items()}


def _fraction_record(config: Config) -> dict[str, object]:
    """Return the keys of the schedule that its shape reads."""
    plan = config.mix.mode2_fraction
    total_tokens = config.run.steps * config.batch.global_rows * config.model.seq_len
    start: dict[str, object] = {"start": _plain(plan.start)}
    end = {"end": _plain(plan.end), "begin_tokens": plan.begin_tokens}
    match plan.shape:
        case "constant":
            read = start
        case "piecewise":
            read = {"points": [[at, _plain(share)] for at, share in plan.points]}
        case "step":
            read = start | end
        case "linear" | "cosine":
            read = start | end | {"end_tokens": resolved_end_tokens(plan, total_tokens)}
        case _:
            assert_never(plan.shape)
    return {
        f"mix.mode2_fraction.{name}": value
        for name, value in ({"shape": plan.shape} | read).items()
    }


def _plain(value: Decimal | None) -> str | None:
    """Write equal numbers alike: 0.50 and 0.5 are one setting."""
    return None if value is None else format(value.normalize(), "f")
