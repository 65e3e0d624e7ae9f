"""A run resumes at another layout, by command or by itself."""

from __future__ import annotations

import shutil

import gloo_world
import pytest
import resume_rank
import torch
from run_files import metrics
from spoilt_checkpoints import Bomb, seal

from megatron_mode.__main__ import run_verb

TAG = "step-00000003"
# Sums over other parts round otherwise; the run is in fp32.
RELATIVE_TOLERANCE = 1e-5
SMUGGLERS = (
    "zero/1.layer.mlp.linear_fc1.weight/exp_avg.pt",
    "zero/optimizer_state.pt",
    "mp_rank_00_model_states.pt",
)
KEYS = ("loss", "lm_loss", "mode_loss", "grad_norm", "tokens_seen", "learning_rate")


@pytest.fixture(scope="module")
def runs(small_corpus, tmp_path_factory):
    """Train six steps at one layout, and three, after which other layouts resume."""
    folder = tmp_path_factory.mktemp("runs")
    for name, steps in (("whole", 6), ("short", 3)):
        settings = {"dir": str(folder / name), "steps": steps}
        config = resume_rank.make_config(small_corpus, folder / name, run=settings)
        gloo_world.run_world(4, resume_rank.run_training, config)
    return folder


def changed(data_root, run_dir, layout, steps=6, **checkpoint):
    tensor, pipeline = layout
    return resume_rank.make_config(
        data_root,
        run_dir,
        run={"dir": str(run_dir), "steps": steps},
        parallel={"tensor": tensor, "pipeline": pipeline},
        batch={"micro_rows": 1},
        checkpoint={"every_steps": 3, **checkpoint},
    )


def check_same_run(whole, other):
    assert [line["step"] for line in other] == [1, 2, 3, 4, 5, 6]
    for expected, found in zip(whole, other, strict=True):
        for key in KEYS:
            assert found[key] == pytest.approx(expected[key], rel=RELATIVE_TOLERANCE), key


@pytest.mark.distributed
def test_a_run_resumes_at_another_layout_by_itself(small_corpus, runs, tmp_path):
    """`never` refuses and names the command; `auto` replaces a damaged folder by a sound one."""
    run = tmp_path / "run"
    shutil.copytree(runs / "short", run)
    assert run_verb(["reshard", str(run), "--to", "pipeline=2,data=2", "--json"]) == 0
    folder = run / "checkpoints" / f"{TAG}-universal"
    spoilt = folder / "zero" / "tied_modules.embedding.word.weight" / "fp32.pt"
    spoilt.write_bytes(spoilt.read_bytes()[:-1])
    never = changed(small_corpus, run, (1, 2), reshard="never")
    auto = changed(small_corpus, run, (1, 2), reshard="auto", keep=2)
    results = gloo_world.run_world(4, resume_rank.refused_then_trained, never, auto)
    for message, first_step in results:
        assert first_step == 3
        assert f"{TAG} was saved at tensor 2 x pipeline 2 x data 1" in message
        assert "this run is at tensor 1 x pipeline 2 x data 2" in message
        assert f"`megatron-mode reshard {run} --to tensor=1,pipeline=2`" in message
        assert "checkpoint.reshard=auto" in message
    check_same_run(metrics(runs / "whole"), metrics(run))
    assert run_verb(["reshard", str(run), "--step", "3", "--json"]) == 0, "it is sound again"


@pytest.mark.distributed
@pytest.mark.parametrize("name", SMUGGLERS)
def test_a_made_folder_that_smuggles_code_is_refused_by_name(name, small_corpus, runs, tmp_path):
    """DeepSpeed reads these files by itself."""
    run, mark = shutil.copytree(runs / "short", tmp_path / "run"), tmp_path / "went off"
    assert run_verb(["reshard", str(run), "--json"]) == 0
    path = run / "checkpoints" / f"{TAG}-universal" / name
    torch.save({**torch.load(path, weights_only=False), "bomb": Bomb(mark)}, path)
    seal(run / "checkpoints" / f"{TAG}-universal")
    config = changed(small_corpus, run, (1, 1))
    with pytest.raises(RuntimeError, match=rf"{name} is refused: .*posix\.mkdir"):
        gloo_world.run_world(1, resume_rank.run_training, config)
    assert not mark.exists()


@pytest.mark.distributed
def test_a_run_resumes_from_what_the_command_made(small_corpus, runs, tmp_path):
    """It is taken under `never` too, not written again, and goes with its checkpoint."""
    run = tmp_path / "run"
    shutil.copytree(runs / "short", run)
    assert run_verb(["reshard", str(run), "--to", "tensor=1,pipeline=1,data=2", "--json"]) == 0
    folder = run / "checkpoints" / f"{TAG}-universal"
    made = (folder / "manifest.json").stat().st_mtime
    config = changed(small_corpus, run, (1, 1), steps=4, reshard="never", keep=2)
    assert gloo_world.run_world(2, resume_rank.run_training, config) == [3] * 2
    assert (folder / "manifest.json").stat().st_mtime == made
    config = changed(small_corpus, run, (1, 1), reshard="never", keep=1)
    assert gloo_world.run_world(2, resume_rank.run_training, config) == [4] * 2
    check_same_run(metrics(runs / "whole"), metrics(run))
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert names == ["step-00000006"]
