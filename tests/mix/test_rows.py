"""Hold row reading against a token-by-token reading of the conventions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_mode.config.mix import MixConfig
from megatron_mode.errors import ConfigError, DataError
from megatron_mode.mix.packing import PackedSource, rows_in_stream
from megatron_mode.mix.rows import Batch, RowReader

ASSISTANT = 3


def slow_row(
    source: Any, row: int, seq_len: int, reset: bool, assistant_only: bool
) -> dict[str, Any]:
    """Decide token by token, straight from the stream."""
    fields: dict[str, list[Any]] = {name: [] for name in Batch._fields if name != "source_B"}
    starts = set(source.starts.tolist())
    position = -1
    for t in range(row * seq_len, row * seq_len + seq_len):
        position = 0 if t == row * seq_len or (reset and t in starts) else position + 1
        flag, next_flag = int(source.flags[t]), int(source.flags[t + 1])
        judge = flag if t + 1 in starts else next_flag
        other_role = judge & 1 and (judge >> 3 & 7) != ASSISTANT
        fields["input_BT"].append(source.ids[t])
        fields["target_BT"].append(source.ids[t + 1])
        ends_untrained = t + 1 in starts and flag & 1 and flag & 2
        is_silent = next_flag & 2 or ends_untrained or (assistant_only and other_role)
        fields["lm_weight_BT"].append(not is_silent)
        fields["mode_label_BT"].append(flag & 1)
        fields["mode_weight_BT"].append(not flag & 4)
        fields["position_BT"].append(position)
        fields["flags_BT"].append(flag)
    return {name: np.array(values) for name, values in fields.items()}


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("lm_loss", ["all", "assistant"])
@pytest.mark.parametrize("longest", [3, 200])
def test_rows_equal_a_reading_token_by_token(
    memory_source: Callable[..., Any], reset: bool, lm_loss: str, longest: int
) -> None:
    mix = MixConfig.model_validate({"reset_at_documents": reset, "mode2_lm_loss": lm_loss})
    sources = [memory_source("web", 1, 900, 1, longest), memory_source("chat", 2, 901, 2, longest)]
    reader = RowReader([PackedSource(s, 25) for s in sources], 25, mix)
    picks = [(s, r) for s in (0, 1) for r in range(rows_in_stream(sources[s].tokens, 25))]
    assert len(picks) == 35 + 36
    batch = reader.read_batch([s for s, _ in picks], [r for _, r in picks])
    dtypes = {"lm_weight": "f4", "mode_label": "f4", "mode_weight": "f4", "flags": "u1"}
    for b, (s, r) in enumerate(picks):
        truth = slow_row(sources[s], r, 25, reset, lm_loss == "assistant")
        alone = reader.read_batch([s], [r])
        assert alone.source_B.tolist() == [batch.source_B[b]] == [s]
        for name, values in truth.items():
            together = getattr(batch, name)
            assert np.array_equal(getattr(alone, name)[0], values), name
            assert np.array_equal(together[b], values), name
            assert together.dtype == dtypes.get(name.removesuffix("_BT"), "i8")
            assert together.flags["C_CONTIGUOUS"]


def test_last_token_learns_to_stop_after_the_assistant_only(
    memory_source: Callable[..., Any],
) -> None:
    """Two dialogues, the first ends with the assistant, the second with the user; then Mode 1."""
    source = memory_source("mixed", 2, 13, 0)
    source.starts = np.array([0, 4, 8, 10])
    doc, user, assistant, text = 1 | 64, 1 | 2 << 3, 1 | 3 << 3, 0
    source.flags = np.array(
        [doc, user, user, assistant, doc, assistant, user, user, 64, text, doc, user, assistant],
        np.uint8,
    )
    reader = RowReader(
        [PackedSource(source, 12)], 12, MixConfig.model_validate({"mode2_lm_loss": "assistant"})
    )
    row = reader.read_batch([0], [0])
    assert row.lm_weight_BT[0].tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 1]
    assert row.position_BT[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 0, 1]


def test_no_stop_is_learnt_after_a_turn_that_is_not_trained(
    memory_source: Callable[..., Any],
) -> None:
    """Turns with NO_LM_LOSS: across a row border, last in a document, and before a mode piece."""
    source = memory_source("chat", 2, 13, 0)
    source.starts = np.array([0, 5, 9, 12])
    doc, assistant, silent = 1 | 64, 1 | 3 << 3, 1 | 3 << 3 | 2
    of_turn, of_its_own = 1 | 64 | 4 | 2, 1 | 64 | 4 | 2 | 3 << 3
    source.flags = np.array(
        [doc, assistant, silent, silent, silent, doc, assistant, silent, of_turn, doc, assistant,
         of_its_own, doc],
        np.uint8,
    )  # fmt: skip
    reader = RowReader([PackedSource(source, 3)], 3, MixConfig())
    found = [reader.read_batch([0], [row]).lm_weight_BT[0].tolist() for row in range(4)]
    assert found == [[1, 0, 0], [0, 0, 1], [0, 0, 0], [1, 0, 1]]


def test_a_row_needs_one_token_more() -> None:
    assert [rows_in_stream(tokens, 8) for tokens in (0, 1, 8, 9, 16, 17)] == [0, 0, 0, 1, 1, 2]


def test_a_row_past_the_end_is_refused(memory_source: Callable[..., Any]) -> None:
    reader = RowReader([PackedSource(memory_source("web", 1, 100, 1), 25)], 25, MixConfig())
    reader.read_batch([0], [2])
    for row in (3, -1):
        with pytest.raises(DataError, match=f"row {row} of source 'web'.*100 tokens, 3 rows of 25"):
            reader.read_batch([0], [row])


def test_a_source_of_the_other_mode_is_refused(memory_source: Callable[..., Any]) -> None:
    mix = MixConfig.model_validate({"mode1": {"sources": [{"name": "chat"}]}})
    with pytest.raises(ConfigError, match=r"mix\.mode1\.sources names 'chat'.*mode 2; move it"):
        RowReader([PackedSource(memory_source("chat", 2, 100, 1), 25)], 25, mix)
    RowReader([PackedSource(memory_source("held-out", 2, 100, 1), 25)], 25, mix)


def test_reading_costs_little(memory_source: Callable[..., Any]) -> None:
    """Read 64 rows of 1,024 tokens: at 200 us a row, 5 million tokens/s of one core."""
    reader = RowReader(
        [PackedSource(memory_source("web", 1, 200_000, 1, 300), 1024)], 1024, MixConfig()
    )
    picks = list(range(64))
    reader.read_batch([0] * 64, picks)
    begin = time.thread_time()
    for _ in range(5):
        reader.read_batch([0] * 64, picks)
    assert (time.thread_time() - begin) / (5 * 64) < 200e-6
