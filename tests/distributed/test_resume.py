"""A run that was cut off resumes to the same bits; one that does not belong is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gloo_world
import pytest
import resume_rank
import torch
from run_files import metrics

from megatron_mode.report.registry import CHARTS, METRICS

SHARED_MEMORY_BEFORE = set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))


@pytest.fixture(scope="module")
def runs(small_corpus, tmp_path_factory):
    """Run once without a break and once cut off in the middle of step 5 and started again."""
    folder = tmp_path_factory.mktemp("runs")
    whole = resume_rank.make_config(small_corpus, folder / "whole")
    gloo_world.run_world(4, resume_rank.run_training, whole)
    broken = resume_rank.make_config(small_corpus, folder / "broken")
    with pytest.raises(RuntimeError, match="died with 9"):
        gloo_world.run_world(4, resume_rank.run_training, broken, 4)
    cut_off = metrics(folder / "broken")
    assert gloo_world.run_world(4, resume_rank.run_training, broken) == [3] * 4
    return folder, cut_off


@pytest.mark.distributed
def test_a_resumed_run_has_the_same_metrics_to_the_last_bit(runs):
    folder, cut_off = runs
    whole, resumed = metrics(folder / "whole"), metrics(folder / "broken")
    assert [line["step"] for line in cut_off] == [1, 2, 3, 4], "it was cut off after a checkpoint"
    assert [line["step"] for line in whole] == [1, 2, 3, 4, 5, 6]
    assert resumed == whole
    assert any(line["blocked_share"] > 0 for line in whole), "renormalise has a state to restore"
    assert all("valid_lm_loss" in line for line in whole[1:5:2])


@pytest.mark.distributed
def test_a_run_writes_what_the_registry_lists_and_the_report_draws(runs):
    folder, _ = runs
    lines = (folder / "whole/metrics.jsonl").read_text().splitlines()
    written = {key for line in lines for key in json.loads(line)}
    assert written == METRICS.keys() - {"update_left_out"}, "no update was left out"
    drawn = re.findall(r"<h3>([^<]*)</h3>", (folder / "whole/report.html").read_text())
    assert {chart.title for chart in CHARTS} <= set(drawn)


@pytest.mark.distributed
def test_a_resumed_run_ends_with_the_same_weights_and_summary(runs):
    folder, _ = runs
    compared = 0
    for path in sorted((folder / "whole/checkpoints/step-00000006").glob("layer_*")):
        one = torch.load(path, weights_only=True)
        other = torch.load(
            folder / "broken/checkpoints/step-00000006" / path.name, weights_only=True
        )
        for name, tensor in one.items():
            if name.endswith("_extra_state"):  # megatron-core's place for fp8 scales: None
                continue
            assert torch.equal(tensor, other[name]), (path.name, name)
            compared += 1
    assert compared >= 2 * (1 + 2 * 6 + 3)
    one, other = (
        json.loads((folder / r / "summary.json").read_text()) for r in ("whole", "broken")
    )
    for key in ("valid_lm_loss", "valid_mode_auroc", "unigram_entropy", "valid"):
        assert one[key] == other[key]


@pytest.mark.distributed
def test_only_the_newest_checkpoints_are_kept(small_corpus, runs, tmp_path):
    config = resume_rank.make_config(
        small_corpus,
        tmp_path / "run",
        parallel={"tensor": 1, "pipeline": 1},
        checkpoint={"every_steps": 1, "keep": 2},
    )
    gloo_world.run_world(1, resume_rank.run_training, config)
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*"))
    assert names == ["step-00000005", "step-00000006"]
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == "step-00000006"


@pytest.mark.distributed
def test_another_config_is_refused_with_its_differing_keys(small_corpus, runs):
    folder, _ = runs
    config = resume_rank.make_config(small_corpus, folder / "whole")

    def changed(**sections):
        return resume_rank.make_config(small_corpus, folder / "whole", **sections)

    whole_run = {"dir": str(folder / "whole"), "steps": 6, "threads": 1}
    cases = [
        (changed(optimizer={"learning_rate": 1e-3, "schedule": "constant"}), "learning_rate"),
        (changed(loss={"mode_weight": 0.5}), "loss.mode_weight"),
        (changed(run={**whole_run, "seed": 99}), "run.seed"),
        (changed(mix={**config.mix.model_dump(), "mode2_fraction": {"start": "0.25"}}), "start"),
        (changed(run={**whole_run, "steps": 3}), "run.steps"),
    ]
    results = gloo_world.run_world(4, resume_rank.refusals, config, [case[0] for case in cases])
    for rank in results:
        for message, (_, key) in zip(rank, cases, strict=True):
            assert key in message, message
            assert "start a new run.dir" in message or "already taken" in message
    assert metrics(folder / "whole")[-1]["step"] == 6, "a refusal changes nothing"


@pytest.mark.distributed
def test_a_run_leaves_no_shared_memory_behind(runs):
    """DeepSpeed's CPU collective left 64 MB a rank in /dev/shm after each run."""
    left = set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))
    assert left <= SHARED_MEMORY_BEFORE


@pytest.mark.distributed
def test_bf16_resumes_to_the_same_bits(small_corpus, tmp_path):
    """Its master weights and moments lie in other files than those of fp32."""
    layout = {"tensor": 1, "pipeline": 1}  # two data ranks
    precision = {"steps": 6, "eval_every_steps": 2, "eval_rows": 4, "precision": "bf16"}
    runs = {}
    for name in ("whole", "broken"):
        run = {**precision, "dir": str(tmp_path / name), "threads": 1}
        config = resume_rank.make_config(small_corpus, tmp_path / name, parallel=layout, run=run)
        if name == "broken":
            with pytest.raises(RuntimeError, match="died with 9"):
                gloo_world.run_world(2, resume_rank.run_training, config, 4)
            shards = (tmp_path / "broken/checkpoints/step-00000003").glob("bf16_zero_*")
            assert len(list(shards)) == 2
        first = 3 if name == "broken" else 0
        assert gloo_world.run_world(2, resume_rank.run_training, config) == [first] * 2
        runs[name] = metrics(tmp_path / name)
    assert runs["broken"] == runs["whole"]
    losses = [
        json.loads((tmp_path / name / "summary.json").read_text())["valid_lm_loss"] for name in runs
    ]
    assert losses[0] == losses[1]
