"""Rules between fields, and the world sizes that a layout accepts."""

import re
import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_mode.config import check_world_size, load_config
from megatron_mode.config.rules import _nearest_divisor
from megatron_mode.errors import ConfigError

PIECEWISE = "mix.mode2_fraction={shape: piecewise, points: "
BROKEN = [
    (["model.attention_heads=128"], "model.attention_heads is 128", "use 64"),
    (["model.hidden_size=129"], "model.attention_heads is 4", "make model.hidden_size even"),
    (["model.kv_heads=3"], "model.kv_heads is 3", "use 2"),
    (["model.vocab_size=1000"], "model.vocab_size is 1000", "use 1024"),
    (["parallel.tensor=4"], "parallel.tensor is 4", "model.kv_heads = 2; use 2"),
    (["parallel.pipeline=5"], "parallel.pipeline is 5", "model.layers = 4"),
    (["parallel.zero_stage=0", "run.precision=bf16"], "parallel.zero_stage is 0", "use 1"),
    (["run.dir="], "run.dir is null", "accepted: text"),
    (["run.dir=''"], "run.dir is ''", "not empty"),
    (["run.dir='runs/lr[3e-3]'"], "run.dir is 'runs/lr[3e-3]'", "without *, ? and ["),
    (
        ["run.time_limit_seconds=60", "run.time_margin_seconds=60"],
        "run.time_limit_seconds is 60; accepted: more than run.time_margin_seconds = 60",
        "raise it or lower the margin",
    ),
    (["data.root='a\tb'"], "data.root is 'a\\tb'", "control characters"),
    (["model.name=' '"], "model.name is ' '", "not empty"),
    (["run.steps=100000000000", "batch.global_rows=16"], "1600000000000 rows", "1000000000000"),
    (["parallel.sequence_parallel=true"], "sequence_parallel is true", "remove it or raise"),
    (
        ["parallel.sequence_parallel=true", "parallel.tensor=2", "model.seq_len=255"],
        "model.seq_len is 255",
        "use 256",
    ),
    (["parallel.schedule=dualpipev"], "parallel.schedule is dualpipev", "use 1f1b or change"),
    (
        ["parallel.schedule=dualpipev", "parallel.pipeline=3"],
        "parallel.schedule is dualpipev",
        "model.layers / 2 = 2",
    ),
    (
        ["parallel.schedule=dualpipev", "parallel.pipeline=2", "batch.micro_rows=8"],
        "batch.global_rows is 16",
        "use 32",
    ),
    (["batch.micro_rows=5"], "batch.micro_rows is 5", "use 4"),
    (["mix.mode2_fraction.shape=constant"], "mix.mode2_fraction.end is 0.5", "remove it"),
    (["mix.mode2_fraction.end=null"], "mix.mode2_fraction.end is null", "shape linear; set it"),
    (
        ["mix.mode2_fraction={shape: step, end: 0.5, end_tokens: 9}"],
        "mix.mode2_fraction.end_tokens is 9",
        "null for shape step",
    ),
    (
        ["mix.mode2_fraction.begin_tokens=9", "mix.mode2_fraction.end_tokens=9"],
        "mix.mode2_fraction.end_tokens is 9",
        "more than begin_tokens = 9",
    ),
    (
        ["mix.mode2_fraction.begin_tokens=983040"],
        "mix.mode2_fraction.begin_tokens is 983040",
        "less than the run's 983040 tokens",
    ),
    (
        ["mix.mode2_fraction={shape: constant, begin_tokens: 9}"],
        "mix.mode2_fraction.begin_tokens is 9",
        "accepted: 0",
    ),
    (["mix.mode2_fraction.points=[[0, 0.1]]"], "mix.mode2_fraction.points is [[0, 0.1]]", "linear"),
    ([PIECEWISE + "[]}"], "mix.mode2_fraction.points is empty", "add it"),
    ([PIECEWISE + "[[9, 0.1], [9, 0.2]]}"], "points has 9 tokens after 9", "rising"),
    (["mix.mode1.sources.0.name=bfcl"], "the source name 'bfcl' stands 2 times", "once"),
    (["mix.mode1.sources.0.name=a/b"], "mix.mode1.sources.0.name is a/b", "file name"),
    (["mix.mode1.sources.0.name=../a"], "mix.mode1.sources.0.name is ../a", "file name"),
    (["mix.mode1.sources.0.mode=2"], "mix.mode1.sources.0.mode is 2", "accepted: 1"),
    (
        ["mix.mode1.sources.0={name: a, weight_points: [[0, 1], [0, 2]]}"],
        "mix.mode1.sources.0.weight_points has 0 tokens after 0",
        "rising",
    ),
    (
        ["mix.mode1.sources.0={name: a, weight_points: [[0, 0]]}"],
        "mix.mode1.sources.0.weight_points are all 0",
        "remove the source",
    ),
    (
        ["mix.mode1.sources.0={name: a, ramp_tokens: 9, weight_points: [[0, 1]]}"],
        "mix.mode1.sources.0.ramp_tokens is 9",
        "beside weight_points",
    ),
    (
        ["mix.mode1.sources.0.when_dry=repeat"],
        "mix.mode1.sources.0.when_dry is repeat",
        "set epochs_max",
    ),
    (["mix.valid.sources.0.packing=whole"], "mix.valid.sources.0.packing is whole", "remove it"),
    (["mix.role_weights.tool=0"], "mix.role_weights are set", "mode2_lm_loss to weighted"),
    (["mix.edits.drop=[x]"], "mix.edits.drop.0 is x", "accepted: SOURCE/ID"),
    (["mix.edits.drop=[a/b, a/b]"], "drops or replaces 'a/b' 2 times", "once"),
    (
        ["mix.edits.replace=[{document: a/b, by: c}]"],
        "mix.edits.replace.0.by is c",
        "SOURCE/ID",
    ),
    (
        ["mix.edits.inject=[{document: a/b}]"],
        "mix.edits.inject.0 has steps [] and count 0",
        "one of them",
    ),
    (
        ["mix.edits.inject=[{document: a/b, steps: [3], every_steps: 2}]"],
        "mix.edits.inject.0 has first_step or every_steps beside steps",
        "remove",
    ),
    (
        ["mix.edits.inject=[{document: a/b, count: 3, first_step: 220, every_steps: 10}]"],
        "mix.edits.inject.0 reaches step 240",
        "less than run.steps = 240",
    ),
    (["mix.edits.cohorts=[{source: a/b}]"], "mix.edits.cohorts.0.source is a/b", "correct it"),
    (
        ["mix.edits.cohorts=[{source: a, begin_step: 3}]"],
        "mix.edits.cohorts.0 has one of begin_step and end_step",
        "both or neither",
    ),
    (
        ["mix.edits.cohorts=[{source: a, begin_step: 3, end_step: 241}]"],
        "mix.edits.cohorts.0 spans steps 3 to 241",
        "run.steps = 240",
    ),
    (
        ["mix.edits.cohorts=[{source: a, window: late, begin_step: 3, end_step: 5}]"],
        "mix.edits.cohorts.0.window is late beside begin_step",
        "one of them",
    ),
    (["mix.mode1.sources=[]"], "mix.mode1.sources is empty", "set the fraction to 1"),
    (["mix.mode2.sources=[]"], "mix.mode2.sources is empty", "set the fraction to 0"),
    (["optimizer.min_learning_rate=1"], "optimizer.min_learning_rate is 1.0", "lower it"),
    (["optimizer.schedule=wsd"], "optimizer.decay_steps is 0", "at least 1"),
    (["optimizer.decay_steps=9"], "optimizer.decay_steps is 9", "use wsd"),
    (
        ["optimizer.schedule=wsd", "optimizer.decay_steps=221"],
        "optimizer.warmup_steps + optimizer.decay_steps is 241",
        "at most run.steps = 240",
    ),
]


@pytest.mark.parametrize(("overrides", "start", "fix"), BROKEN)
def test_a_broken_rule_names_key_value_and_fix(tiny, overrides, start, fix):
    with pytest.raises(ConfigError) as caught:
        load_config(tiny, overrides)
    (line,) = str(caught.value).splitlines()
    assert start in line
    assert "accepted: " in line
    assert fix in line


@pytest.mark.parametrize(
    "overrides",
    [
        ["mix.mode2_fraction={shape: constant, start: 0}", "mix.mode2.sources=[]"],
        ["mix.mode2_fraction={shape: constant, start: 1}", "mix.mode1.sources=[]"],
        [PIECEWISE + "[[0, 0], [5, 1]]}"],
        ["mix.mode2_fraction={shape: step, start: 0, end: 0.5, begin_tokens: 999999999}"],
        ["optimizer.schedule=wsd", "optimizer.decay_steps=220"],
        ["parallel.pipeline=4", "parallel.tensor=2", "model.vocab_size=256"],
    ],
)
def test_what_keeps_the_rules_loads(tiny, overrides):
    load_config(tiny, overrides)


@given(
    tensor=st.sampled_from([1, 2]),
    pipeline=st.integers(1, 4),
    micro_rows=st.integers(1, 4),
    micro_batches=st.integers(1, 24),
    world_size=st.integers(0, 99),
    turns=st.booleans(),
)
def test_a_world_size_works_iff_the_batch_divides(
    tiny_config, tensor, pipeline, micro_rows, micro_batches, world_size, turns
):
    least = 2 * pipeline if turns else 1
    assume(micro_batches >= least)
    sizes = {"tensor": tensor, "pipeline": pipeline}
    schedule = {"schedule": "dualpipev" if turns else "1f1b"}
    parallel = tiny_config.parallel.model_copy(update=sizes | schedule)
    rows = {"micro_rows": micro_rows, "global_rows": micro_rows * micro_batches}
    config = tiny_config.model_copy(
        update={"parallel": parallel, "batch": tiny_config.batch.model_copy(update=rows)}
    )
    # Independent of the code's arithmetic: a world works when some data size fits it exactly.
    fits = {
        tensor * pipeline * data: data
        for data in range(1, 100)
        if any(data * accumulation == micro_batches for accumulation in range(least, 100))
    }
    if world_size in fits:
        assert check_world_size(config, world_size) == fits[world_size]
        return
    with pytest.raises(ConfigError, match=f"world size is {world_size}; ") as caught:
        check_world_size(config, world_size)
    named = re.search(r"start ([\d or]+) processes", str(caught.value))
    near = {
        max((w for w in fits if w < world_size), default=None),
        min((w for w in fits if w > world_size), default=None),
    } - {None}
    assert {int(size) for size in named[1].split(" or ")} == near


@pytest.fixture(scope="session")
def tiny_config(tiny):
    return load_config(tiny)


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["batch.global_rows=16777213", "batch.micro_rows=16777212"], "use 16777213"),
        (["model.attention_heads=16777213", "model.hidden_size=8"], "use 4"),
        (["model.attention_heads=16777213", "model.kv_heads=16777212"], "use 16777213"),
    ],
)
def test_the_nearest_divisor_of_a_large_prime_is_found_at_once(tiny, overrides, fragment):
    """Counting down from it took seconds, and for ever where there was no bound."""
    started = time.process_time()
    with pytest.raises(ConfigError, match=fragment):
        load_config(tiny, overrides)
    assert time.process_time() - started < 2


def test_the_nearest_world_of_a_large_batch_is_found_at_once(tiny):
    config = load_config(tiny, ["batch.global_rows=16777213", "batch.micro_rows=1"])
    with pytest.raises(ConfigError, match="start 1 or 16777213 processes"):
        check_world_size(config, 3)


@given(st.integers(1, 400), st.integers(1, 400))
def test_the_nearest_divisor_is_that_of_a_search(given_number, size):
    nearest = min((d for d in range(1, size + 1) if size % d == 0),
                  key=lambda d: (abs(d - given_number), d))  # fmt: skip
    assert _nearest_divisor(given_number, size) == nearest
