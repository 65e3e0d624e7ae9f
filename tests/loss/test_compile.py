"""Check the registered operators: schemas, fake kernels, torch.compile without graph breaks."""

import pytest
import torch
from torch.library import opcheck

from megatron_mode.kernels.mode_loss import Blocking, Targets, VocabShard, library, mode_loss
from megatron_mode.kernels.mode_loss import library_backward as registered
from megatron_mode.kernels.mode_loss.layout import TokenGrid
from megatron_mode.kernels.mode_loss.plan import Plan, Wants
from megatron_mode.kernels.mode_loss.results import Kept, TokenLosses

BLOCKING = Blocking(0.1, watch_mode1=True, watch_mode2=True, cap=(1, 5), lm=True, mode=True)
CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


def arguments_of(case, implementation, rows_n=None, **options):
    shard = VocabShard(vocab_size=case.vocab_size)
    grid = TokenGrid((len(case.hidden_ND),), rows_first=True)
    plan = Plan(implementation, grid, shard, Wants(True, True, True, True), **options)
    targets = case.targets
    values = (
        targets.target_BT,
        targets.lm_weight_BT,
        targets.mode_label_BT,
        targets.mode_weight_BT,
        rows_n,
    )
    return (*case.parameters, *values, *library.pack(plan))


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_operator(implementation, dtype, make_case):
    case = make_case(12, 8, 20, padded_size=24, dtype=dtype)
    for options in (
        {},
        {"blocking": BLOCKING, "z_weight": 0.1},
        {"rows_n": torch.arange(5), "keep_logits_bytes": 2**20},
    ):
        arguments = arguments_of(case, implementation, **options)
        opcheck(torch.ops.megatron_mode.mode_loss_forward.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("keep", [0, 2**20])
def test_backward_operators(keep, make_case):
    case = make_case(12, 8, 20, padded_size=24)
    arguments = arguments_of(case, "triton", keep_logits_bytes=keep)
    outputs = torch.ops.megatron_mode.mode_loss_forward(*arguments)
    kept = list(Kept(*outputs[len(TokenLosses._fields) :]))
    saved = (
        case.hidden_ND,
        case.lm_weight_VD,
        case.targets.target_BT,
        case.targets.mode_weight_BT,
        None,
        case.mode_weight_D,
    )
    rest = (kept, torch.tensor(2.0), torch.tensor(-1.0), *arguments[-3:])
    opcheck(registered.mode_loss_backward, (*saved, *rest), test_utils=CHECKS)
    into = (torch.zeros(24, 8), *saved, *rest)
    opcheck(registered.mode_loss_backward_into, into, test_utils=CHECKS)


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
def test_compiles_whole_and_changes_nothing(implementation, make_case):
    case = make_case(12, 8, 20)

    def loss(hidden, weight, head, bias, *targets):
        output = mode_loss(
            hidden,
            weight,
            head,
            bias,
            Targets(*targets),
            shard=VocabShard(vocab_size=20),
            blocking=BLOCKING,
            implementation=implementation,
        )
        return 0.3 * output.lm_sum + output.mode_sum, output.nll_BT, output.blocked_BT

    targets = case.targets
    given = (
        targets.target_BT,
        targets.lm_weight_BT,
        targets.mode_label_BT,
        targets.mode_weight_BT,
    )
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = case.leaves()
        total, *tokens = function(*leaves.parameters, *given)
        total.backward()
        results.append([total, *tokens, *(value.grad for value in leaves.parameters)])
    assert results[0][2].any()
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager.float(), compiled.float(), atol=1e-6)
