"""A bad step ends as the policy says, to the same bits as a run that left it out from the start."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import socket
import time

import gloo_world
import health_rank
import pytest
import resume_rank
import torch
from free_port import free_port
from run_files import metrics

from megatron_mode.__main__ import run_verb

STEPS, BAD = 7, 4
RANKS = {"tensor": 2, "pipeline": 2}, {"tensor": 1, "pipeline": 1}
SKIP = {"non_finite": "skip"}
SPIKE = {"spike": "skip", "spike_window_steps": 3, "spike_factor": 20}
# Starts of each run: layout, steps, what is poisoned, health, steps between checkpoints.
NARROW = {"tensor": 1, "pipeline": 2, "schedule": "dualpipev"}
TURNED = {**NARROW, "tensor": 2, "sequence_parallel": True}
RUNS = {
    "planned": [(RANKS[0], STEPS, None, {**SPIKE, "leave_out_steps": [BAD]}, 3)],
    # The second start resumes after the step.
    "skip": [(RANKS[0], 6, "nan", {**SPIKE, **SKIP}, 3), (RANKS[0], STEPS, None, SPIKE, 3)],
    "rollback": [(RANKS[0], STEPS, "nan", {**SPIKE, "non_finite": "rollback"}, 3)],
    # The second start resumes before the step, and judges it by losses of the first.
    "stop": [(RANKS[0], STEPS, "nan", SPIKE, 3), (RANKS[0], STEPS, "spike", SPIKE, 3)],
    "wide": [(RANKS[1], STEPS, "nan", {"non_finite": "rollback", "rollback_steps": 2}, 2)],
    "too-many": [(RANKS[1], STEPS, "nan", {**SKIP, "max_skips": 0}, 3)],
    "turned-planned": [(TURNED, STEPS, None, {"leave_out_steps": [BAD]}, 3)],
    "turned": [(TURNED, STEPS, "nan", {"non_finite": "rollback"}, 3)],
    # After the first start of "skip": another layout and schedule.
    "moved": [(NARROW, STEPS, None, SPIKE, 3)],
    "too-early": [(RANKS[1], STEPS, "nan", {"non_finite": "rollback"}, 5)],
}


@pytest.fixture(scope="module")
def runs(small_corpus, tmp_path_factory):
    """Run all of them; return folder and ends by run."""
    folder = tmp_path_factory.mktemp("health")
    ends = {name: [] for name in RUNS}
    for name, starts in RUNS.items():
        for layout, steps, what, health, every_steps in starts:
            config = resume_rank.make_config(
                small_corpus,
                folder / name,
                run={"dir": str(folder / name), "steps": steps, "eval_every_steps": 0},
                health=health,
                checkpoint={"every_steps": every_steps, "reshard": "auto"},
                parallel=layout,
                model={"layers": 4},
                batch={"micro_rows": 1 if "schedule" in layout else 2},
            )
            size = layout["tensor"] * layout["pipeline"]
            # The first rank of the last stage, whose loss is the one that is reported.
            poison = what and (0 if "schedule" in layout else size // 2, (BAD,), what)
            told = gloo_world.run_world(size, health_rank.run_poisoned, config, poison)
            assert len(set(told)) == 1, "all ranks end alike"
            ends[name].append(told[0])
            if name == "skip" and not (folder / "moved").exists():
                shutil.copytree(folder / name, folder / "moved")
    return folder, ends


def events(folder):
    return [json.loads(line) for line in (folder / "health.jsonl").read_text().splitlines()]


def manifest(folder, step=STEPS):
    return json.loads((folder / f"checkpoints/step-{step:08d}/manifest.json").read_text())


def weights(folder):
    """Return every saved tensor of the last checkpoint, moments and master weights too."""
    found = {}

    def collect(name, value):
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in items:
                collect(f"{name}/{key}", inner)

    from megatron_mode.checkpoint.files import weights_only

    with weights_only():
        for path in sorted((folder / f"checkpoints/step-{STEPS:08d}").glob("*.pt")):
            collect(path.name, torch.load(path, map_location="cpu"))
    assert any("exp_avg" in name for name in found)
    return found


def check_same(folder, one, other, but=()):
    """Compare metrics, weights, moments and the record of two runs, to the last bit."""
    for line, expected in zip(metrics(folder / one), metrics(folder / other), strict=True):
        for stall in (line, expected):
            stall.pop("checkpoint_stall_seconds", None)
        if line["step"] - 1 not in but:
            assert line == expected
    mine, theirs = weights(folder / one), weights(folder / other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    for key in ("skips", "order_digest", "recent_losses", "recent_digests", "blocked_shares"):
        assert manifest(folder / one)[key] == manifest(folder / other)[key], key
    summaries = [json.loads((folder / n / "summary.json").read_text()) for n in (one, other)]
    assert summaries[0]["valid"] == summaries[1]["valid"]


@pytest.mark.distributed
def test_a_rollback_under_the_other_schedule_is_one_to_the_same_bits(runs):
    """Sequence parallelism beside it; the poisoned stage comes back to the first rank."""
    folder, ends = runs
    assert ends["turned"] == [None]
    assert manifest(folder / "turned")["skips"] == [BAD]
    check_same(folder, "turned", "turned-planned", but=[BAD])


@pytest.mark.distributed
def test_a_skip_goes_along_to_another_layout(runs, capsys):
    folder, ends = runs
    assert ends["moved"] == [None]
    assert (folder / "moved/checkpoints/step-00000006-universal").is_dir()
    for key in ("skips", "order_digest"):
        assert manifest(folder / "moved")[key] == manifest(folder / "planned")[key]
    one, other = metrics(folder / "moved")[-1], metrics(folder / "planned")[-1]
    assert one["step"] == other["step"] == STEPS
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    run = str(folder / "moved")
    assert run_verb(["order", run, "--verify", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["skips"] == [BAD]


def left_out(folder):
    return [line["step"] - 1 for line in metrics(folder) if line.get("update_left_out")]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["skip", "rollback", "stop"])
def test_the_run_resumes_as_if_the_step_had_been_left_out_from_the_start(runs, name):
    """Skipped and resumed, rolled back, stopped and started again: the same bits."""
    folder, ends = runs
    assert ends[name][-1] is None
    assert manifest(folder / name)["skips"] == [BAD]
    check_same(folder, name, "planned", but=[BAD])
    assert left_out(folder / name) == [BAD]


@pytest.mark.distributed
def test_a_wide_rollback_leaves_the_steps_before_out_too(runs):
    """The checkpoint of step 4 holds the update of step 3, so the run goes back to that of 2."""
    folder, ends = runs
    assert ends["wide"] == [None]
    assert manifest(folder / "wide")["skips"] == [3, 4]
    assert left_out(folder / "wide") == [3, 4]
    assert [line["step"] for line in metrics(folder / "wide")] == list(range(1, STEPS + 1))


@pytest.mark.distributed
def test_a_stop_names_the_step_and_saves_nothing_of_it(runs):
    folder, ends = runs
    (sentence, after) = ends["stop"]
    assert sentence.startswith(f"step {BAD}: the loss is nan; health.non_finite is stop, so")
    assert f"health.leave_out_steps=[{BAD}]" in sentence
    assert "health.jsonl" in sentence
    assert after is None
    (sentence,) = ends["too-many"]
    assert "step 4: the loss is nan, and 0 updates within 1000 steps are left out" in sentence
    assert "health.max_skips is 0, so" in sentence
    names = [path.name for path in sorted((folder / "too-many/checkpoints").glob("step-*"))]
    assert names == ["step-00000003"]


@pytest.mark.distributed
def test_a_rollback_without_an_old_enough_checkpoint_says_so(runs):
    folder, ends = runs
    (sentence,) = ends["too-early"]
    assert "step 4 is to be left out" in sentence
    assert "no checkpoint from before it" in sentence
    assert [event["step"] for event in events(folder / "too-early")] == [BAD]


@pytest.mark.distributed
def test_events_name_the_rows_and_documents_of_the_step(runs):
    folder, _ = runs
    (event,) = events(folder / "skip")
    assert (event["step"], event["kind"], event["action"]) == (BAD, "non_finite_loss", "skip")
    assert event["loss"] is None
    assert event["ranks_with_bad_gradient"] == [0, 1, 2, 3], "through the pipeline to all"
    rows = event["rows"]
    assert [row["row"] for row in rows] == list(range(BAD * 4, BAD * 4 + 4))
    # The second of the two micro-batches was broken: two of the four rows.
    broken = [row["row"] for row in rows if row["loss"] is None]
    assert len(broken) == 2
    assert event["worst_rows"] == broken
    for row in rows:
        assert row["documents"]
        for document in row["documents"]:
            assert is_seen(folder / "skip", document, row["row"])
    assert [(e["kind"], e["action"]) for e in events(folder / "stop")] == [
        ("non_finite_loss", "stop"),
        ("loss_spike", "skip"),
    ]
    assert not (folder / "planned/health.jsonl").exists()


def is_seen(run, document, row):
    """Ask `megatron-mode order --document`, which finds rows the other way round."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert run_verb(["order", str(run), "--document", document, "--json"]) == 0
    return row in [exposure["row"] for exposure in json.loads(said.getvalue())["exposures"]]


@pytest.mark.distributed
def test_the_order_is_verified_with_what_was_left_out(runs, capsys):
    folder, _ = runs
    for name, skips in (("skip", [BAD]), ("rollback", [BAD]), ("wide", [3, 4])):
        capsys.readouterr()
        run = str(folder / name)
        assert run_verb(["order", run, "--verify", run, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["skips"] == skips
    assert run_verb(["order", run, "--verify", run]) == 0
    assert "updates left out: steps 3, 4" in capsys.readouterr().out


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("inside", "said"),
    [
        ("resume", "the resume: all ranks are inside it"),
        ("finish", "the final report: rank 1 has not arrived"),
    ],
)
def test_a_rank_that_hangs_outside_the_steps_ends_the_run_too(inside, said, small_corpus, tmp_path):
    run = tmp_path / "run"
    config = resume_rank.make_config(
        small_corpus,
        run,
        parallel={"tensor": 2, "pipeline": 1},
        run={"dir": str(run), "steps": 2, "eval_every_steps": 0},
        health={"stall_seconds": 5, "start_stall_seconds": 6},
    )
    workers, _ = gloo_world.start_world(2, health_rank.run_hanging, config, inside)
    begin = time.monotonic()
    for worker in workers:
        worker.join(90)
    assert [worker.exitcode for worker in workers] == [4, 4]
    assert time.monotonic() - begin < 60
    (event,) = events(run)
    assert (event["kind"], event["action"]) == ("stall", "stop")
    assert f"no progress for 6 s (health.start_stall_seconds) in {said}; " in event["reason"]
    # Both speak: where both are inside it is the stacks that tell who does not move.
    stacks = [(run / f"stacks/rank-{rank:05d}.txt").read_text() for rank in range(2)]
    assert ["in hangs\n" in text for text in stacks] == [False, True]


@pytest.mark.distributed
def test_a_process_whose_peers_do_not_come_says_where_it_waited():
    port = free_port()
    ((kind, sentence),) = gloo_world.run_world(1, health_rank.wait_in_vain, port)
    assert kind == "StallError"
    assert sentence.startswith(f"rank 0 of 2 processes did not meet all others at 127.0.0.1:{port}")
    assert "1/2 clients joined" in sentence
    with socket.create_server(("0.0.0.0", port)):
        ((kind, sentence),) = gloo_world.run_world(1, health_rank.wait_in_vain, port)
    assert kind == "ConfigError"
    assert sentence.startswith(f"MASTER_PORT is {port}: another program on this machine uses it")


@pytest.mark.distributed
@pytest.mark.parametrize("error", [SystemExit(), OSError(5, "Input/output error")])
def test_a_reader_that_dies_ends_the_run_in_a_sentence(error, small_corpus, tmp_path):
    """Started again without the cause, the run resumes to the metrics of an undisturbed one."""
    run = tmp_path / "run"
    config = resume_rank.make_config(
        small_corpus,
        run,
        parallel={"tensor": 1, "pipeline": 1},
        run={"dir": str(run), "steps": 5, "eval_every_steps": 0},
        checkpoint={"every_steps": 2},
    )
    (said,) = gloo_world.run_world(1, health_rank.run_with_a_broken_reader, config, error, 6)
    assert said.startswith("the rows of step 3 cannot be read (")
    assert type(error).__name__ in said
    (event,) = events(run)
    assert (event["kind"], event["action"], event["step"]) == ("data", "stop", 3)
    assert [row["row"] for row in event["rows"]] == [12, 13, 14, 15]
    assert "breaking" in event["cause"], "the worker's own traceback"
    assert gloo_world.run_world(1, health_rank.run_poisoned, config) == [None]
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5]
