"""Hold the order to its definition, to its promises and to its errors."""

from __future__ import annotations

import itertools
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mode.config.mix import (
    MixConfig,
    Mode2FractionConfig,
    SourceConfig,
    SourcesConfig,
)
from megatron_mode.errors import DataError
from megatron_mode.mix.audit.forecast import warnings
from megatron_mode.mix.order import Order, Rows

SEQ_LEN = 16
TRILLION = 10**12


def mix_of(
    fraction: Mode2FractionConfig, mode1: list[SourceConfig], mode2: list[SourceConfig]
) -> MixConfig:
    return MixConfig(
        mode1=SourcesConfig(sources=tuple(mode1)),
        mode2=SourcesConfig(sources=tuple(mode2)),
        mode2_fraction=fraction,
    )


def source(name: str, weight: str = "1", epochs_max: str | None = None) -> SourceConfig:
    return SourceConfig.model_validate({"name": name, "weight": weight, "epochs_max": epochs_max})


def simple_order(
    fraction: Mode2FractionConfig, total_rows: int, seed: int = 5, seq_len: int = SEQ_LEN
) -> Order:
    mix = mix_of(fraction, [source("web", "0.7"), source("books", "0.3")], [source("chat")])
    return Order(mix, seq_len, total_rows, seed, {"web": 90, "books": 13, "chat": 31})


def samples(rows: Rows) -> set[tuple[int, int, int]]:
    taken = set(zip(*(x.tolist() for x in (rows.source, rows.source_row, rows.epoch)), strict=True))
    assert len(taken) == len(rows)
    return taken


shares = st.integers(0, 1000).map(lambda n: Decimal(n) / 1000)


@st.composite
def fractions(draw: st.DrawFn) -> Mode2FractionConfig:
    shape = draw(st.sampled_from(["constant", "linear", "cosine", "step", "piecewise"]))
    marks = sorted(draw(st.lists(st.integers(0, 9000), min_size=3, max_size=3, unique=True)))
    return Mode2FractionConfig(
        shape=shape,
        start=draw(shares),
        end=draw(shares),
        begin_tokens=marks[0],
        end_tokens=marks[2],
        points=tuple((mark, draw(shares)) for mark in marks) if shape == "piecewise" else (),
    )


def integral_of(config: Mode2FractionConfig, tokens: np.ndarray) -> np.ndarray:
    """Sum the schedule token by token: token t of a line or a wave counts f(t + 1/2)."""
    t = tokens + 0.5
    start, begin, end_tokens = float(config.start), config.begin_tokens, config.end_tokens
    if config.shape == "constant":
        return np.full(len(t), start)
    if config.shape == "piecewise":
        return np.interp(t, [p[0] for p in config.points], [float(p[1]) for p in config.points])
    assert config.end is not None
    assert end_tokens is not None
    if config.shape == "step":
        return np.where(t > begin, float(config.end), start)
    u = np.clip((t - begin) / (end_tokens - begin), 0, 1)
    if config.shape == "cosine":
        u = (1 - np.cos(np.pi * u)) / 2
    return start + (float(config.end) - start) * u


@given(config=fractions(), total_rows=st.integers(1, 700))
@settings(max_examples=60, deadline=None)
def test_realised_never_leaves_the_plan_by_a_row(
    config: Mode2FractionConfig, total_rows: int
) -> None:
    order = simple_order(config, total_rows)
    realised = np.cumsum(order.rows(0, total_rows).mode == 2)
    by_token = integral_of(config, np.arange(total_rows * SEQ_LEN))
    plan = np.cumsum(by_token)[SEQ_LEN - 1 :: SEQ_LEN] / SEQ_LEN
    gap = plan - realised
    assert np.all(gap > -0.01)  # the token sum errs by less than 0.01
    assert np.all(gap < 1.01)
    own = np.array([order.integral.planned(row) for row in range(1, total_rows + 1)])
    np.testing.assert_allclose(own, plan, atol=0.01)
    assert np.all(own - realised > -1e-9)
    assert np.all(own - realised < 1)


@given(a=shares, b=shares, half_rows=st.integers(1, 300), seed=st.integers(0, 2**63))
@settings(max_examples=40, deadline=None)
def test_equal_totals_take_the_same_samples(
    a: Decimal, b: Decimal, half_rows: int, seed: int
) -> None:
    """A ramp, a wave, its mirror, a jump, a table and a constant: all with mean (a + b) / 2."""
    total, tokens = 2 * half_rows, 2 * half_rows * SEQ_LEN
    plans = [
        {"shape": "linear", "start": a, "end": b},
        {"shape": "cosine", "start": a, "end": b},
        {"shape": "cosine", "start": b, "end": a},
        {"shape": "step", "start": b, "end": a, "begin_tokens": tokens // 2},
        {"shape": "piecewise", "points": ((0, b), (tokens, a))},
        {"shape": "constant", "start": (a + b) / 2},
    ]
    taken = [
        samples(simple_order(Mode2FractionConfig.model_validate(plan), total, seed).rows(0, total))
        for plan in plans
    ]
    assert all(other == taken[0] for other in taken[1:])


def test_rows_equal_a_walk_by_definition() -> None:
    """Row by row in exact fractions; each pass over a source is one permutation of it."""
    config = Mode2FractionConfig(
        shape="linear", start=Decimal("0.1"), end=Decimal("0.9"), begin_tokens=480, end_tokens=4800
    )
    rows = simple_order(config, 500).rows(0, 500)
    planned = Fraction(0)
    web_planned = Fraction(0)
    sizes, taken = (90, 13, 31), [0, 0, 0]
    seen: dict[tuple[int, int], list[int]] = {}
    for i in range(500):
        middle = min(max(Fraction(2 * i + 1, 2) * SEQ_LEN, Fraction(480)), Fraction(4800))
        before = planned // 1
        planned += Fraction(1, 10) + Fraction(8, 10) * (middle - 480) / 4320
        mode = 2 if planned // 1 > before else 1
        number = 2
        if mode == 1:
            web_before = web_planned // 1
            web_planned += Fraction(7, 10)
            number = 0 if web_planned // 1 > web_before else 1
        epoch = taken[number] // sizes[number]
        taken[number] += 1
        assert (rows.row[i], rows.mode[i], rows.source[i], rows.epoch[i]) == (
            i,
            mode,
            number,
            epoch,
        )
        seen.setdefault((number, epoch), []).append(int(rows.source_row[i]))
    for (number, epoch), source_rows in seen.items():
        full = (epoch + 1) * sizes[number] <= taken[number]
        assert len(set(source_rows)) == len(source_rows)
        if full:
            assert sorted(source_rows) == list(range(sizes[number]))


@given(config=fractions(), cuts=st.lists(st.integers(0, 400), max_size=4))
@settings(max_examples=30, deadline=None)
def test_a_row_does_not_depend_on_the_question(
    config: Mode2FractionConfig, cuts: list[int]
) -> None:
    order = simple_order(config, 400)
    whole = order.rows(0, 400)
    edges = [0, *sorted(cuts), 400]
    for begin, end in itertools.pairwise(edges):
        part = order.rows(begin, end)
        for name in ("row", "mode", "source", "source_row", "epoch"):
            assert np.array_equal(getattr(part, name), getattr(whole, name)[begin:end])


@given(config=fractions(), epochs_max=st.sampled_from([None, "1.5", "0.1"]))
@settings(max_examples=12, deadline=None)
def test_rows_seen_is_the_inverse(config: Mode2FractionConfig, epochs_max: str | None) -> None:
    mix = mix_of(
        config, [source("web", "1", epochs_max), source("books")], [source("chat"), source("help")]
    )
    order = Order(mix, SEQ_LEN, 250, 9, {"web": 40, "books": 13, "chat": 31, "help": 7})
    rows = order.rows(0, 250)
    for number, size in enumerate((40, 13, 31, 7)):
        for source_row in range(size):
            mask = (rows.source == number) & (rows.source_row == source_row)
            places = order.places(number, source_row)
            assert [row for row, _ in places] == np.flatnonzero(mask).tolist()
        assert order.rows_of_source(number) == np.sum(rows.source == number)


def test_far_rows_agree_with_their_inverse() -> None:
    mix = mix_of(
        Mode2FractionConfig(shape="cosine", start=Decimal("0.05"), end=Decimal("0.5")),
        [source("web", "0.123456789"), source("books", "0.3")],
        [source("chat")],
    )
    sizes = {"web": 3 * 10**11, "books": 2 * 10**11 + 1, "chat": 10**11}
    order = Order(mix, 4096, TRILLION, 1, sizes)
    rows = order.rows(TRILLION - 12, TRILLION)
    assert 3 <= np.sum(rows.mode == 2) <= 9
    for i in range(12):
        places = order.places(int(rows.source[i]), int(rows.source_row[i]))
        assert (rows.row[i], "mix") in places
    assert order.integral.mode_rows(2, TRILLION) == 275 * 10**9


def test_deal_is_a_permutation_that_changes_with_step_and_seed() -> None:
    config = Mode2FractionConfig(start=Decimal("0.25"))
    order = simple_order(config, 4000)
    deals = list(order.deals(0, 50, 64))
    assert all(np.array_equal(np.sort(deal), np.arange(64)) for deal in deals)
    assert len({tuple(deal.tolist()) for deal in deals}) == 50
    assert not np.array_equal(simple_order(config, 4000, seed=6).deals(0, 1, 64)[0], deals[0])
    first_slot = np.array([order.rows(s * 64, s * 64 + 64).mode[deals[s][0]] for s in range(50)])
    assert 2 <= np.sum(first_slot == 2) <= 30  # every fourth row is Mode 2: no slot always gets it


def test_a_dry_source_hands_on_inside_its_mode_and_is_announced() -> None:
    mix = mix_of(
        Mode2FractionConfig(start=Decimal("0.5")),
        [source("web", "3", "1"), source("books")],
        [source("chat")],
    )
    order = Order(mix, SEQ_LEN, 400, 3, {"web": 60, "books": 900, "chat": 40})
    rows = order.rows(0, 400)
    last_web = int(np.flatnonzero(rows.source == 0)[-1])
    assert np.sum(rows.source == 0) == 60
    assert np.all(rows.source[last_web + 3 :][rows.mode[last_web + 3 :] == 1] == 1)
    assert np.array_equal(np.cumsum(rows.mode == 2), np.arange(1, 401) // 2)
    dry, repeats = sorted(warnings(order), key=lambda text: "repeats" in text)
    assert dry.startswith("source 'web' (mode 1) runs dry after epochs_max 1, at row 162 (2,592")
    assert "'chat' (mode 2) repeats: 5.00 epochs" in repeats
    second = int(np.flatnonzero(rows.epoch * (rows.source == 2) == 1)[0])
    assert f"the second begins at row {second} (" in repeats


def test_a_dry_mode_is_refused_with_when_and_fix() -> None:
    half = Mode2FractionConfig(start=Decimal("0.5"))
    mix = mix_of(half, [source("web")], [source("chat", "1", "2")])
    sizes = {"web": 50, "chat": 10}
    Order(mix, SEQ_LEN, 41, 3, sizes)  # 20 Mode 2 rows: just enough
    with pytest.raises(
        DataError, match=r"mode 2 runs dry at row 41 \(656 tokens\).*21.*20.*epochs_max"
    ):
        Order(mix, SEQ_LEN, 42, 3, sizes)
    Order(mix_of(half, [], [source("chat")]), SEQ_LEN, 0, 3, sizes)


def test_a_source_without_a_row_is_refused() -> None:
    mix = mix_of(Mode2FractionConfig(start=Decimal(0)), [source("web")], [])
    with pytest.raises(DataError, match=r"'web' in mix\.mode1\.sources has 0 rows"):
        Order(mix, SEQ_LEN, 10, 3, {"web": 0})


def test_rows_outside_the_run_are_refused() -> None:
    order = simple_order(Mode2FractionConfig(), 10)
    assert len(order.rows(10, 10)) == 0
    for begin, end in ((-1, 3), (0, 11), (5, 4)):
        with pytest.raises(ValueError, match="not within"):
            order.rows(begin, end)
