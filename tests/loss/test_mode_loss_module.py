"""Check the public module: choice of implementation, errors, padded vocabulary."""

import pytest
import torch

from megatron_mode.config.fields import LossConfig
from megatron_mode.errors import ConfigError, DataError
from megatron_mode.loss.mode_loss import ModeLoss, choose_implementation


def test_implementations_are_chosen_or_refused(monkeypatch):
    assert choose_implementation("auto", "cpu") == "chunked"
    assert choose_implementation("auto", "cuda") == "triton"
    for name in ("chunked", "reference"):
        assert choose_implementation(name, "cpu") == choose_implementation(name, "cuda") == name
    monkeypatch.setattr("megatron_mode.loss.mode_loss.why_no_triton", lambda device: "is broken")
    assert choose_implementation("auto", "cuda") == "chunked"
    with pytest.raises(ConfigError, match=r"loss.implementation is 'triton'.*is broken.*auto"):
        ModeLoss(LossConfig(implementation="triton"), 10)


def test_the_module_has_no_parameters_and_equals_the_formulas(make_case, truth_of, relative_error):
    case = make_case(20, 8, 30, padded_size=128)
    loss = ModeLoss(LossConfig(z_weight=0.01), 30)
    assert not list(loss.parameters())
    assert not loss.state_dict()
    leaves = case.leaves()
    output = loss(*leaves.parameters, case.targets)
    (output.lm_sum + output.mode_sum).backward()
    truth = truth_of(case, z_weight=0.01)
    assert output.lm_sum.item() == pytest.approx(truth.lm_sum, rel=1e-5)
    for value, expected in zip(leaves.parameters, truth.gradients, strict=True):
        assert relative_error(value.grad, expected) < 4e-6


def test_a_target_outside_the_vocabulary_is_a_data_error(make_case):
    case = make_case(20, 8, 30, padded_size=128, mask="none")
    case.targets.target_BT[7] = 30
    with pytest.raises(DataError, match=r"target\[7\] is 30; accepted are 0 to 29"):
        ModeLoss(LossConfig(), 30)(*case.parameters, case.targets)


def test_implementations_agree(make_case):
    case = make_case(64, 16, 300, padded_size=384)
    outputs = [
        ModeLoss(LossConfig(implementation=name, z_weight=1e-4), 300)(
            *case.parameters, case.targets
        )
        for name in ("chunked", "reference")
    ]
    assert torch.allclose(outputs[0].lm_sum, outputs[1].lm_sum, rtol=1e-6)
    assert torch.equal(outputs[0].mode_sum, outputs[1].mode_sum)


def test_options_of_a_gpu_change_nothing_here(make_case):
    """Kept logits, a checked range and a bf16 sum over ranks leave one rank's fp32 result alone."""
    case = make_case(20, 8, 30)
    outputs = []
    for options in (
        {},
        {"keep_logits_bytes": 2**20, "check_targets": True, "reduce_dtype": "bf16"},
    ):
        leaves = case.leaves()
        loss = ModeLoss(LossConfig(implementation="triton", **options), 30)
        output = loss(*leaves.parameters, leaves.targets)
        output.lm_sum.backward()
        outputs.append((output.lm_sum, leaves.hidden_ND.grad, leaves.lm_weight_VD.grad))
    for value, expected in zip(*outputs, strict=True):
        assert torch.allclose(value, expected, atol=1e-6)
