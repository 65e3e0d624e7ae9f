"""The benchmark measures what it says: errors against a truth, times in pairs, memory per call."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from megatron_mode.errors import ConfigError
from megatron_mode.kernels.bench import compare as comparison
from megatron_mode.kernels.bench import measure, problem
from megatron_mode.kernels.bench.implementations import (
    BY_NAME,
    CHUNKED,
    CHUNKED_WITHOUT_HEAD,
    IMPLEMENTATIONS,
    Implementation,
)
from megatron_mode.kernels.bench.measure import Interval, median_interval
from megatron_mode.kernels.bench.problem import Case, MeasurementError

TINY = (64, 32, 512)
PEERS = [one.name for one in IMPLEMENTATIONS if not one.ours and not one.not_on_cpu]
ON_CPU = [
    # Compiling takes most of a minute.
    pytest.param(one, marks=[pytest.mark.slow] * (one.name == "cut-cross-entropy"), id=one.name)
    for one in IMPLEMENTATIONS
    if not one.not_on_cpu
]


def tiny(dtype="fp32", shape=TINY):
    return Case(shape, dtype, "cpu", threads=2)


def run(*arguments, check=False):
    command = [sys.executable, "-m", "megatron_mode.kernels.bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=check)


def first_errors(implementation, dtype):
    inputs = problem.make_inputs(tiny(dtype))
    with_head, lm_alone = problem.exact(inputs)
    truth = with_head if implementation.mode_head else lm_alone
    loss = implementation.loss(inputs)
    loss.backward()
    return problem.errors(loss, inputs, truth)


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 5e-6), ("bf16", 2e-2)])
@pytest.mark.filterwarnings("ignore")
def test_every_implementation_computes_the_same_loss(implementation, dtype, bound):
    assert max(first_errors(implementation, dtype)) < bound


def test_ours_in_bf16_is_no_less_exact_than_plain_torch():
    ours, plain = first_errors(CHUNKED, "bf16"), first_errors(BY_NAME["torch"], "bf16")
    assert ours[0] <= plain[0]
    assert ours[1] <= plain[1]


def test_truth_is_that_of_autograd_in_fp64():
    inputs = problem.make_inputs(tiny(shape=(300, 8, 17)))  # more tokens than one chunk
    hidden, lm_weight, mode_weight, bias = (
        leaf.detach().double().requires_grad_() for leaf in inputs.leaves.values()
    )
    logit = hidden @ lm_weight.T
    lm_sum = torch.nn.functional.cross_entropy(logit, inputs.target_N, reduction="sum")
    probability = (hidden @ mode_weight + bias).sigmoid()
    label = inputs.mode_label_N
    mode_sum = -(label * probability.log() + (1 - label) * (1 - probability).log()).sum()
    with_head, lm_alone = problem.exact(inputs)
    gradient = torch.autograd.grad(lm_sum, [hidden, lm_weight], retain_graph=True)
    assert lm_alone.loss == pytest.approx(lm_sum.item(), rel=1e-12)
    torch.testing.assert_close(list(lm_alone.gradients.values()), list(gradient))
    gradient = torch.autograd.grad(lm_sum + mode_sum, [hidden, lm_weight, mode_weight])
    assert with_head.loss == pytest.approx((lm_sum + mode_sum).item(), rel=1e-12)
    torch.testing.assert_close(list(with_head.gradients.values()), list(gradient))


def test_relative_error_covers_every_row():
    truth = torch.ones(5000, 2, dtype=torch.float64)
    value = truth.clone()
    value[-1, -1] = 101.0
    assert problem.relative_error(value, truth) == pytest.approx(1.0)
    assert problem.relative_error(truth.float(), truth) == 0


@pytest.mark.parametrize(("count", "k"), [(6, 1), (8, 1), (9, 2), (15, 4), (20, 6), (100, 40)])
def test_interval_takes_the_order_statistics_of_the_sign_test(count, k):
    """k as in the tables of the sign test."""
    assert median_interval([*reversed(range(count))]) == Interval((count - 1) / 2, k - 1, count - k)


@pytest.mark.parametrize("count", range(6, 60))
def test_interval_is_the_narrowest_with_95_percent(count):
    low = int(median_interval(range(count)).low)

    def covered(skipped):
        return 1 - 2 * sum(math.comb(count, heads) for heads in range(skipped + 1)) / 2**count

    assert covered(low) >= 0.95 > covered(low + 1)


def test_share_of_the_mode_head_is_paired_and_alternates(monkeypatch):
    order = []
    machine = iter([1.0, 1.0, 5.0, 5.0] * 3)  # a slow spell slows both calls of a pair

    def seconds(loss, inputs):
        order.append(loss)
        return next(machine) * (1.25 if loss == "with" else 1.0)

    monkeypatch.setattr(measure, "call_seconds", seconds)
    share = measure.head_share("with", "without", None, rounds=6, step=lambda: None)
    assert share == Interval(0.25, 0.25, 0.25)
    assert order == ["without", "with", "with", "without"] * 3


def test_rounds_change_their_order():
    orders = ["".join(comparison.rotated([*"abc"], turn)) for turn in range(4)]
    assert orders == ["abc", "bca", "cab", "abc"]
    assert comparison.rotated([], 3) == []


def test_limit_ends_the_rounds_but_not_the_first():
    made = [[], [48.0], [48.0, 48.0], [600.0]]
    assert [comparison.allows_another(seconds) for seconds in made] == [True, True, False, False]


def one_hundredth_more(inputs):
    return 1.01 * CHUNKED.loss(inputs)


def failing(inputs):
    raise OSError("no such library\nand ten lines more")


def infinite(inputs):
    return CHUNKED.loss(inputs) * math.inf


def without_gradients(inputs):
    return inputs.mode_bias.sum()


def test_what_fails_is_left_out_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(comparison, "extra_bytes_in_fresh_process", no_memory)
    losses = (failing, infinite, without_gradients, one_hundredth_more)
    made = [Implementation(loss.__name__, loss) for loss in losses]
    (row,) = comparison.compare(tiny(), made, 3, 0)
    assert capsys.readouterr().err.splitlines() == [
        "failing left out: OSError: no such library",
        "infinite left out: its loss or a gradient is not finite",
        "without_gradients left out: the backward pass left no gradient on hidden",
        "memory of one_hundredth_more not measured: its process ended with status -9",
    ]
    assert (row.name, row.extra_bytes, len(row.seconds)) == ("one_hundredth_more", None, 3)
    assert row.loss_error == pytest.approx(0.01, rel=1e-3)
    assert row.grad_error == pytest.approx(0.01, rel=1e-3)


def no_memory(*arguments, **options):
    raise MeasurementError("its process ended with status -9")


def test_a_shape_beyond_the_memory_is_refused():
    case = tiny(shape=(2**31 - 1, 2**31 - 1, 2**31 - 1))
    with pytest.raises(ConfigError, match=r"shape is 2147483647 .* choose a smaller one"):
        comparison.compare(case, [CHUNKED], 1, 0)


def eight_blocks(inputs):
    blocks = [torch.ones(2**20) for _ in range(8)]  # 4 MiB each, which glibc keeps when freed
    return CHUNKED.loss(inputs) + 0 * sum(float(block[0]) for block in blocks)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark from /proc")
@pytest.mark.parametrize("short_warm_up", [True, False])
def test_extra_bytes_are_those_of_the_call(short_warm_up):
    blocks = Implementation("blocks", eight_blocks)
    measured = measure.extra_bytes(blocks, tiny(), short_warm_up)
    plain = measure.extra_bytes(CHUNKED, tiny(), short_warm_up)
    assert 0 <= plain < 4 * 2**20
    assert abs(measured - plain - 32 * 2**20) < 2 * 2**20


def killed(inputs):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_measurement_is_an_error():
    one = Implementation("killed", killed)
    with pytest.raises(BrokenProcessPool):
        measure.extra_bytes_in_fresh_process(one, tiny(), short_warm_up=False)


def row_of(name, seconds, memory):
    implementation = Implementation(name, failing, ours=name == "ours")
    return comparison.Row(implementation, 1e-7, 2e-6, seconds, memory)


def test_table_takes_the_ratios_to_the_fastest_peer():
    ours = row_of("ours", [1.0, 3.0, 2.0], 2**20)
    ours.mode_head_share = Interval(0.004, -0.001, 0.009)
    rows = [row_of("slow", [9.0], None), row_of("fast", [4.0], 8 * 2**20), ours]
    title, header, slow, fast, own, share = comparison.table(tiny(), rows).splitlines()
    assert title.endswith("ratios to fast, the fastest peer")
    assert slow.split() == ["slow", "9", "2.25", "9", "1", "-", "-", "1.0e-07", "2.0e-06"]
    assert fast.split()[1:7] == ["4", "1.00", "4", "1", "8.0", "1.00"]
    assert own.split()[1:7] == ["2", "0.50", "1", "3", "1.0", "0.12"]
    assert len({len(line) for line in (header, slow, fast, own)}) == 1
    assert "+0.40% (95 % interval -0.10% to +0.90%)" in share


def test_json_of_the_command():
    names = ["torch", CHUNKED.name, CHUNKED_WITHOUT_HEAD.name]
    shape, options = ["64", "32", "4096"], ["--rounds", "1", "--head-rounds", "6"]
    done = run(
        *("--json", "--device", "cpu", "--dtype", "fp32", "--shape", *shape, *options),
        *("--only", ",".join([*names, "liger"])),
        check=True,
    )
    assert done.stderr.splitlines() == ["liger left out: its Triton kernels need a CUDA device"]
    (entry,) = json.loads(done.stdout)
    rows = entry.pop("rows")
    assert entry == {"shape": [64, 32, 4096], "dtype": "fp32", "device": "cpu", "threads": 2}
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert row["rounds"] == 1
        assert 0 < row["min_seconds"] <= row["median_seconds"]
        assert row["extra_bytes"] >= 2**19  # the gradient of the LM head
        assert row["loss_error"] < 1e-6
        assert row["grad_error"] < 1e-5
    share = rows[1]["mode_head_share"]
    assert share["low"] <= share["median"] <= share["high"]


def test_help_is_instant():
    began = os.times()
    assert "torch linear_cross_entropy" in " ".join(run("--help", check=True).stdout.split())
    ended = os.times()
    # Processor time of the child: a busy machine makes only the clock on the wall run longer.
    used = ended.children_user - began.children_user + ended.children_system
    assert used - began.children_system < 0.5


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--rounds", "0"], "--rounds: the value is '0'"),
        (["--shape", "64", "32"], "--shape: expected 3 arguments"),
        (["--head-rounds", "3"], "fewer than 6 pairs give no 95 % interval: use 0 or at least 6"),
        (["--dtype", "fp16"], "invalid choice: 'fp16'"),
        (["--rouns", "3"], "--rouns is not an option; did you mean --rounds?"),
        (["--only", "torhc"], "'torhc', which is no implementation; did you mean torch?"),
        (["--only", "torch", "--shape", "1", "1", "1"], "V = 1, where every LM loss is 0"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_sentence(arguments, fragment):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert fragment in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none():
    done = run("--device", "cuda")
    assert done.returncode == 2
    assert done.stderr == "error: --device is cuda, of which torch sees none: use cpu here\n"


@pytest.mark.slow
@pytest.mark.timeout(7200)  # bf16 peers take minutes a call on a CPU without bf16 instructions
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_chunked_is_at_least_as_fast_as_the_fastest_peer_in_a_third_of_its_memory(dtype):
    if dtype == "bf16" and torch.cpu._is_avx512_bf16_supported():
        pytest.skip("with bf16 instructions cut-cross-entropy is faster, by README's figure")
    names = [*PEERS, CHUNKED.name, CHUNKED_WITHOUT_HEAD.name]
    done = run(
        *("--json", "--device", "cpu", "--dtype", dtype, "--shape", "2048", "512", "32768"),
        *("--only", ",".join(names)),
        check=True,
    )
    (entry,) = json.loads(done.stdout)
    rows = {row["name"]: row for row in entry["rows"]}
    assert list(rows) == names, done.stderr
    peer = min((rows[name] for name in PEERS), key=lambda row: row["median_seconds"])
    ours = rows[CHUNKED.name]
    assert ours["median_seconds"] <= peer["median_seconds"], (ours, peer)
    assert ours["extra_bytes"] <= peer["extra_bytes"] / 3, (ours, peer)
    assert ours["mode_head_share"]["low"] <= 0.01, ours
