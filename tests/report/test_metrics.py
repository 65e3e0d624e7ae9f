from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mode.engine.step import TokenOutputs
from megatron_mode.kernels.mode_loss import LossOutput
from megatron_mode.mix.loader import MicroBatch
from megatron_mode.report.metrics import (
    auroc,
    auroc_by_position,
    logit_bins,
    position_histogram,
    recall_of_counts,
    token_metrics,
    token_sums,
)
from megatron_mode.tokens.flags import CONTROL, MODE2

floats32 = st.floats(width=32, allow_nan=False)
# Few values, so that ties are common; wide gaps, so that distinct ones fall in distinct bins.
coarse = st.sampled_from([-30.0, -4.0, -1.0, -0.0, 0.0, 0.5, 2.0, 16.0])
scored = st.lists(st.tuples(coarse, st.booleans()), min_size=1, max_size=30)


def brute_auroc(pairs):
    """Compare every Mode 2 score with every Mode 1 score."""
    high = [score for score, label in pairs if label]
    low = [score for score, label in pairs if not label]
    if not high or not low:
        return None
    wins = sum((a > b) + 0.5 * (a == b) for a in high for b in low)
    return wins / (len(high) * len(low))


def brute_recall(pairs, rate):
    """Walk down the thresholds; take part of the tie that crosses the allowed false positives."""
    high = sum(label for _, label in pairs)
    low = len(pairs) - high
    if not high or not low:
        return None
    allowed, caught, passed = rate * low, 0.0, 0
    for threshold in sorted({score for score, _ in pairs}, reverse=True):
        hits = sum(label for score, label in pairs if score == threshold)
        false = sum(not label for score, label in pairs if score == threshold)
        if passed + false > allowed:
            return (caught + hits * (allowed - passed) / false) / high
        caught, passed = caught + hits, passed + false
    return caught / high


def tokens_of(count, seed=0, **changed):
    generator = torch.Generator().manual_seed(seed)
    label = (torch.rand(count, generator=generator) < 0.4).float()
    fields = {
        "nll_N": torch.rand(count, generator=generator) * 9,
        "bce_N": torch.rand(count, generator=generator),
        "mode_logit_N": torch.randn(count, generator=generator) * 3 + label,
        "blocked_N": torch.rand(count, generator=generator) < 0.1,
        "lm_weight_N": (torch.rand(count, generator=generator) < 0.9).float() * 1.5,
        "mode_label_N": label,
        "mode_weight_N": (torch.rand(count, generator=generator) < 0.8).float() * 0.5,
        "flags_N": ((torch.rand(count, generator=generator) < 0.2) * CONTROL + MODE2).to(
            torch.uint8
        ),
    }
    return {**fields, **changed}


def outputs_of(fields):
    """Return the fields as a micro-batch and its losses; what the metrics do not read is None."""
    of_batch = {name.replace("_N", "_BT"): value for name, value in fields.items()}
    of_loss = {name: of_batch.pop(name, None) for name in LossOutput.__annotations__}
    empty = dict.fromkeys(MicroBatch._fields)
    return TokenOutputs(MicroBatch(**{**empty, **of_batch}), LossOutput(**of_loss))


def sums_of(fields, bits=12):
    return token_sums([outputs_of(fields)], bits)


def metrics_of(fields, bits=12):
    return token_metrics(sums_of(fields, bits))


def pairs_of(fields):
    keep = (fields["mode_weight_N"] > 0) & ((fields["flags_N"] & CONTROL) == 0)
    logits, labels = fields["mode_logit_N"][keep], fields["mode_label_N"][keep] >= 0.5
    return list(zip(logits.tolist(), labels.tolist(), strict=True))


@given(st.lists(floats32, min_size=2, max_size=20), st.sampled_from([10, 12, 16, 24]))
def test_bins_never_fall_as_the_logit_rises(values, bits):
    ordered = torch.tensor(sorted(values), dtype=torch.float32)
    bins = logit_bins(ordered, bits)
    assert (bins.diff() >= 0).all()
    assert bins.min() >= 0
    assert bins.max() < 1 << bits


def test_bins_are_narrow_and_keep_zero_and_nan_apart():
    bins = logit_bins(torch.tensor([-math.inf, -1e-3, -0.0, 0.0, 1e-3, 1.0, 1.13, math.inf]))
    assert bins[2] == bins[3]
    assert len(set(bins.tolist())) == 7
    assert logit_bins(torch.tensor([math.nan]))[0] > bins[-1]
    assert logit_bins(torch.tensor([-math.nan]))[0] > bins[-1]


@given(scored)
def test_exact_auroc_is_the_share_of_won_pairs(pairs):
    scores, labels = zip(*pairs, strict=True)
    assert auroc(scores, labels) == pytest.approx(brute_auroc(pairs), abs=1e-12)


def test_exact_auroc_of_nan_is_none():
    assert auroc([math.nan, 1.0], [0, 1]) is None


@given(scored)
def test_histograms_give_auroc_and_recall_with_ties(pairs):
    logits, labels = (
        torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True)
    )
    fields = tokens_of(
        len(pairs),
        mode_logit_N=logits,
        mode_label_N=labels,
        mode_weight_N=torch.ones(len(pairs)),
        flags_N=torch.zeros(len(pairs), dtype=torch.uint8),
    )
    metrics = metrics_of(fields)
    assert metrics["mode_auroc"] == pytest.approx(brute_auroc(pairs), abs=1e-12)
    for key, rate in (("mode_recall_at_fpr01", 0.01), ("mode_recall_at_fpr05", 0.05)):
        assert metrics[key] == pytest.approx(brute_recall(pairs, rate), abs=1e-9)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=9),
    st.sampled_from([0.0, 0.01, 0.05, 0.3, 1.0]),
)
def test_recall_of_counts_at_any_rate(counts, rate):
    pairs = [
        (float(score), label)
        for score, (mode1, mode2) in enumerate(counts)
        for label in [False] * mode1 + [True] * mode2
    ]
    mode1_B, mode2_B = np.array(counts, dtype=np.float64).T
    expected = brute_recall(pairs, rate)
    assert recall_of_counts(mode1_B, mode2_B, rate) == pytest.approx(expected, abs=1e-9)


def test_continuous_logits_come_within_the_bins_of_the_exact_figures():
    fields = tokens_of(2000, seed=3)
    pairs = pairs_of(fields)
    exact, exact_recall = brute_auroc(pairs), brute_recall(pairs, 0.01)
    coarse12, fine20 = (metrics_of(fields, bits) for bits in (12, 20))
    assert coarse12["mode_auroc"] == pytest.approx(exact, abs=2e-3)
    assert fine20["mode_auroc"] == pytest.approx(exact, abs=1e-5)
    assert fine20["mode_recall_at_fpr01"] == pytest.approx(exact_recall, abs=2e-3)
    with_control = {**fields, "flags_N": torch.zeros(2000, dtype=torch.uint8)}
    everything = metrics_of(with_control, 20)["mode_auroc"]
    assert abs(everything - exact) > 1e-4  # control pieces would show


def test_losses_and_shares_match_a_loop_over_tokens():
    fields = tokens_of(300, seed=1)
    sums = dict.fromkeys(("nll1", "w1", "nll2", "w2", "bce", "c", "valid", "mode2", "blocked"), 0.0)
    correct = total = 0
    rows = zip(*(fields[name].tolist() for name in fields), strict=True)
    for nll, bce, logit, blocked, a, label, c, _ in rows:
        mode = 2 if label >= 0.5 else 1
        sums[f"nll{mode}"] += a * nll
        sums[f"w{mode}"] += a
        sums["bce"] += c * bce
        sums["c"] += c
        if a > 0 or c > 0:
            sums["valid"] += 1
            sums["mode2"] += mode == 2
            sums["blocked"] += blocked
        if c > 0:
            total += 1
            correct += (logit > 0) == (mode == 2)
    metrics = metrics_of(fields)
    expected = {
        "lm_loss": (sums["nll1"] + sums["nll2"]) / (sums["w1"] + sums["w2"]),
        "lm_loss_mode1": sums["nll1"] / sums["w1"],
        "lm_loss_mode2": sums["nll2"] / sums["w2"],
        "mode_loss": sums["bce"] / sums["c"],
        "mode_accuracy": correct / total,
        "mode2_token_fraction_realised": sums["mode2"] / sums["valid"],
        "blocked_share": sums["blocked"] / sums["valid"],
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6), name


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.integers(0, 5), st.data())
def test_merged_parts_equal_everything_at_once(count, seed, data):
    cut = data.draw(st.integers(0, count))
    fields = tokens_of(count, seed)
    parts = [
        outputs_of({name: value[part] for name, value in fields.items()})
        for part in (slice(0, cut), slice(cut, count))
    ]
    whole = sums_of(fields)
    reduced = token_sums(parts)
    added = token_sums(parts[:1]) + token_sums(parts[1:]) + token_sums([])
    torch.testing.assert_close(reduced, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(added, whole, rtol=1e-12, atol=1e-12)
    assert whole.dtype == torch.float64
    for name, value in token_metrics(whole).items():
        merged = token_metrics(reduced)[name]
        assert merged is value is None or merged == pytest.approx(value, rel=1e-12), name


def test_shape_does_not_matter():
    fields = tokens_of(24)
    square = {name: value.view(4, 6) for name, value in fields.items()}
    assert torch.equal(sums_of(fields), sums_of(square))


def test_absent_class_and_no_tokens_give_none():
    only_mode1 = metrics_of(tokens_of(50, mode_label_N=torch.zeros(50)))
    assert only_mode1["lm_loss_mode1"] == only_mode1["lm_loss"]
    for name in ("lm_loss_mode2", "mode_auroc", "mode_recall_at_fpr01", "mode_recall_at_fpr05"):
        assert only_mode1[name] is None
    assert only_mode1["mode2_token_fraction_realised"] == 0
    assert set(token_metrics(token_sums([])).values()) == {None}


def test_nan_in_one_mode_leaves_the_other_and_unsets_the_auroc():
    fields = tokens_of(200)
    mode2 = fields["mode_label_N"] >= 0.5
    fields["nll_N"] = torch.where(mode2, math.nan, fields["nll_N"])
    fields["mode_logit_N"] = torch.where(mode2, math.nan, fields["mode_logit_N"])
    metrics = metrics_of(fields)
    assert math.isfinite(metrics["lm_loss_mode1"])
    assert math.isnan(metrics["lm_loss_mode2"])
    assert metrics["mode_auroc"] is None
    assert metrics["mode_recall_at_fpr01"] is None


def test_recall_of_a_separating_head_is_one():
    assert recall_of_counts(np.array([100.0, 0, 0]), np.array([0.0, 0, 7]), 0.01) == 1
    assert recall_of_counts(np.array([0.0, 0, 100]), np.array([7.0, 0, 0]), 0.01) == 0


def test_positions_are_bucketed_by_powers_of_two():
    fields = tokens_of(3000, seed=2, flags_N=torch.zeros(3000, dtype=torch.uint8))
    fields["flags_N"][::7] = CONTROL
    fields["position_N"] = position = torch.arange(3000) % 40
    result = auroc_by_position(position_histogram([outputs_of(fields)], bits=20))
    assert list(result) == ["1", "2", "4", "8", "16", "32"]
    for first, value in result.items():
        low, high = (0 if first == "1" else int(first)), 2 * int(first)
        inside = (position >= low) & (position < high)
        pairs = pairs_of({name: tensor[inside] for name, tensor in fields.items()})
        assert value == pytest.approx(brute_auroc(pairs), abs=1e-3)
    halves = [
        outputs_of({name: tensor[half] for name, tensor in fields.items()})
        for half in (slice(0, 1000), slice(1000, 3000))
    ]
    whole = position_histogram([outputs_of(fields)])
    assert torch.equal(position_histogram(halves), whole)
    assert torch.equal(position_histogram(halves[:1]) + position_histogram(halves[1:]), whole)
    assert not position_histogram([]).any()


def test_a_position_beyond_the_last_bucket_counts_there():
    fields = tokens_of(2, mode_weight_N=torch.ones(2), flags_N=torch.zeros(2, dtype=torch.uint8))
    fields["position_N"] = torch.tensor([10**9, 2**15])
    assert list(auroc_by_position(position_histogram([outputs_of(fields)]))) == [str(2**15)]
