from __future__ import annotations

import json
import math
import struct
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mode.report.writers import (
    RunLog,
    _to_json,
    silence_tensorboard,
    write_environment,
    write_json,
)


def lines_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def write_steps(run_dir, first_step, steps):
    with RunLog(run_dir, 10, first_step) as writer:
        for step in steps:
            writer.write({"step": step, "tokens_seen": step * 64, "loss": 1 / (step + 1)})


def test_a_full_disk_fails_tensorboard_in_silence(capsys, monkeypatch):
    """Its thread fails first; the training loop raises the same."""
    said = []
    monkeypatch.setattr(threading, "excepthook", lambda failed: said.append(failed.exc_type))
    silence_tensorboard()

    class Writer(threading.Thread):
        def __init__(self, error):
            super().__init__()
            self.error = error

        def run(self):
            raise self.error

    for module, error in (
        ("tensorboard.summary.writer.event_file_writer", OSError(28, "No space left on device")),
        ("tensorboard.summary.writer.event_file_writer", ValueError("a bug")),
        ("megatron_mode.mix.loader", OSError(28, "No space left on device")),
    ):
        Writer.__module__ = module
        thread = Writer(error)
        thread.start()
        thread.join()
    assert said == [ValueError, OSError]
    assert capsys.readouterr().err == ""


@given(st.floats())
def test_floats_keep_every_bit_and_json_stays_valid(value):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    read = json.loads(_to_json({"loss": value}), parse_constant=refuse)["loss"]
    if math.isfinite(value):
        assert struct.pack("<d", read) == struct.pack("<d", value)
    else:
        assert read is None


def test_a_line_can_be_read_before_the_next_is_written(tmp_path):
    with RunLog(tmp_path, 10, 0) as writer:
        writer.write({"step": 1, "loss": 0.1 + 0.2, "mode_auroc": None, "grad_norm": math.inf})
        assert lines_of(tmp_path) == [
            {"step": 1, "loss": 0.30000000000000004, "mode_auroc": None, "grad_norm": None}
        ]


def test_a_metric_without_an_entry_is_refused(tmp_path):
    with RunLog(tmp_path, 10, 0) as writer:
        with pytest.raises(AssertionError, match="no entry for \\['surprise'\\]"):
            writer.write({"step": 1, "surprise": 1.0})
        assert lines_of(tmp_path) == []


def test_resume_drops_later_lines_and_a_torn_one(tmp_path):
    write_steps(tmp_path, 0, range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    write_steps(tmp_path, 4, range(5, 7))
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_torn_line_of_a_kept_step_goes_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    write_steps(tmp_path, 2, [3])
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 3]


def test_a_fresh_start_keeps_nothing_of_a_start_that_reached_no_checkpoint(tmp_path):
    write_steps(tmp_path, 0, range(1, 4))
    write_steps(tmp_path, 0, range(1, 3))
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_resumed_bytes_equal_the_uninterrupted_ones(tmp_path):
    write_steps(tmp_path / "whole", 0, range(1, 11))
    write_steps(tmp_path / "cut", 0, range(1, 8))
    write_steps(tmp_path / "cut", 5, range(6, 11))
    whole, cut = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_tensorboard_shows_train_and_valid_and_purges_on_resume(tmp_path):
    write_steps(tmp_path, 0, range(1, 8))
    # TensorBoard reads files in the order of the second in their names: let this one be older.
    (first,) = (tmp_path / "tb").iterdir()
    first.rename(first.with_name("events.out.tfevents.1000000000.first"))
    with RunLog(tmp_path, 10, 4) as writer:
        for step in (5, 6):
            writer.write({"step": step, "loss": 9.0, "valid_mode_auroc": 0.5, "mode_auroc": None})
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    tags = set(events.Tags()["scalars"])
    assert tags == {"train/tokens_seen", "train/loss", "valid/mode_auroc"}
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("train/loss")] == [
        *((step, round(1 / (step + 1), 3)) for step in range(1, 5)),
        (5, 9.0),
        (6, 9.0),
    ]


def test_summary_is_never_seen_half_written(tmp_path):
    sizes = [5_000, 50_000]
    write_json(tmp_path / "summary.json", {"values": [0] * sizes[0]})
    stop, seen = threading.Event(), set()

    def read():
        while not stop.is_set():
            try:
                seen.add(len(json.loads((tmp_path / "summary.json").read_text())["values"]))
            except ValueError:
                seen.add("half a file")

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(20):
        write_json(tmp_path / "summary.json", {"values": [0] * sizes[turn % 2]})
    stop.set()
    reader.join()
    assert seen <= set(sizes)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_failed_summary_leaves_the_old_one_alone(tmp_path):
    write_json(tmp_path / "summary.json", {"valid": {"books": {"lm_loss": math.nan}}})
    with pytest.raises(TypeError):
        write_json(tmp_path / "summary.json", {"bad": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "valid": {"books": {"lm_loss": None}}
    }


def test_environment_names_versions_and_extras(tmp_path):
    write_environment(tmp_path, world_size=4)
    written = json.loads((tmp_path / "environment.json").read_text())
    assert written["world_size"] == 4
    assert written["packages"]["torch"].startswith("2.")
    assert written["cpu_cores"] >= 1


def test_a_run_that_goes_back_drops_the_later_lines(tmp_path):
    with RunLog(tmp_path, 10, 0) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "loss": 1.0})
        log.rewind(1)
        log.write({"step": 2, "loss": 9.0})
    assert lines_of(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 9.0}]


def test_a_rank_that_does_not_report_writes_nothing(tmp_path, capsys):
    with RunLog(tmp_path / "run", 10, 0, reports=False) as log:
        log.write({"step": 1, "loss": 1.0})
        log.rewind(0)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err == ""
