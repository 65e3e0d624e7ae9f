"""Every preset loads, has the size it claims, and runs at the world size that its name states."""

import re
from pathlib import Path

import pytest

from megatron_mode.config import check_world_size, dump_config, load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RUNS = sorted(path.stem for path in (CONFIGS / "run").glob("*.yaml"))
# Parameters of the published models, and what the name says where there is none.
PARAMETERS = {"125m": 125e6, "1.3b": 1.3e9, "7b": 6.74e9, "13b": 13.0e9, "70b": 70.6e9}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_preset_loads_and_resolves(name, tmp_path):
    config = load_config(CONFIGS / f"run/{name}.yaml")
    assert config.run.dir == f"runs/{name}"
    resolved = tmp_path / "config.yaml"
    resolved.write_text(dump_config(config))
    assert load_config(resolved) == config


def test_the_run_presets_of_the_project_are_there():
    assert set(RUNS) >= {"tiny", "tiny-3d", "real-small", *PARAMETERS}


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_a_real_size_has_the_parameters_of_its_name(name):
    model = load_config(CONFIGS / f"run/{name}.yaml").model
    assert model.name == name
    head_size = model.hidden_size // model.attention_heads
    layer = (
        2 * model.hidden_size * model.hidden_size
        + 2 * model.hidden_size * head_size * model.kv_heads
        + 3 * model.hidden_size * model.ffn_hidden_size
        + 2 * model.hidden_size
    )
    vocabulary = model.vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)
    total = model.layers * layer + vocabulary + model.hidden_size
    assert total == pytest.approx(PARAMETERS[name], rel=0.04)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_a_real_size_runs_on_the_cluster_that_its_layout_names(name):
    config = load_config(CONFIGS / f"run/{name}.yaml")
    layout = re.search(
        r"^parallel: \S+?-(\d+)gpu$", (CONFIGS / f"run/{name}.yaml").read_text(), re.M
    )
    world_size = int(layout[1])
    data = check_world_size(config, world_size)
    comment = (CONFIGS / f"parallel/{name}-{world_size}gpu.yaml").read_text()
    assert f"data = {data}" in comment
    assert config.parallel.tensor <= 8  # tensor ranks stay inside a node


def test_the_3d_preset_is_3d_at_eight_processes():
    config = load_config(CONFIGS / "run/tiny-3d.yaml")
    assert (config.parallel.tensor, config.parallel.pipeline) == (2, 2)
    assert check_world_size(config, 8) == 2


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_a_preset_is_short_and_begins_with_its_purpose(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 60
    assert lines[0].startswith("# ")


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "parallel").glob("*.yaml")), ids=lambda p: p.stem
)
def test_a_layout_leaves_the_global_batch_to_the_run(path):
    assert "global_rows" not in path.read_text()


def test_the_table_of_keys_is_up_to_date(tables):
    page, text = tables.renewed("keys")
    assert page.read_text("utf-8") == text, "run `make docs`"


def test_every_key_is_described(tables):
    rows = {key: texts for key, *texts in tables.key_rows()}
    assert len(rows) == len(list(tables.key_rows())) > 50
    assert [key for key, (_, _, meaning) in rows.items() if not meaning] == []
    assert rows["`loss.blocking.tau`"][:2] == ["a number above 0.5 and below 1", "`0.95`"]
