"""Presets, overrides, errors reported together, and the round trip of a resolved config."""

import contextlib
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mode.config import Config, dump_config, load_config
from megatron_mode.config.describe import walk_fields
from megatron_mode.errors import ConfigError


def mistakes_of(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


def test_a_run_file_lays_its_keys_over_its_presets(tiny):
    config = load_config(tiny)
    assert (config.model.name, config.model.layers, config.model.tied_embeddings) == (
        "tiny",
        4,
        True,
    )
    assert [source.name for source in config.mix.mode2.sources] == ["bfcl", "chatterbot"]
    assert config.mix.mode2_fraction.start == Decimal("0.1")
    assert config.batch.global_rows == 16  # run file
    assert config.batch.micro_rows == 16  # run file over parallel preset
    assert config.optimizer.learning_rate == 3e-3


def test_later_overrides_win_and_lists_are_replaced_whole(tiny):
    config = load_config(
        tiny,
        [
            "batch.micro_rows=2",
            "batch.micro_rows=8",
            "mix.mode1.sources=[{name: a, weight: 0.3}, {name: b}]",
            "mix.mode1.sources.1.weight=1e-3",
            "run.steps=1e3",
            "run.dir=runs/a=b",
        ],
    )
    assert config.batch.micro_rows == 8
    assert [(s.name, s.weight) for s in config.mix.mode1.sources] == [
        ("a", Decimal("0.3")),
        ("b", Decimal("0.001")),
    ]
    assert config.run.steps == 1000
    assert config.run.dir == "runs/a=b"


def test_presets_are_chosen_by_override(tiny):
    config = load_config(tiny, ["model.layers=9", "model=125m", "parallel=tp2-pp2"])
    assert (config.model.name, config.model.layers) == ("125m", 12)
    assert (config.parallel.tensor, config.parallel.pipeline, config.batch.micro_rows) == (2, 2, 2)
    assert config.batch.global_rows == 16
    assert load_config(tiny, ["model.preset=125m", "model.layers=9"]).model.layers == 9
    assert load_config(tiny, ["model={preset: 125m, layers: 9}"]).model.layers == 9


def test_a_users_own_folder_wins_over_the_presets_of_the_project(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "model").mkdir()
    run = tmp_path / "run" / "mine.yaml"
    run.write_text(tiny.read_text().replace("model: tiny", "model: small"))
    preset = (tiny.parent.parent / "model/tiny.yaml").read_text()
    (tmp_path / "model/small.yaml").write_text(preset.replace("layers: 4", "layers: 3"))
    assert load_config(run).model.layers == 3
    assert load_config(run).mix == load_config(tiny).mix


def test_all_mistakes_are_reported_at_once(tiny):
    wrong = {
        "batch.micro_row=2": "batch.micro_row is not a key; accepted: one of global_rows, "
        "micro_rows; did you mean micro_rows?",
        "batch.micro_rows=0": "batch.micro_rows is 0; accepted: an integer from 1 to 16777216; "
        "the default is 1",
        "loss.implementation=chunk": "loss.implementation is chunk; accepted: one of auto, "
        "triton, chunked, reference; did you mean chunked?",
        "run.steps=true": "run.steps is true; accepted: an integer from 1 to 1e15; "
        "the default is 100",
        "run.dir=2024": "run.dir is 2024; accepted: text; put it in quotes: '2024'",
        "mix.reset_at_documents=1": "mix.reset_at_documents is 1; accepted: true or false; "
        "the default is true",
        "loss.blocking.tau=0.3": "loss.blocking.tau is 0.3; accepted: a number above 0.5 and "
        "below 1; the default is 0.95",
        'loss.z_weight="3"': "loss.z_weight is '3'; accepted: a number of at least 0; "
        "the default is 0.0",
        "model.layers=1.5": "model.layers is 1.5; accepted: an integer from 1 to 10000; correct it",
        "mode2_fraction.start=1": "mode2_fraction is not a key; accepted: one of run, model, "
        "data, mix, loss, parallel, accelerators, batch, optimizer, checkpoint, health; did you "
        "mean mix.mode2_fraction?",
        "mix.mode1.sources.0.weight=-1": "mix.mode1.sources.0.weight is -1; accepted: an exact "
        "decimal above 0; the default is 1",
        "foo": "override 'foo' is not of the form key.path=value; accepted: for example "
        "batch.micro_rows=2; write it so",
        # Rules between fields are still looked at where their fields are right.
        "model.hidden_size=130": "model.attention_heads is 4; accepted: a number that divides "
        "model.hidden_size = 130 into heads of even size (RoPE turns pairs); use 5",
        "optimizer.warmup_steps=-1": "optimizer.warmup_steps is -1; accepted: an integer from "
        "0 to 1e15; the default is 0",
    }
    assert sorted(mistakes_of(tiny, *wrong)) == sorted(wrong.values())


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("model=tinny", "accepted: one of 1.3b, 125m, 13b, 70b, 7b, real-small, tiny; did you"),
        ("model=7", "did you mean 7b?"),
        ("mix=../mix/tiny", "accepted: one of"),
        ("model=null", "model is null; accepted: a mapping of name"),
        ("run.steps.x=3", "leave out .x"),
        ("mix.mode1.sources.7.weight=2", "accepted: a position from 0 to 0"),
        ("mix.mode1.sources=[{weight: 2}]", "mix.mode1.sources.0.name is missing"),
        ("mix.valid.sources.0=3", "mix.valid.sources.0 is 3"),
        ("mix.mode2_fraction.points=[[0, x]]", "points.0.1 is x; accepted: an exact decimal"),
        ("mix.mode2_fraction.points=[[0]]", "points.0.1 is missing"),
        ("run.steps=[", "the value of run.steps is not YAML"),
        ("run.steps=", "run.steps is null"),
        ("parallel.zero_stage=true", "parallel.zero_stage is 'true'; accepted: one of 0, 1"),
        ("loss.blocking=3", "loss.blocking is 3; accepted: a mapping of policy"),
        ("data=[1]", "data is [1]; accepted: a mapping of root, workers"),
        ("\udcff=3", "has a key in bytes that are not UTF-8"),
        ("data.workers=1e40", "accepted: an integer from 1 to 1024"),
        ("run.resume_from=newest", "run.resume_from is newest; accepted: step-N or null"),
        (
            "run.seed=9223372036854775808",
            "run.seed is 9223372036854775808; accepted: an integer from 0",
        ),
    ],
)
def test_one_mistake_is_one_sentence(tiny, override, fragment):
    (line,) = mistakes_of(tiny, override)
    assert fragment in line


def test_files_that_cannot_be_read_name_the_nearest(tiny, tmp_path):
    (line,) = mistakes_of(tiny.with_name("tinny.yaml"))
    assert line.endswith("did you mean tiny?")
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    assert "holds nothing" in mistakes_of(empty)[0]
    empty.write_bytes(b"\xff\xfe\xff")
    assert "is not text" in mistakes_of(empty)[0]
    assert "Is a directory" in mistakes_of(tmp_path)[0]
    assert "is longer than" in mistakes_of("/dev/zero")[0]
    empty.write_text("model: tiny\nmodel: 7b")
    assert "key 'model' is given again on line 2" in mistakes_of(empty)[0]


KEYS = [key.replace("[]", ".0") for key, _ in walk_fields()]
VALUES = st.sampled_from(
    ["", "null", "true", "-1", "0", "1e309", ".nan", "1e30", "[]", "{}", "[[]]", "x", "'1'", "[1"]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*KEYS, "model", "mix", "run", "x"]), VALUES)))
def test_no_override_ever_raises_anything_but_a_config_error(tiny, pairs):
    with contextlib.suppress(ConfigError):
        assert isinstance(load_config(tiny, [f"{key}={value}" for key, value in pairs]), Config)


DECIMALS = st.decimals("0.0000001", 1, places=7)
POSITIVE = st.floats(1e-12, 1e12)
FREE = {
    "run.dir": st.text(
        st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="*?["), min_size=1
    ).filter(str.strip),
    "run.seed": st.integers(0, 2**63 - 1),
    "model.name": st.sampled_from(["no", "1e3", "null", "a: b", "ü", "0x10", "~"]),
    "model.rope_base": POSITIVE,
    "model.init_std": POSITIVE,
    "parallel.zero_stage": st.sampled_from([0, 1]),
    "data.root": st.text("ab/. #:'\"\\", min_size=1).filter(str.strip),
    "mix.mode2_fraction.start": DECIMALS,
    "mix.mode2_fraction.end": DECIMALS,
    "mix.mode2_fraction.end_tokens": st.none() | st.integers(1, 10**15),
    "mix.mode1.sources.0.epochs_max": st.none() | DECIMALS,
    "mix.valid.sources.0.mode": st.sampled_from([None, 1, 2]),
    "loss.mode_weight": st.floats(0, 1e6, allow_subnormal=False),
    "loss.blocking.tau": st.floats(0.5, 1, exclude_min=True, exclude_max=True),
    "loss.blocking.policy": st.sampled_from(["none", "mode", "lm", "both"]),
    "optimizer.epsilon": POSITIVE,
    "checkpoint.every_steps": st.integers(0, 10**9),
}


@settings(max_examples=30, deadline=None)
@given(st.fixed_dictionaries(FREE))
def test_a_resolved_config_reads_back_equal(tiny, tmp_path_factory, values):
    tree = load_config(tiny, ["batch.micro_rows=4"]).model_dump()
    for key, value in values.items():
        *path, last = (int(part) if part.isdecimal() else part for part in key.split("."))
        here = tree
        for part in path:
            here = here[part]
        here[last] = value
    config = Config.model_validate(tree)
    file = tmp_path_factory.mktemp("resolved") / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config


def test_a_config_cannot_be_changed(tiny):
    with pytest.raises(ValueError, match="frozen"):
        load_config(tiny).run.steps = 3
