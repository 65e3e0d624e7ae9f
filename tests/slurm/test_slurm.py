"""The shipped batch files under a real Slurm: two nodes, signals, preemption, limits, arrays."""

from __future__ import annotations

import json
import re
import time

import pytest
from run_files import metrics

from megatron_mode.errors import ExitStatus

pytestmark = [pytest.mark.slurm, pytest.mark.distributed]

BATCH = "launch/slurm/pretrain.sbatch"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=1G")
ONE_TASK = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=1G")
STEPS = 150


def after_steps(cluster, job, run_dir, steps):
    """Wait until so many steps of a job are logged."""
    path, deadline = run_dir / "metrics.jsonl", time.monotonic() + 120
    while not path.exists() or len(path.read_text().splitlines()) < steps:
        assert time.monotonic() < deadline, (cluster.facts(job), cluster.log(job))
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(cluster, run_file, tmp_path_factory):
    """Train on two nodes through srun, undisturbed; return the metrics."""
    run_dir = tmp_path_factory.mktemp("whole")
    job = cluster.submit(*TWO_NODES, BATCH, "--config", run_file, f"run.dir={run_dir}")
    facts = cluster.wait(job)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "0"), (
        cluster.log(job)
    )
    assert "tensor 1 x pipeline 1 x data 2" in cluster.log(job)
    assert (run_dir / "report.html").exists()
    found = metrics(run_dir)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    return found


def test_usr1_saves_requeues_and_resumes_to_the_same_bits_through_deepspeed(
    cluster, run_file, whole, tmp_path
):
    arguments = (*TWO_NODES, BATCH, "--config", run_file, f"run.dir={tmp_path}")
    job = cluster.submit(*arguments, MODE_LAUNCHER="deepspeed")
    after_steps(cluster, job, tmp_path, 5)
    cluster.call("scancel", "--signal=USR1", job)
    facts = cluster.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    (step,) = re.findall(rf"stopped after step (\d+) of {STEPS} \(SIGUSR1\)", cluster.log(job))
    assert 5 <= int(step) < STEPS, "it was stopped on its way"
    assert f"resumes at step {step}" in cluster.log(job)
    assert metrics(tmp_path) == whole


def test_a_higher_partition_preempts_and_the_job_resumes_to_the_same_bits(
    cluster, run_file, whole, tmp_path
):
    job = cluster.submit(*TWO_NODES, BATCH, "--config", run_file, f"run.dir={tmp_path}")
    after_steps(cluster, job, tmp_path, 5)
    urgent = cluster.submit("--partition=urgent", "--exclusive", "--nodes=2", "--wrap", "sleep 1")
    assert cluster.wait(urgent)["JobState"] == "COMPLETED"
    facts = cluster.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    (step,) = re.findall(rf"stopped after step (\d+) of {STEPS} \(SIGTERM\)", cluster.log(job))
    assert f"resumes at step {step}" in cluster.log(job)
    assert metrics(tmp_path) == whole


def test_a_time_limit_is_learned_from_slurm_and_one_process_trains_the_same(
    cluster, run_file, whole, tmp_path
):
    """The margin leaves 5 s of the job's 120 s after its start, which imports take."""
    arguments = ("--config", run_file, f"run.dir={tmp_path}", "run.time_margin_seconds=115")
    job = cluster.submit(*ONE_TASK, "--time=2", "--signal=USR1@1", BATCH, *arguments)
    after_steps(cluster, job, tmp_path, 1)
    deadline = time.monotonic() + 60
    while cluster.facts(job)["JobState"] != "PENDING":
        assert time.monotonic() < deadline, cluster.log(job)
        time.sleep(0.1)
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    facts = cluster.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    assert re.search(rf"stopped after step \d+ of {STEPS} \(TIME_LIMIT\)", cluster.log(job))
    alone = metrics(tmp_path)
    assert [line["step"] for line in alone] == [line["step"] for line in whole]
    for one, two in zip(alone, whole, strict=True):
        for key in ("loss", "lm_loss", "mode_loss", "grad_norm"):
            assert one[key] == pytest.approx(two[key], rel=1e-4), (one["step"], key)
        assert one["rows_by_source"] == two["rows_by_source"]


def test_an_array_trains_each_variant_and_requeues_only_the_task_that_stopped(
    cluster, run_file, tmp_path
):
    """Through deepspeed; the number of the last task is that of the array, for all its tasks."""
    variants, runs = tmp_path / "variants.txt", tmp_path / "runs"
    variants.write_text("run.seed=7 run.steps=4\nloss.mode_weight=0.5\n")
    job = cluster.submit(
        *ONE_TASK,
        "--array=0-1",
        "launch/slurm/experiment-array.sbatch",
        runs,
        *("--config", run_file, "run.eval_every_steps=0"),
        MODE_VARIANTS=str(variants),
        MODE_LAUNCHER="deepspeed",
    )
    short, stopped = f"{job}_0", f"{job}_1"
    after_steps(cluster, stopped, runs / "1", 5)
    assert cluster.facts(stopped)["JobId"] == job
    cluster.call("scancel", "--signal=USR1", stopped)
    for task, restarts in ((short, "0"), (stopped, "1")):
        facts = cluster.wait(task)
        assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", restarts), cluster.log(task)
    steps = [json.loads((runs / f"{n}/summary.json").read_text())["steps"] for n in range(2)]
    assert steps == [4, STEPS]
    assert "seed: 7" in (runs / "0/config.yaml").read_text()
    assert "mode_weight: 0.5" in (runs / "1/config.yaml").read_text()


WRONG = {
    "python in the batch script": "python launch/pretrain.py",
    "deepspeed without a hostfile": "deepspeed --launcher slurm launch/pretrain.py",
    "deepspeed on one node": "deepspeed --num_gpus 1 launch/pretrain.py",
    "torchrun on one node": "torchrun --nproc-per-node 2 launch/pretrain.py",
}


def test_a_wrong_world_size_is_refused(cluster, run_file, tmp_path):
    jobs = {}
    for name, command in WRONG.items():
        lines = ("set -e", "export MASTER_ADDR=$(hostname) MASTER_PORT=29500 PYTHONSAFEPATH=1")
        script = "; ".join((*lines, f"{command} --config {run_file} run.dir={tmp_path}/run"))
        jobs[name] = cluster.submit(*TWO_NODES, "--wrap", f"bash -c '{script}'")
    for name, job in jobs.items():
        status = cluster.wait(job)["ExitCode"]
        said = [line for line in cluster.log(job).splitlines() if line.startswith("error: ")]
        assert len(said) == 1, (name, cluster.log(job))
        assert "the allocation has SLURM_NTASKS = 2 on SLURM_NNODES = 2" in said[0], (name, said)
        assert status == ("1:0" if "torchrun" in name else "2:0"), (name, cluster.log(job))
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_told_once_and_not_requeued(cluster, run_file, tmp_path):
    assert ExitStatus.STOPPED == 75, "the batch files write it as a number"
    overrides = ("--config", run_file, f"run.dir={tmp_path}/run", "model.kv_heads=3")
    job = cluster.submit(*TWO_NODES, BATCH, *overrides)
    facts = cluster.wait(job)
    assert (facts["ExitCode"], facts["Restarts"]) == ("2:0", "0"), cluster.log(job)
    assert cluster.log(job).count("model.kv_heads is 3") == 1, cluster.log(job)


@pytest.mark.slow
def test_a_profile_leaves_its_figures_and_no_checkpoint(cluster, run_file, tmp_path):
    arguments = ("--config", run_file, "run.eval_every_steps=0", "run.steps=100000")
    variables = {
        "MODE_BENCH": "--dtype fp32 --shape 64 32 256 --rounds 1 --head-rounds 0 --only torch",
        "MODE_PROFILE": str(tmp_path / "profile"),
        "MODE_SECONDS": "20",
    }
    job = cluster.submit(*ONE_TASK, "launch/slurm/profile.sbatch", *arguments, **variables)
    assert cluster.wait(job)["ExitCode"] == "0:0", cluster.log(job)
    assert "N=64 D=32 V=256" in cluster.log(job)
    assert '"step_seconds"' in (tmp_path / "profile/metrics.jsonl").read_text()
    assert not (tmp_path / "profile/checkpoints").exists()
    again = cluster.submit(*ONE_TASK, "launch/slurm/profile.sbatch", *arguments, **variables)
    assert cluster.wait(again)["ExitCode"] == "2:0"
    assert "profile', which exists; accepted: a new folder" in cluster.log(again)


@pytest.mark.slow
def test_an_array_prepares_the_shards_of_a_corpus(cluster, run_file, tmp_path):
    given = run_file.parent
    words = f"--tokenizer {given}/data/tokenizer.model --valid-share 0.3 --input {given}/in.jsonl"
    variables = {"MODE_OUT": str(tmp_path / "out"), "MODE_ARGS": words}
    job = cluster.submit(
        "--array=0-1",
        *("--cpus-per-task=1", "--mem=1G", "--time=5"),
        "launch/slurm/prepare-array.sbatch",
        **variables,
    )
    for task in range(2):
        assert cluster.wait(f"{job}_{task}")["ExitCode"] == "0:0", cluster.log(f"{job}_{task}")
    merge = cluster.submit("--wrap", f"megatron-mode merge --out {tmp_path}/out")
    assert cluster.wait(merge)["ExitCode"] == "0:0", cluster.log(merge)
    assert (tmp_path / "out/books.bin").exists()
