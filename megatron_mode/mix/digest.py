"""Pin the order of a run by a chain of hashes and by the settings that it depends on.

d_s = SHA-256(d_(s-1) || rows of step s), d_(-1) being 32 zero bytes, and a row being four
little-endian int64 numbers: row index, source, source row, mode.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Protocol

import numpy as np

from megatron_mode.config.fields import Config
from megatron_mode.errors import CheckpointError
from megatron_mode.mix.order import Rows
from megatron_mode.mix.schedule import resolved_end_tokens

START_HEX = "00" * 32


class DigestedSource(Protocol):
    """Say what the order's record needs to know of a prepared source."""

    @property
    def name(self) -> str:
        """Return the source's name."""

    @property
    def tokens(self) -> int:
        """Return the length of the stream in tokens."""

    @property
    def content_digests(self) -> Mapping[str, str]:
        """Return file name -> digest of what the source holds."""

    @property
    def mode_tokens(self) -> Mapping[str, object] | None:
        """Return how mode tokens stand in it, None where there are none."""


class OrderDigest:
    """Hash the rows of one step after the other onto a chain."""

    def __init__(self, hex_digest: str = START_HEX) -> None:
        """Start a chain, or go on from the digest of the last step taken.

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

    def update(self, rows: Rows) -> None:
        """Append the rows of one step, in order of their index (not as they were dealt)."""
        table = np.stack([rows.row, rows.source, rows.source_row, rows.mode], axis=1)
        data = np.ascontiguousarray(table, dtype="<i8").tobytes()
        self._digest = hashlib.sha256(self._digest + data).digest()


def order_config(config: Config, sources: Sequence[DigestedSource]) -> dict[str, object]:
    """Return everything that the order depends on, JSON-ready and flat.

    `sources` are the opened training sources. Two runs whose dictionaries are equal take the same
    rows at the same steps, as far as both go. The run's length stands in it only through a ramp
    that ends with the run, so that a longer run whose past is unchanged compares equal.
    """
    mix = config.mix
    record: dict[str, object] = {
        "run.seed": config.run.seed,
        "model.seq_len": config.model.seq_len,
        "batch.global_rows": config.batch.global_rows,
        **_fraction_record(config),
    }
    by_name = {source.name: source for source in sources}
    for mode, section in ((1, mix.mode1), (2, mix.mode2)):
        key = f"mix.mode{mode}.sources"
        record[key] = [source.name for source in section.sources]
        for entry in section.sources:
            source = by_name[entry.name]
            record[f"{key}.{entry.name}.weight"] = _plain(entry.weight)
            record[f"{key}.{entry.name}.epochs_max"] = _plain(entry.epochs_max)
            record[f"{key}.{entry.name}.tokens"] = source.tokens
            record[f"{key}.{entry.name}.content"] = dict(sorted(source.content_digests.items()))
            if source.mode_tokens:  # absent otherwise: older checkpoints stay resumable
                record[f"{key}.{entry.name}.mode_tokens"] = dict(source.mode_tokens)
    return record


def _fraction_record(config: Config) -> dict[str, object]:
    """Return the keys of the schedule that its shape reads."""
    fraction, prefix = config.mix.mode2_fraction, "mix.mode2_fraction."
    record: dict[str, object] = {prefix + "shape": fraction.shape}
    if fraction.shape == "piecewise":
        record[prefix + "points"] = [[at, _plain(share)] for at, share in fraction.points]
        return record
    record[prefix + "start"] = _plain(fraction.start)
    if fraction.shape == "constant":
        return record
    record[prefix + "end"] = _plain(fraction.end)
    record[prefix + "begin_tokens"] = fraction.begin_tokens
    if fraction.shape != "step":
        total_tokens = config.run.steps * config.batch.global_rows * config.model.seq_len
        record[prefix + "end_tokens"] = resolved_end_tokens(fraction, total_tokens)
    return record


def _plain(value: Decimal | None) -> str | None:
    """Write equal numbers alike: 0.50 and 0.5 are one setting."""
    return None if value is None else format(value.normalize(), "f")
