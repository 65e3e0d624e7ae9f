"""A run stops while there is time for the work ahead and a save, and for the largest reason."""

from __future__ import annotations

import os
import signal
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mode.config.fields import RunConfig
from megatron_mode.process import stopping
from megatron_mode.process.launch import job_end_seconds
from megatron_mode.process.stopping import (
    REMEMBERED,
    SAVE_FACTOR,
    Reason,
    Stopping,
    StopRequest,
    end_seconds,
)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@pytest.fixture
def request_():
    """Listen to signals, and give the process its own handlers back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield StopRequest().listen()
    for number, handler in before.items():
        signal.signal(number, handler)


class Clock:
    """Stand in for the time module; work is what moves it."""

    def __init__(self, monkeypatch):
        self.now_seconds = 1000.0
        monkeypatch.setattr(stopping.time, "monotonic", lambda: self.now_seconds)

    def work(self, seconds):
        self.now_seconds += seconds


def alone(number):
    return int(number)


def test_signals_set_the_flag_and_the_larger_reason_stays(request_):
    assert request_.reason is Reason.NONE
    os.kill(os.getpid(), signal.SIGUSR1)
    assert request_.reason is Reason.SIGUSR1
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert request_.reason is Reason.SIGTERM


def test_a_terminal_that_hangs_up_stops_the_run(request_):
    os.kill(os.getpid(), signal.SIGHUP)
    assert request_.reason is Reason.SIGHUP


def test_nohup_keeps_its_meaning(request_):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request_.listen()
    os.kill(os.getpid(), signal.SIGHUP)
    assert request_.reason is Reason.NONE


def test_a_blocking_read_continues_after_a_signal(request_):
    """What libraries read or write is not torn by EINTR: the handler is set with SA_RESTART."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        time.sleep(0.1)
        os.kill(os.getppid(), signal.SIGUSR1)
        time.sleep(0.1)
        os.write(write, b"x")
        os._exit(0)
    import ctypes

    buffer = ctypes.create_string_buffer(1)
    got = ctypes.CDLL(None, use_errno=True).read(read, buffer, 1)  # Python's own would try again
    os.waitpid(child, 0)
    os.close(read)
    os.close(write)
    assert (got, buffer.raw) == (1, b"x"), os.strerror(ctypes.get_errno())
    assert request_.reason is Reason.SIGUSR1


def test_every_rank_stops_for_the_reason_of_one():
    asked = StopRequest()
    mine, agreed = [], Reason.SIGTERM

    def largest_over_ranks(number):
        mine.append(Reason(number))
        return max(number, agreed)

    decided = Stopping(asked, RunConfig(), largest_over_ranks, finish_factor=4)
    assert decided.after_step(1, 0.0) is Reason.SIGTERM
    assert mine == [Reason.NONE]


def test_a_signal_during_a_save_stops_at_that_save():
    asked = StopRequest()
    decided = Stopping(asked, RunConfig(), alone, finish_factor=4)
    assert decided.after_step(1, 0.0) is Reason.NONE
    asked.reason = Reason.SIGUSR1
    assert decided.after_save(Reason.NONE) is Reason.SIGUSR1


def test_the_end_of_the_job_and_the_own_limit_the_earlier_counts(monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(stopping.time, "time", lambda: 5_000_000.0)
    ends = {
        (None, None): float("inf"),
        (None, 120): 1150 + 120,
        (300, None): 1000 + 300,  # counts from the start of the process
        (300, 120): 1150 + 120,
        (300, 900): 1000 + 300,
    }
    for (own, job), expected in ends.items():
        clock.now_seconds = 1000.0
        asked = StopRequest(None if job is None else 5_000_000.0 + job)
        clock.work(150)
        assert end_seconds(RunConfig(time_limit_seconds=own), asked) == expected


def test_the_newest_few_durations_of_a_kind_count(monkeypatch):
    """90 s for a step that compiles, 30 s for one with an evaluation, 2 s for others."""
    clock = Clock(monkeypatch)
    run = RunConfig(steps=100, eval_every_steps=REMEMBERED + 2, time_margin_seconds=0)
    early, late = (Stopping(StopRequest(), run, alone, finish_factor=4) for _ in range(2))
    for done in range(1, 2 * REMEMBERED + 4):
        clock.work({1: 90, REMEMBERED + 2: 30}.get(done, 2))
        ahead = 90 if done <= REMEMBERED else 30 if done == 2 * REMEMBERED + 3 else 2
        early._end_seconds = clock.now_seconds + ahead - 1
        late._end_seconds = clock.now_seconds + ahead + 1
        assert early.after_step(done, 0.0) is Reason.TIME_LIMIT
        assert late.after_step(done, 0.0) is Reason.NONE


@given(
    limit=st.integers(200, 600),
    step=st.integers(1, 30),
    evaluation=st.integers(0, 60),
    save=st.integers(1, 40),
    every=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_what_was_learned_leaves_time_for_the_save(limit, step, evaluation, save, every):
    """Against the clock: no run is at work at its limit, and none stops much too early.

    Saves are written in the background; the next one waits for the one before.
    """
    eval_every, save_every = every
    margin = 60 + step + evaluation + save  # the first of each must fit in it
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        run = RunConfig(
            steps=10**6,
            eval_every_steps=eval_every,
            time_limit_seconds=margin + limit,
            time_margin_seconds=margin,
        )
        decided = Stopping(StopRequest(), run, alone, finish_factor=4)
        written_at = learned = 0.0
        for done in range(1, 10**6):
            clock.work(step + (evaluation if done % eval_every == 0 else 0))
            learned = save if written_at and written_at <= clock.now_seconds else learned
            stop = decided.after_step(done, learned)
            if stop or done % save_every == 0:
                if written_at:
                    clock.now_seconds, learned = max(clock.now_seconds, written_at), save
                written_at = clock.now_seconds + save
                stop = decided.after_save(stop)
            if stop:
                break
        left = 1000 + run.time_limit_seconds - max(clock.now_seconds, written_at)
        assert left >= 0
        assert left <= margin + SAVE_FACTOR * save + 2 * step + evaluation


def test_after_the_last_step_the_final_evaluation_must_fit(monkeypatch):
    """Else the next start does it: the last checkpoint is saved and nothing is trained again."""
    clock = Clock(monkeypatch)
    run = RunConfig(steps=2, eval_every_steps=1, time_limit_seconds=130, time_margin_seconds=10)
    decided = Stopping(StopRequest(), run, alone, finish_factor=4)
    clock.work(30)
    assert decided.after_step(1, 0.0) is Reason.NONE
    clock.work(30)
    assert decided.after_step(2, 0.0) is Reason.TIME_LIMIT, "70 s are left, 130 s are needed"


def test_a_run_without_evaluations_expects_the_last_one_to_take_its_steps(monkeypatch):
    """Nothing else is known of it; with none it would run into the limit."""
    clock = Clock(monkeypatch)
    run = RunConfig(steps=2, eval_every_steps=0, time_limit_seconds=130, time_margin_seconds=10)
    decided = Stopping(StopRequest(), run, alone, finish_factor=4)
    clock.work(600)  # a resume before the first step is no part of it
    decided.begin_step()
    clock.now_seconds = 1000.0
    decided.begin_step()
    clock.work(30)
    assert decided.after_step(1, 0.0) is Reason.NONE
    clock.work(30)
    assert decided.after_step(2, 0.0) is Reason.TIME_LIMIT, "70 s are left, 130 s are needed"


def test_a_signal_in_the_end_is_seen(monkeypatch):
    asked = StopRequest()
    decided = Stopping(asked, RunConfig(), alone, finish_factor=4)
    assert decided.agree() is Reason.NONE
    asked.reason = Reason.SIGUSR1
    assert decided.agree() is Reason.SIGUSR1


def test_the_end_of_a_job_before_this_start_is_ignored_with_a_note(monkeypatch, capsys):
    """A shell that outlived its job keeps SLURM_JOB_END_TIME; each start took a single step."""
    left_over = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1000"}
    monkeypatch.setattr(time, "time", lambda: 1001.0)
    assert job_end_seconds(left_over) is None
    assert capsys.readouterr().out.startswith("note: job 7 of SLURM_JOB_ID ended at 1970-01-01")
    monkeypatch.setattr(time, "time", lambda: 999.0)
    assert job_end_seconds(left_over) == 1000
    assert capsys.readouterr().out == ""


def test_the_end_of_a_job_is_read_or_asked_for(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    asked = []

    def squeue(answer):
        return lambda job: asked.append(job) or answer

    assert job_end_seconds({}, squeue("2026-01-02T03:04:05")) is None
    assert asked == [], "outside Slurm nobody is asked"
    stated = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1795334967"}
    assert job_end_seconds(stated, squeue("")) == 1795334967
    assert asked == []
    monkeypatch.setenv("TZ", "UTC-2")
    time.tzset()
    try:
        found = job_end_seconds({"SLURM_JOB_ID": "7"}, squeue("2026-01-02T03:04:05\n"))
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()
    assert (asked, found) == (["7"], 1767315845), "squeue writes local time"
    for answer in ("N/A", "NONE", "", "slurm_load_jobs error"):
        assert job_end_seconds({"SLURM_JOB_ID": "7"}, squeue(answer)) is None


def test_a_missing_squeue_is_no_limit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_end_seconds({"SLURM_JOB_ID": "7"}) is None
