"""Hold the digest against hashlib used in the obvious way."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from decimal import Decimal

import numpy as np
import pytest
from smallest import MODEL

from megatron_mode.config import Config
from megatron_mode.errors import CheckpointError
from megatron_mode.mix.digest import OrderDigest, order_config
from megatron_mode.mix.edits.overrides import EditStream, PlannedEdits
from megatron_mode.mix.order import Order, Rows


class FakeSource:
    """Stand for a prepared source."""

    def __init__(self, name: str, digest: str = "ab") -> None:
        self.name = name
        self.tokens = 1000
        self.content_digests: Mapping[str, str] = {".bin": digest}
        self.mode_tokens: Mapping[str, object] | None = None

    def row_table_digest(self, seq_len: int) -> str:
        return f"table of {seq_len}"


def config_with(**fraction: object) -> Config:
    return Config.model_validate(
        {
            "run": {"steps": 20, "seed": 3},
            "model": MODEL,
            "mix": {
                "mode1": {"sources": [{"name": "web"}]},
                "mode2": {"sources": [{"name": "chat", "weight": "0.5"}]},
                "mode2_fraction": fraction,
            },
        }
    )


def order_of(config: Config) -> Order:
    return Order(config.mix, 16, 20 * 8, 3, {"web": 100, "chat": 50})


def test_chain_equals_hashlib_row_by_row() -> None:
    order = order_of(config_with(start="0.4"))
    digest = OrderDigest()
    previous = bytes(32)
    for step in range(20):
        rows = order.rows(step * 8, step * 8 + 8)
        data = b"".join(
            struct.pack("<4q", rows.row[i], rows.source[i], rows.source_row[i], rows.mode[i])
            for i in range(8)
        )
        previous = hashlib.sha256(previous + data).digest()
        digest.update(rows)
        assert digest.hex == previous.hex()


def test_a_step_that_was_left_out_stands_twice() -> None:
    rows = order_of(config_with(start="0.4")).rows(8, 16)
    digest, plain = OrderDigest(), OrderDigest()
    digest.update(rows, left_out=True)
    plain.update(rows)
    columns = (rows.row, rows.source, rows.source_row)
    taken = [struct.pack("<4q", *(c[i] for c in columns), rows.mode[i]) for i in range(8)]
    left = [struct.pack("<4q", *(c[i] for c in columns), -3) for i in range(8)]
    assert digest.hex == hashlib.sha256(bytes(32) + b"".join(taken + left)).hexdigest()
    assert digest.hex != plain.hex


def test_resumed_chain_continues_and_a_changed_row_shows() -> None:
    order = order_of(config_with(start="0.4"))
    whole = OrderDigest()
    whole.update(order.rows(0, 8))
    resumed = OrderDigest(whole.hex)
    changed = OrderDigest(whole.hex)
    rows = order.rows(8, 16)
    whole.update(rows)
    resumed.update(rows)
    other = rows.source_row.copy()
    other[3] += 1
    changed.update(Rows(rows.row, rows.mode, rows.source, other, rows.epoch))
    assert resumed.hex == whole.hex != changed.hex
    assert np.array_equal(rows.row, np.arange(8, 16))


@pytest.mark.parametrize("text", ["", "xy", "ab" * 31])
def test_a_damaged_digest_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="64 hexadecimal digits"):
        OrderDigest(text)


def test_order_config_names_what_the_order_depends_on() -> None:
    sources = [FakeSource("web"), FakeSource("chat")]
    base = config_with(start="0.4")
    record = order_config(base, sources)
    assert record == order_config(config_with(start="0.40", end="0.9"), sources)
    assert record != order_config(config_with(start="0.41"), sources)
    assert record != order_config(base, [FakeSource("web", "cd"), FakeSource("chat")])
    assert record["mix.mode2.sources.chat.weight"] == str(Decimal("0.5"))
    longer = base.model_copy(update={"run": base.run.model_copy(update={"steps": 40})})
    assert order_config(longer, sources) == record
    ramp = config_with(shape="linear", start="0", end="1")
    longer = ramp.model_copy(update={"run": ramp.run.model_copy(update={"steps": 40})})
    changed = order_config(longer, sources)
    assert changed.pop("mix.mode2_fraction.end_tokens") == 40 * 8 * 16
    assert changed.items() <= order_config(ramp, sources).items()


def test_mode_tokens_are_part_of_the_order_where_there_are_any() -> None:
    config = config_with(start="0.4")
    bare, marked = FakeSource("web"), FakeSource("chat")
    without = order_config(config, [bare, marked])
    marked.mode_tokens = {"placement": "start", "seed": 1}
    key = "mix.mode2.sources.chat.mode_tokens"
    assert order_config(config, [bare, marked]) == {**without, key: marked.mode_tokens}


def test_the_row_table_of_a_cohort_is_on_record() -> None:
    """Packed anew, the same rows hold other documents: a resumed run must notice."""
    stream = EditStream("facts", "whole", 9, 2)
    sources = [FakeSource("web"), FakeSource("chat"), FakeSource("facts")]
    record = order_config(config_with(start="0.4"), sources, PlannedEdits(streams=(stream,)))
    assert record["mix.edits.streams.facts.row_table"] == "table of 16"
