"""Check the vocabulary-parallel loss on four gloo ranks against one rank, and its merge alone."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mode.loss.vocab_parallel import merge_statistics, vocab_shard

RANK_PROGRAM = Path(__file__).with_name("vocab_parallel_rank.py")
SHARDED = "lm_weight_grad"


def test_merge_is_the_statistics_of_the_whole_row():
    logit_nV = torch.randn(5, 30, dtype=torch.float64) * 100
    parts = []
    for begin, end in ((0, 3), (3, 29), (29, 30)):
        part = logit_nV[:, begin:end]
        maximum = part.amax(1)
        owned = part[:, 7 - begin] if begin <= 7 < end else torch.zeros(5)
        parts.append(torch.stack([maximum, (part - maximum[:, None]).exp().sum(1), owned]))
    parts.append(torch.stack([torch.full((5,), -math.inf), torch.zeros(5), torch.zeros(5)]))
    maximum_n, sum_n, target_n = merge_statistics(parts)
    assert torch.allclose(maximum_n + sum_n.log(), logit_nV.logsumexp(1))
    assert torch.equal(target_n, logit_nV[:, 7])


def test_no_group_is_the_whole_vocabulary():
    shard = vocab_shard(None, 128, 100, torch.device("cpu"))
    assert (shard.start, shard.ranks, shard.merge, shard.reduce) == (0, 1, None, None)
    assert shard.real_columns(128) == 100


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Run the four ranks once and return what each saved."""
    folder = tmp_path_factory.mktemp("vocab_parallel")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, RANK_PROGRAM, str(rank), folder / "rendezvous", folder / f"{rank}.pt"],
            env=environment,
        )
        for rank in range(4)
    ]
    try:
        assert [process.wait(timeout=200) for process in processes] == [0] * 4
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.distributed
def test_every_sharding_equals_one_rank_and_gives_all_ranks_the_same_bits(ranks):
    cases = [key for key in ranks[0] if key[0] != "whole"]
    assert len(cases) == 6 * 4 + 2 + 3 * 4
    for key in cases:
        size = int(key[0][-1])
        plain, truth = ranks[0]["whole", key[2]], ranks[0]["whole", "torch.float32"]
        tolerance = 4e-3 if key[1] == "bf16 sum" else 3e-6
        for first in range(0, 4, size):
            members = [ranks[rank][key] for rank in range(first, first + size)]
            gathered = members[0] | {SHARDED: torch.cat([member[SHARDED] for member in members])}
            for name, expected in truth.items():
                if name != SHARDED:
                    for member in members:
                        assert torch.equal(member[name], members[0][name]), (key, name)
                error = distance(gathered[name], expected)
                # In bf16 CPUs with and without instructions for it round in other places: judged by
                # what the same dtype costs plain torch.
                own = 0.0 if key[2] == "torch.float32" else distance(plain[name], expected)
                assert error <= 2 * own + tolerance, (key, name, float(error), float(own))
        assert truth["blocked_BT"].any()


def distance(value, expected):
    value, expected = value.double(), expected.double()
    return (value - expected).norm() / expected.norm().clamp(min=1.0)


@pytest.mark.distributed
def test_merged_losses_do_not_depend_on_how_the_vocabulary_is_cut(ranks):
    for implementation in ("chunked", "triton", "reference"):
        bits = [
            result["mode_sum"]
            for key, result in ranks[0].items()
            if key[1].startswith(implementation) and key[-1] == "torch.float32"
        ]
        assert len(bits) >= 9
        assert all(torch.equal(value, bits[0]) for value in bits)
