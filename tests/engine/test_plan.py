"""What a rank holds by arithmetic is what is built for it, up to 16,384 ranks in one process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mode.config import load_config
from megatron_mode.config.presets import find_configs
from megatron_mode.cost.ranks import checkpoint_files, plan_rank, stage_links
from megatron_mode.cost.topology import Layout
from megatron_mode.model.size import parameters

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("rehearsed_ranks.py")
PRESETS = sorted(path.stem for path in (find_configs() / "run").glob("*.yaml"))
# Where the vocabulary comes from data, a stand-in.
VOCABULARY = {
    name: ["model.vocab_size=8192"] for name in PRESETS if name.startswith(("tiny", "real"))
}


def configure(preset, layout, *changes):
    """Return (config, overrides) of a preset at a layout whose batch fits."""
    overrides = [
        f"parallel.tensor={layout.tensor}",
        f"parallel.pipeline={layout.pipeline}",
        "batch.micro_rows=1",
        f"batch.global_rows={4 * layout.data}",
        # The large presets have it on, where there is something to share.
        *(["parallel.sequence_parallel=false"] if layout.tensor == 1 else []),
        *changes,
        *VOCABULARY.get(preset, []),
    ]
    return load_config(find_configs() / "run" / f"{preset}.yaml", overrides), overrides


def build(cases):
    """Build ranks in a process of its own; return their facts and the seconds it took."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    facts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return facts, time.perf_counter() - started


def check(config, layout, fact):
    """Compare a rank that was built with the plan, and its groups with those of a numpy mesh."""
    rank = fact["rank"]
    assert fact["layout"] == list(layout)
    mesh = np.arange(layout.world_size).reshape(layout.pipeline, layout.data, layout.tensor)
    ((stage, replica, part),) = np.argwhere(mesh == rank)
    assert fact["groups"] == {
        "tensor": [mesh[stage, replica].tolist()] * 2,
        "pipeline": [mesh[:, replica, part].tolist()] * 2,
        "data": [mesh[stage, :, part].tolist()] * 2,
    }
    plan = plan_rank(config, layout, rank, bf16=False)
    assert tuple(fact["links"]) == plan.links
    assert fact["parameters"] == plan.parameters
    assert fact["parameters_bytes"] == plan.parameters * (
        4 if config.run.precision != "bf16" else 2
    )
    D = config.model.hidden_size
    layers = sum(name.startswith("layers.") for name in plan.links)
    whole = 2 * D * layers + ("mode_head" in plan.links) * (2 * D + 1)
    assert fact["cut_parameters"] == plan.parameters - whole
    ends = mesh[[0, -1], replica, part].tolist()
    apart = layout.pipeline > 1 and config.parallel.schedule == "1f1b"
    tied = config.model.tied_embeddings and apart and rank in ends
    shared = [pair for pair in fact["tied"] if len(pair[0]) > 1]  # DualPipeV's end is one rank
    assert shared == ([[ends, ends]] if tied else [])
    assert plan.tied_ranks == (tuple(ends) if tied else ())
    copy = config.model.vocab_size * D // layout.tensor if tied and rank == ends[1] else 0
    assert fact["counted_elsewhere"] == copy
    for bf16 in (False, True):
        assert sorted(fact["files"][str(bf16)]) == sorted(
            checkpoint_files(config, layout, rank, bf16=bf16)
        )


def stage_borders(layout):
    """Return the first and the last rank of every stage."""
    width = layout.tensor * layout.data
    return sorted({s * width + at for s in range(layout.pipeline) for at in (0, width - 1)})


def test_ranks_of_1024_are_built_as_planned():
    """The 70b preset as it ships: both ends of every stage, and ranks between.

    A tied model whose layers do not divide into its stages goes along, and DualPipeV.
    """
    layout = Layout(tensor=8, pipeline=8, data=16)
    ranks = [*stage_borders(layout), 9, 130, 397, 511, 777, 1010]
    config = load_config(find_configs() / "run" / "70b.yaml")
    uneven = Layout(tensor=4, pipeline=5, data=2)
    tied, overrides = configure("125m", uneven)
    asked = stage_borders(uneven)
    both_ends = Layout(tensor=2, pipeline=3, data=2)
    turning, turned = configure("125m", both_ends, "parallel.schedule=dualpipev")
    turned.append(f"batch.global_rows={6 * both_ends.data}")
    cases = [("70b", [], 1024, ranks), ("125m", overrides, 40, asked)]
    facts, seconds = build([*cases, ("125m", turned, 12, list(range(12)))])
    assert [fact["rank"] for fact in facts] == [*ranks, *asked, *range(12)]
    for fact in facts[: len(ranks)]:
        check(config, layout, fact)
    for fact in facts[len(ranks) : -12]:
        check(tied, uneven, fact)
    for fact in facts[-12:]:
        check(turning, both_ends, fact)
    found = {fact["parameters"] for fact in facts[: len(ranks)]}
    assert found == {1_201_045_504, 1_069_711_360, 1_201_061_889}
    memory_bytes = max(fact["peak_memory_bytes"] for fact in facts)
    slowest = max(fact["seconds"] for fact in facts)
    process_seconds = max(fact["process_seconds"] for fact in facts)
    print(
        f"{len(ranks)} of 1,024 ranks of 70b in {seconds:.1f} s ({process_seconds:.1f} s of CPU), "
        f"a rank at most {slowest:.2f} s, {memory_bytes / 1e6:.0f} MB in all"
    )
    assert process_seconds < 60  # other processes of the machine do not count
    assert memory_bytes < 2e9


def some_layouts(preset):
    """Return layouts of a preset up to 16,384 ranks: its own, wide, deep and uneven ones."""
    model = configure(preset, Layout(1, 1, 1))[0].model
    own = load_config(find_configs() / "run" / f"{preset}.yaml").parallel
    tensor = next(t for t in (8, 4, 2, 1) if model.kv_heads % t == 0)
    deep = min(model.layers, 16)
    uneven = max(stages for stages in range(1, deep + 1) if stages == 1 or model.layers % stages)
    for t, p, world in (
        (own.tensor, own.pipeline, own.tensor * own.pipeline * 16),
        (tensor, deep, 1024 // (tensor * deep) * tensor * deep),
        (1, uneven, 6 * uneven),
        (tensor, model.layers, 2 * tensor * model.layers),
        (tensor, deep, 16384 // (tensor * deep) * tensor * deep),
    ):
        yield Layout(t, p, world // (t * p))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_built_as_planned(preset):
    cases, expected = [], []
    for layout in some_layouts(preset):
        config, overrides = configure(preset, layout)
        borders = stage_borders(layout)
        middle = borders[:: max(1, len(borders) // 8)] if layout.world_size < 10_000 else []
        ranks = sorted({0, *middle, layout.world_size // 2 + 1, layout.world_size - 1})
        ranks = [rank for rank in ranks if rank < layout.world_size]
        cases.append((preset, overrides, layout.world_size, ranks))
        expected += [(config, layout, rank) for rank in ranks]
    facts, seconds = build(cases)
    for (config, layout, rank), fact in zip(expected, facts, strict=True):
        assert fact["rank"] == rank
        check(config, layout, fact)
    memory_bytes = max(fact["peak_memory_bytes"] for fact in facts)
    largest = max(layout.world_size for _, layout, _ in expected)
    print(f"{preset}: {len(facts)} ranks of worlds up to {largest:,} in {seconds:.0f} s, "
          f"{memory_bytes / 1e6:.0f} MB")  # fmt: skip
    assert memory_bytes < 2e9


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whole_replicas_of_1024_ranks_hold_the_whole_model():
    """All ranks of the first and of the last data rank."""
    layout = Layout(tensor=8, pipeline=8, data=16)
    config = load_config(find_configs() / "run" / "70b.yaml")
    ranks = [rank for rank in range(1024) if layout.coordinates(rank).data in (0, 15)]
    facts, seconds = build([("70b", [], 1024, ranks)])
    assert [fact["rank"] for fact in facts] == ranks
    held = 0
    for fact in facts:
        check(config, layout, fact)
        held += fact["cut_parameters"]
        if fact["rank"] % 8 == 0:  # what is not cut stands in every tensor part
            held += fact["parameters"] - fact["cut_parameters"]
    assert held == 2 * parameters(config.model).total
    print(f"{len(ranks)} of 1,024 ranks of 70b in {seconds:.0f} s")


SIZES = st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 6), st.integers(1, 5))


@settings(max_examples=60)
@given(SIZES, st.booleans(), st.integers(6, 13))
def test_the_plans_of_a_replica_add_up_to_the_model(sizes, tied, layers):
    layout = Layout(*sizes)
    changes = (f"model.tied_embeddings={str(tied).lower()}", f"model.layers={layers}",
               "model.kv_heads=4")  # fmt: skip
    config, _ = configure("tiny", layout, *changes)
    model, stages = config.model, stage_links(config.model, layout.pipeline)
    names = [name for stage in stages for name in stage]
    assert names == ["embedding", *(f"layers.{i}" for i in range(layers)), "mode_head", "lm_head"]
    of_stage = [len([n for n in stage if n.startswith("layers.")]) for stage in stages]
    assert max(of_stage) - min(of_stage) <= 1
    total = 0
    files = set()
    for rank in range(layout.world_size):
        plan = plan_rank(config, layout, rank, bf16=True)
        at = layout.coordinates(rank)
        written = checkpoint_files(config, layout, rank, bf16=True)
        assert files.isdisjoint(written)
        files.update(written)
        if at.data:
            continue
        total += plan.parameters
        if at.tensor:  # norms and the mode head stand in every part
            norms = 2 * sum(name.startswith("layers.") for name in plan.links)
            total -= norms * model.hidden_size
            total -= (2 * model.hidden_size + 1) * ("mode_head" in plan.links)
    copies = model.vocab_size * model.hidden_size * (tied and layout.pipeline > 1)
    assert total - copies == parameters(model).total
    links = layers + (2 if tied else 3)
    models = layout.tensor * layout.pipeline
    assert len(files) == links * layout.tensor + models + models * layout.data


def test_zero_shards_the_optimizer_over_data_ranks():
    """Of one parameter 2 or 4 bytes of weight, 4 of gradient, 12 of optimizer over data ranks."""
    layout = Layout(1, 1, 8)
    config, _ = configure("tiny", layout)
    count = parameters(config.model).total
    plan = plan_rank(config, layout, 3, bf16=True)
    padding = 2 * 16  # at most: two groups, each to a multiple of 2 * data
    assert 0 <= plan.weights_bytes - 2 * count <= 2 * padding
    assert 0 <= plan.gradients_bytes - 4 * count <= 4 * padding
    assert 0 <= plan.optimizer_bytes - 12 * count / 8 <= 12 * padding / 8
    whole, _ = configure("tiny", layout, "parallel.zero_stage=0", "run.precision=fp32")
    plain = plan_rank(whole, layout, 3, bf16=False)
    assert plain[2:5] == (4 * count, 4 * count, 8 * count)
    assert checkpoint_files(whole, layout, 3, bf16=False) == []
