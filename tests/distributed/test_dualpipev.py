"""A DualPipeV run trains, evaluates, saves and resumes as a 1F1B run of the same config does."""

from __future__ import annotations

import json
import shutil

import gloo_world
import pytest
import resume_rank
import torch
from run_files import metrics

# Both schedules add the same micro-batches, a tied embedding in another order.
ROUNDING = 1e-5
COMPARED = ("loss", "grad_norm", "valid_lm_loss", "valid_mode_loss", "valid_mode_auroc")


def saved_weights(run_dir):
    """Return {(file, name): tensor} of the last checkpoint."""
    return {
        (path.name, name): tensor
        for path in sorted((run_dir / "checkpoints/step-00000004").glob("layer_*"))
        for name, tensor in torch.load(path, weights_only=True).items()
        if isinstance(tensor, torch.Tensor)
    }


def make_config(data_root, run_dir, schedule, **checkpoint):
    """Four micro-batches a step, five an evaluation; the report's pictures take one."""
    return resume_rank.make_config(
        data_root,
        run_dir,
        run={"steps": 4, "eval_every_steps": 2, "eval_rows": 5, "precision": "fp32"},
        model={"layers": 4},
        loss={"blocking": {"policy": "none"}},
        parallel={"tensor": 1, "pipeline": 2, "schedule": schedule},
        batch={"global_rows": 4, "micro_rows": 1},
        checkpoint={"every_steps": 2, **checkpoint},
    )


def check_alike(lines, expected):
    """Compare what a step or an evaluation gave; a line without an evaluation lacks its keys."""
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() == other.keys()
        for key in (key for key in COMPARED if other.get(key) is not None):
            assert line[key] == pytest.approx(other[key], rel=ROUNDING), key


@pytest.mark.distributed
def test_dualpipev_trains_evaluates_and_resumes(small_corpus, tmp_path):
    plain = make_config(small_corpus, tmp_path / "plain", "1f1b")
    whole = make_config(small_corpus, tmp_path / "whole", "dualpipev")
    broken = make_config(small_corpus, tmp_path / "broken", "dualpipev")
    gloo_world.run_world(2, resume_rank.run_training, plain)
    gloo_world.run_world(2, resume_rank.run_training, whole)
    lines, expected = metrics(tmp_path / "whole"), metrics(tmp_path / "plain")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    check_alike(lines, expected)
    assert [set(line) >= set(COMPARED) for line in lines] == [False, True, False, False]
    ends = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("whole", "plain")]
    assert ends[0]["valid_lm_loss"] == pytest.approx(ends[1]["valid_lm_loss"], rel=ROUNDING)

    weights, other_weights = saved_weights(tmp_path / "whole"), saved_weights(tmp_path / "plain")
    assert weights.keys() == other_weights.keys(), "files and names do not depend on the schedule"
    for name, tensor in weights.items():
        assert torch.allclose(tensor, other_weights[name], rtol=1e-3, atol=1e-4), name

    with pytest.raises(RuntimeError, match="died with 9"):
        gloo_world.run_world(2, resume_rank.run_training, broken, 3)
    other = make_config(small_corpus, tmp_path / "broken", "1f1b")
    for messages in gloo_world.run_world(2, resume_rank.refusals, broken, [other]):
        assert "was saved at tensor 1 x pipeline 2 x data 1 (dualpipev), this run is" in messages[0]
        assert "set checkpoint.reshard=auto" in messages[0]
    shutil.copytree(tmp_path / "broken", tmp_path / "turned")
    turned = make_config(small_corpus, tmp_path / "turned", "1f1b", reshard="auto")
    assert gloo_world.run_world(2, resume_rank.run_training, turned) == [2] * 2
    check_alike(metrics(tmp_path / "turned"), lines)
    assert gloo_world.run_world(2, resume_rank.run_training, broken) == [2] * 2
    assert metrics(tmp_path / "broken") == lines, "to the last bit"
