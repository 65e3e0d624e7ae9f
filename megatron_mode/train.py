"""Train: open the data, build the engine, resume, then load, step, report and save, in order."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_mode.atomic import write_whole
from megatron_mode.checkpoint.lock import run_lock
from megatron_mode.checkpoint.resume import resume
from megatron_mode.checkpoint.save import Checkpoints
from megatron_mode.checkpoint.source_files import DataCheck
from megatron_mode.config import Config, dump_config
from megatron_mode.engine.accelerators import accelerator_table
from megatron_mode.engine.build import build_engine, build_mesh, implementations, join_group
from megatron_mode.engine.schedule_cost import pipeline_line
from megatron_mode.engine.step import Engine
from megatron_mode.evaluate.held_out import evaluate_source
from megatron_mode.evaluate.valid import valid_metrics
from megatron_mode.finish import FINAL_ROWS_FACTOR, finish_run
from megatron_mode.mix.audit.forecast import warnings
from megatron_mode.mix.corpus import (
    Corpus,
    build_order,
    build_reader,
    build_train_reader,
    open_corpus,
    resolve_vocabulary,
)
from megatron_mode.mix.loader import Loader, StepBatch
from megatron_mode.mix.order import Order
from megatron_mode.mix.packing import rows_in_stream
from megatron_mode.mix.rows import RowReader
from megatron_mode.model.size import parameters
from megatron_mode.process.launch import Process
from megatron_mode.process.stopping import Reason, Stopping, StopRequest
from megatron_mode.process.watchdog import Watchdog
from megatron_mode.recovery import Recovery, tell_stall
from megatron_mode.report.step_metrics import StepTimer, metrics_line
from megatron_mode.report.writers import RunLog, write_environment, write_event


@dataclass(frozen=True)
class Data:
    """Hold what a run reads and where it writes; made by `open_data`."""

    config: Config
    folder: Path
    corpus: Corpus
    order: Order
    reader: RowReader


@dataclass(frozen=True)
class Run(Data):
    """Hold what the loop works with; made by `build_run`."""

    engine: Engine

    @property
    def reports(self) -> bool:
        """Tell whether this process prints and writes (rank 0)."""
        return self.engine.rank == 0


def train(config: Config, process: Process, request: StopRequest | None = None) -> Reason:
    """Train from the newest checkpoint to the end; return why it stopped before, saved, or NONE."""
    data = open_data(config)
    join_group(process, config.run.threads, config.health)
    say_stall = partial(tell_stall, data.folder)
    with (
        Watchdog(data.folder, config.health, say_stall) as watchdog,
        run_lock(data.folder, process),
    ):
        run = build_run(data, process)
        stopping = Stopping(
            request, run.config.run, run.engine.largest_over_ranks, finish_factor=FINAL_ROWS_FACTOR
        )
        stop, done = take_steps(run, stopping, watchdog)
        end = ""
        if not stop:
            stop, end = finish(run, stopping, watchdog)
        if run.reports:
            print(stopping.sentence(stop, done) if stop else end)
        dist.barrier()
    return stop


def take_steps(run: Run, stopping: Stopping, watchdog: Watchdog) -> tuple[Reason, int]:
    """Resume and take the steps that are left; return why they stopped early, and the last."""
    config, engine = run.config, run.engine
    checkpoints = Checkpoints(engine, run.folder, run.corpus, run.order, run.reader)
    watchdog.beat("the resume", is_long=True)
    data_check = DataCheck(run.folder, config, run.corpus)
    first_step, notes = resume(checkpoints)
    data_check.start()
    if run.reports:
        announce(run, first_step, notes)
    timer = StepTimer()
    stop, done = Reason.NONE, first_step
    recovery = Recovery(checkpoints, run.corpus, watchdog)
    stopping.begin_step()
    log = RunLog(run.folder, config.run.steps, first_step, reports=run.reports)
    with log, recovery.watch():
        for batch in recovery.steps(lambda step: steps(run, step), first_step):
            timer.start()
            result = engine.train_step(batch.step, batch.micro_batches)
            back_to = recovery.goes_back_to(batch, result)
            if back_to is not None:
                log.rewind(back_to)
                stopping.begin_step()
                continue
            left_out = result.verdict.is_left_out
            checkpoints.record.update(batch.step, batch.rows, left_out=left_out)
            done = batch.step + 1
            line = metrics_line(engine, run.order, batch, result, timer)
            line["checkpoint_stall_seconds"] = checkpoints.take_stall_seconds()
            if due(done, config.run.eval_every_steps) and done < config.run.steps:
                line.update(evaluate(run))
            log.write(line)
            checkpoints.check()
            data_check.check()
            stop = stopping.after_step(done, checkpoints.save_seconds)
            if stop or due(done, config.checkpoint.every_steps) or done == config.run.steps:
                checkpoints.save(done)
                stop = stopping.after_save(stop)
            if stop:
                break
            timer.stop()
        checkpoints.wait()
        if not stop:
            data_check.wait()
    return stop, done


def open_data(config: Config) -> Data:
    """Open the data and make the run folder: what is cheap to check, before anything is built."""
    corpus = open_corpus(config)
    config = resolve_vocabulary(config, corpus)
    order = build_order(config, corpus)
    reader = build_train_reader(config, corpus, order)
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    return Data(config, folder, corpus, order, reader)


def build_run(data: Data, process: Process) -> Run:
    """Build this rank's part of the model and its engine, in a group that has been joined."""
    layout = build_mesh(data.config, process.world_size)
    engine = build_engine(data.config, layout, data.corpus.vocabulary.vocab_size)
    return Run(**vars(data), engine=engine)


def announce(run: Run, first_step: int, notes: Sequence[str]) -> None:
    """Print what will run, once, and write it into the run folder."""
    config = run.config
    write_whole(run.folder / "config.yaml", dump_config(config))
    chosen = implementations(config)._replace(loss=run.engine.step_loss.mode_loss.implementation)
    layout = run.engine.layout._asdict()
    write_environment(run.folder, layout=layout, implementations=chosen._asdict())
    count = parameters(config.model)
    begin = f"resumes at step {first_step}" if first_step else "starts"
    print(
        f"{config.model.name}: {count.total / 1e6:.2f}M parameters "
        f"(mode head {count.mode_head:,}), {run.engine.layout}, "
        f"micro-batches of {config.batch.micro_rows} rows, {run.engine.accumulation_steps} a step\n"
        f"loss: {run.engine.step_loss.mode_loss.implementation}; {run.folder} {begin}"
    )
    if run.engine.layout.pipeline > 1:
        print(f"pipeline: {pipeline_line(config, run.engine.layout)}")
    print(accelerator_table(chosen))
    for note in notes:
        print(note)
        if note.startswith("WARNING"):
            write_event(run.folder, "checkpoint", note, "fallback")
    for warning in warnings(run.order):
        print(f"note: {warning}")
    for source in run.corpus.valid:
        if rows_in_stream(source.tokens, config.model.seq_len) == 0:
            print(f"note: held-out source '{source.name}' is shorter than one row: nothing is read")


def steps(run: Run, first_step: int) -> Generator[StepBatch, None, None]:
    """Give the remaining steps; ranks in the middle of the pipeline get them without tokens."""
    config, engine = run.config, run.engine
    global_rows = config.batch.global_rows
    if not engine.reads_data:
        ahead = run.order.steps(first_step, config.run.steps, global_rows)
        for step, rows in enumerate(ahead, start=first_step):
            yield StepBatch(step, [], rows)
        return
    loader = Loader(
        run.order,
        run.reader,
        global_rows=global_rows,
        micro_rows=config.batch.micro_rows,
        first_step=first_step,
        end_step=config.run.steps,
        reader_index=engine.at.data,
        readers=engine.layout.data,
        prefetch_steps=config.data.prefetch_steps,
        threads=config.data.workers,
        pin_memory=engine.device.type == "cuda",
    )
    with loader:
        yield from loader


def evaluate(run: Run) -> dict[str, object]:
    """Evaluate on every held-out source, on `run.eval_rows` rows each."""
    reader, rows = build_reader(run.config, run.corpus, run.corpus.valid), run.config.run.eval_rows
    sources = range(len(run.corpus.valid))
    return valid_metrics(
        [evaluate_source(run.engine, reader, index, rows, pieces=False) for index in sources]
    )


def finish(run: Run, stopping: Stopping, watchdog: Watchdog) -> tuple[Reason, str]:
    """Evaluate, write summary and report; return the figures that one asks for first.

    A run that is asked to stop meanwhile leaves the report to its next start, and returns why.
    """

    def asked_to_stop() -> Reason:
        watchdog.beat("the final report", is_long=True)
        return stopping.agree()

    summary, stop = finish_run(run.engine, run.folder, run.corpus, asked_to_stop)
    if stop or not run.reports:
        return stop, ""
    keys = ("valid_lm_loss", "unigram_entropy", "valid_mode_auroc", "valid_mode_auroc_chat")
    figures = [f"{key} {summary[key]:.4f}" for key in keys if summary.get(key) is not None]
    said = ", ".join(figures) or "no held-out figures: mix.valid.sources is empty or too short"
    return stop, f"{said}\nreport: {summary['report']}"


def due(step: int, every_steps: int) -> bool:
    """Tell whether something that happens every so many steps happens after step `step`."""
    return every_steps > 0 and step % every_steps == 0
