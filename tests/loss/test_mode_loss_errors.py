"""Shape, dtype, device and range errors name argument, value and expectation."""

from dataclasses import replace

import pytest
import torch

from megatron_mode.kernels.mode_loss import TargetRangeError, VocabShard, mode_loss


@pytest.mark.parametrize("target", [-1, 20, 10**6])
def test_a_target_outside_the_vocabulary_is_named(target, make_case, run_case, implementation):
    case = make_case(30, 8, 20, padded_size=32, mask="none")
    case.targets.target_BT[3] = target
    with pytest.raises(TargetRangeError, match=rf"target\[3\] is {target}; accepted are 0 to 19"):
        run_case(case, implementation=implementation)


@pytest.mark.parametrize(
    ("field", "value", "error", "text"),
    [
        ("hidden_ND", torch.zeros(4), ValueError, r"hidden has shape \[4\]"),
        ("hidden_ND", torch.zeros(30, 8, dtype=torch.int64), TypeError, "hidden has dtype"),
        ("lm_weight_VD", torch.zeros(20, 7), ValueError, r"lm_weight has shape \[20, 7\].*8\]"),
        ("lm_weight_VD", torch.zeros(20, 8).half(), TypeError, "lm_weight has dtype torch.float16"),
        ("mode_weight_D", torch.zeros(1, 8), ValueError, r"mode_weight has shape \[1, 8\]"),
        ("mode_bias", torch.zeros(2), ValueError, r"mode_bias has shape \[2\]"),
        ("mode_bias", None, ValueError, "mode_weight and mode_bias: expected both, or None"),
        (
            "mode_weight_D",
            torch.zeros(8).to("meta"),
            ValueError,
            "mode_weight is on meta",
        ),
        ("lm_weight_VD", torch.zeros(20, 8).to("meta"), ValueError, "lm_weight is on meta; expect"),
    ],
)
def test_wrong_shapes_and_dtypes_are_named(field, value, error, text, make_case, run_case):
    with pytest.raises(error, match=text):
        run_case(replace(make_case(30, 8, 20), **{field: value}))


def test_wrong_targets_are_named(make_case):
    case = make_case(30, 8, 20)
    for field, value, error, text in (
        ("target_BT", torch.zeros(30), TypeError, "target has dtype torch.float32"),
        ("target_BT", torch.zeros(29, dtype=torch.int64), ValueError, r"target has shape \[29\]"),
        ("mode_label_BT", torch.zeros(1, 30), ValueError, r"mode_label has shape \[1, 30\]"),
        (
            "mode_label_BT",
            torch.zeros(30).to("meta"),
            ValueError,
            "mode_label is on meta",
        ),
        ("lm_rows_n", torch.tensor([[1]]), ValueError, r"lm_rows has shape \[1, 1\]"),
        (
            "lm_rows_n",
            torch.tensor([3, 30]),
            ValueError,
            "lm_rows holds 3 to 30; acc.* 0 to 29",
        ),
    ):
        with pytest.raises(error, match=text):
            mode_loss(
                *case.parameters,
                replace(case.targets, **{field: value}),
                shard=VocabShard(vocab_size=20),
            )


def test_wrong_choices_are_named(make_case, run_case):
    case, double = make_case(30, 8, 20), make_case(30, 8, 20, dtype=torch.float64)
    for given, options, error, text in (
        (case, {"implementation": "fast"}, ValueError, "implementation is 'fast'; expected triton"),
        (double, {"implementation": "triton"}, TypeError, "hidden has dtype torch.float64"),
    ):
        with pytest.raises(error, match=text):
            run_case(given, **options)
