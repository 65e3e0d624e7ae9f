"""A checkpoint with a changed byte, a missing file or smuggled code is never gone on from."""

from __future__ import annotations

import json
import math
import random
import shutil

import damage_rank
import gloo_world
import pytest
import resume_rank
import torch
from run_files import assert_same
from spoilt_checkpoints import Bomb, seal

CHECKPOINT = "step-00000006"
FALLBACK = {"every_steps": 3, "keep": 2, "fallback": True}


@pytest.fixture(scope="module")
def trained(small_corpus, tmp_path_factory):
    """Train six steps at TP 2 PP 2, saving after the third and the sixth."""
    folder = tmp_path_factory.mktemp("trained")
    config = resume_rank.make_config(small_corpus, folder / "run")
    gloo_world.run_world(4, resume_rank.run_training, config)
    return config, folder / "run"


def files_of(run):
    return sorted((run / "checkpoints" / CHECKPOINT).iterdir())


def random_flips(run, count, seed):
    """Draw single-byte flips of random files, `latest` among them."""
    draw = random.Random(seed)
    paths = [*files_of(run), run / "checkpoints" / "latest"]
    flips = []
    for _ in range(count):
        path = draw.choice(paths)
        at, change = draw.randrange(path.stat().st_size), draw.randrange(1, 256)
        flips.append(("flip", str(path.relative_to(run / "checkpoints")), at, change))
    return flips


def check_refused(config, run, damages):
    """Every rank has to name file and tag for each damage, and resume without."""
    results = gloo_world.run_world(4, damage_rank.attempts, config, damages)
    for said in results:
        assert said[-1] == "went on at step 6"
        for (kind, name, *where), sentence in zip(damages, said[:-1], strict=True):
            path = run / "checkpoints" / name
            missing = where[0] if kind == "add" else path.name
            assert missing in sentence, (kind, name, where, sentence)
            assert CHECKPOINT in sentence, (kind, name, where, sentence)
            assert "went on" not in sentence


@pytest.mark.distributed
def test_every_changed_cut_or_missing_file_is_told(trained):
    config, run = trained
    names = [str(path.relative_to(run / "checkpoints")) for path in files_of(run)]
    sizes = [path.stat().st_size for path in files_of(run)]
    assert len(names) == 4 * 2 + 4 + 4 + 3  # layers, module states, optimizer states, the rest
    damages = [("remove", name) for name in names]
    damages += [("cut", name, size // 2) for name, size in zip(names, sizes, strict=True)]
    damages += [("cut", name, size - 1) for name, size in zip(names, sizes, strict=True)]
    damages += [("add", names[0], "layer_00-model_02-model_states.pt")]
    check_refused(config, run, damages + random_flips(run, 60, seed=1))


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.distributed
def test_500_random_flips_are_told(trained):
    config, run = trained
    check_refused(config, run, random_flips(run, 500, seed=2))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name",
    [
        "layer_01-model_00-model_states.pt",
        "mp_rank_03_model_states.pt",
        "zero_pp_rank_0_mp_rank_01_optim_states.pt",
    ],
)
def test_a_file_that_smuggles_code_is_refused_by_name(trained, tmp_path, name):
    """The digests are those of the bomb: only the reading itself can refuse."""
    config, run = trained
    run = shutil.copytree(run, tmp_path / "run")
    path, mark = run / "checkpoints" / CHECKPOINT / name, tmp_path / "went off"
    state = torch.load(path, weights_only=False)
    torch.save({**state, "bomb": Bomb(mark)}, path)
    seal(path.parent)
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(run)})})
    with pytest.raises(RuntimeError, match=rf"{name} is refused: .*posix\.mkdir"):
        gloo_world.run_world(4, resume_rank.run_training, config)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the bomb is one"


@pytest.mark.distributed
def test_a_bf16_shard_that_smuggles_code_is_refused_by_name(small_corpus, tmp_path):
    run, mark = tmp_path / "run", tmp_path / "went off"
    config = resume_rank.make_config(
        small_corpus,
        run,
        run={"dir": str(run), "steps": 2, "precision": "bf16", "eval_every_steps": 0},
        parallel={"tensor": 1, "pipeline": 1},
        checkpoint={"every_steps": 2},
    )
    gloo_world.run_world(1, resume_rank.run_training, config)
    name = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    path = run / "checkpoints/step-00000002" / name
    torch.save({**torch.load(path, weights_only=False), "bomb": Bomb(mark)}, path)
    seal(path.parent)
    with pytest.raises(RuntimeError, match=rf"{name} is refused: .*posix\.mkdir"):
        gloo_world.run_world(1, resume_rank.run_training, config)
    assert not mark.exists()


@pytest.mark.distributed
def test_a_model_that_differs_from_the_saved_one_is_refused(trained, tmp_path):
    """Every digest fits; the losses of the fixed batch do not, in the last bit."""
    config, run = trained
    run = shutil.copytree(run, tmp_path / "run")

    def another_probe(manifest):
        probe = manifest["probe"]
        probe["lm_loss"] = math.nextafter(probe["lm_loss"], math.inf)

    seal(run / "checkpoints" / CHECKPOINT, another_probe)
    config = resume_rank.make_config(config.data.root, run)
    said = f"{CHECKPOINT} is loaded, but its probe has lm_loss"
    with pytest.raises(RuntimeError, match=said):
        gloo_world.run_world(4, resume_rank.run_training, config)
    elsewhere = resume_rank.make_config(config.data.root, shutil.copytree(run, tmp_path / "other"))
    told = gloo_world.run_world(4, resume_rank.run_elsewhere, elsewhere)
    assert told == [None] * 4, "where one rank differs, all of them allow for rounding"
    config = resume_rank.make_config(config.data.root, run, checkpoint=FALLBACK)
    assert gloo_world.run_world(4, resume_rank.run_training, config) == [3] * 4
    assert (run / "checkpoints" / f"{CHECKPOINT}.damaged").is_dir()


@pytest.mark.distributed
def test_fallback_resumes_from_the_checkpoint_before_and_ends_alike(trained, tmp_path):
    config, run = trained
    whole = (run / "metrics.jsonl").read_text()
    run = shutil.copytree(run, tmp_path / "run")
    path = run / "checkpoints" / CHECKPOINT / "mp_rank_00_model_states.pt"
    path.write_bytes(path.read_bytes()[:-1])
    universal = path.parent.with_name(f"{CHECKPOINT}-universal")
    universal.mkdir()
    config = resume_rank.make_config(config.data.root, run, checkpoint=FALLBACK)
    assert gloo_world.run_world(4, resume_rank.run_training, config) == [3] * 4
    losses = [json.loads(line)["loss"] for line in whole.splitlines()]
    again = (run / "metrics.jsonl").read_text()
    assert [json.loads(line)["loss"] for line in again.splitlines()] == losses
    assert (run / "checkpoints" / f"{CHECKPOINT}.damaged").is_dir()
    assert (run / "checkpoints" / CHECKPOINT).is_dir()
    # It may be all that is whole of the step, and is no longer that of this name.
    assert not universal.exists()
    assert universal.with_name(f"{universal.name}.damaged").is_dir()


@pytest.mark.distributed
@pytest.mark.parametrize("asynchronous", [True, False])
def test_training_continues_while_a_checkpoint_is_written(asynchronous, small_corpus, tmp_path):
    """And stands still for all of it where `checkpoint.asynchronous` is off."""
    config = resume_rank.make_config(
        small_corpus,
        tmp_path / "run",
        run={"dir": str(tmp_path / "run"), "steps": 5, "eval_every_steps": 0, "threads": 1},
        parallel={"tensor": 1, "pipeline": 1},
        checkpoint={"every_steps": 2, "asynchronous": asynchronous},
    )
    arguments = (config, 0.2)
    ((beside, seconds),) = gloo_world.run_world(1, resume_rank.run_with_slow_writes, *arguments)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    # A line is written before its step's own save, so a stall stands in the line after it.
    stalls = {line["step"]: line["checkpoint_stall_seconds"] for line in map(json.loads, lines)}
    of_one_save = seconds / 3  # after steps 2, 4 and 5
    assert of_one_save > 1
    if asynchronous:
        assert beside == [2, 3, 4]
        # The save after step 2 holds nobody up.
        assert stalls[3] < 0.5 * of_one_save
    else:
        assert beside == []
        assert stalls[3] > 0.8 * of_one_save
        assert stalls[5] > 0.8 * of_one_save
    assert stalls[1] == stalls[2] == 0


@pytest.mark.distributed
def test_waiting_for_the_writer_changes_no_byte_of_the_state(trained, tmp_path):
    """What is written in the background equals what is written while training waits."""
    config, run = trained
    waits = resume_rank.make_config(
        config.data.root,
        tmp_path / "run",
        checkpoint={
            "every_steps": 1,
            "keep": 1,
            "asynchronous": False,
            "permanent_every_steps": 4,
        },
    )
    gloo_world.run_world(4, resume_rank.run_training, waits)
    folders = [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")]
    assert sorted(folders) == ["step-00000004", "step-00000006"]
    compared = 0
    for path in files_of(run):
        if path.suffix == ".pt":
            other = tmp_path / "run" / "checkpoints" / CHECKPOINT / path.name
            one, two = (torch.load(p, weights_only=False) for p in (path, other))
            one.pop("ds_config", None), two.pop("ds_config", None)
            assert_same(one, two, path.name)
            compared += 1
    assert compared == 16
