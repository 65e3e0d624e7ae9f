"""Save checkpoints: copy the state aside, write it in the background, publish it when complete.

Every rank writes its own files on a thread and reports their digests to rank 0 through the store
that the group met at. Rank 0's thread then writes the manifest, renames the folder and prunes.
Training continues meanwhile; the next save first waits for this one to end.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_mode.checkpoint.files import FileRecord, Records, copy_durably, save_tensors
from megatron_mode.checkpoint.folders import CHECKPOINTS_NAME, PARTIAL, prune, publish, tag_of
from megatron_mode.checkpoint.manifest import TOKENIZER_NAME, Manifest, write_sealed
from megatron_mode.checkpoint.order_record import OrderRecord
from megatron_mode.checkpoint.probe import Probe
from megatron_mode.checkpoint.writer import use_writer
from megatron_mode.config import Config
from megatron_mode.engine.build import choose_dtype
from megatron_mode.engine.step import Engine
from megatron_mode.errors import CheckpointError, refusal
from megatron_mode.mix.corpus import Corpus
from megatron_mode.mix.order import Order
from megatron_mode.mix.rows import RowReader

REMEDY = "start the run again, it continues from the checkpoint before this one"
LONGEST_PAUSE_SECONDS = 0.25
PACKAGES = ("torch", "deepspeed", "megatron-core", "megatron-mode")
# Ranks make their `Checkpoints` alike, so that each gets the same number on all of them.
RUNS_OF_GROUP = itertools.count()


class Checkpoints:
    """Save the checkpoints of a run, one at a time.

    `record` and `probe` are what they say of the run; `save_seconds` is, on rank 0, how long the
    last one took until it was complete, 0.0 before that.
    """

    def __init__(
        self, engine: Engine, run_dir: Path, corpus: Corpus, order: Order, reader: RowReader
    ) -> None:
        self.engine, self.order, self.folder = engine, order, run_dir / CHECKPOINTS_NAME
        self.record = OrderRecord.start(engine.config, corpus, order)
        self.probe = Probe(order, reader, corpus.read_sources)
        self.save_seconds = 0.0
        self._stall_seconds = 0.0
        self._tokenizer = corpus.root / TOKENIZER_NAME
        self._writer = use_writer(engine)
        self._store = dist.distributed_c10d._get_default_store()
        self._saves, self._run = 0, next(RUNS_OF_GROUP)
        self._failure: str | None = None
        self._began_seconds = 0.0

    def save(self, step: int) -> None:
        """Save the state after `step` steps; returns when the state is copied.

        Without `checkpoint.asynchronous` it returns when the checkpoint is complete. Raises
        CheckpointError where this or the last checkpoint cannot be written. All ranks call it.
        """
        begin = time.perf_counter()
        self.wait()
        self._began_seconds = time.perf_counter()
        manifest = self._describe(step)
        self._saves += 1
        partial = self.folder / (tag_of(step) + PARTIAL)
        try:
            if self.engine.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            dist.barrier()
            self.engine.deepspeed.save_checkpoint(
                str(self.folder),
                tag=partial.name,
                client_state=random_state(),
                save_latest=False,
            )
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(failure_of(partial, error)) from error
        arguments = (partial, manifest, self._writer.take_states())
        Thread(target=self._write, args=arguments, name="checkpoint", daemon=True).start()
        if not self.engine.config.checkpoint.asynchronous:
            self.wait()
        self._stall_seconds += time.perf_counter() - begin

    def take_stall_seconds(self) -> float:
        """Return how long training stood still for checkpoints since this was last asked."""
        taken, self._stall_seconds = self._stall_seconds, 0.0
        return taken

    def check(self) -> None:
        """Raise CheckpointError where this rank knows that the last checkpoint failed."""
        if self._failure:
            raise CheckpointError(self._failure)

    def wait(self) -> None:
        """Wait until the last checkpoint is complete; CheckpointError on all ranks if it failed."""
        if self._saves:
            self._failure = self._await(self._key("end")).decode() or None
        self.check()

    def _describe(self, step: int) -> Manifest:
        """Describe the state after `step` steps and measure the probe; no files yet."""
        engine, config, record = self.engine, self.engine.config, self.record
        return Manifest(
            step=step,
            tokens_seen=step * config.batch.global_rows * config.model.seq_len,
            config=config.model_dump(mode="json"),
            layout=engine.layout._asdict(),
            precision=precision_name(config),
            order=record.settings,
            order_digest=record.digest.hex,
            recent_digests=list(record.recent),
            blocked_shares=(engine.blocked_shares.lm, engine.blocked_shares.mode),
            versions={name: importlib.metadata.version(name) for name in PACKAGES},
            probe=self.probe.measure(engine),
            skips=list(record.skips),
            recent_losses=list(engine.judge.losses),
        )

    def _write(self, partial: Path, manifest: Manifest, states: dict[Path, Any]) -> None:
        """Write this rank's files and report them; rank 0 makes a checkpoint of all ranks' files.

        Runs on the thread. The training loop raises the failure when it asks for it.
        """
        files: Records = {}
        try:
            for path, state in states.items():
                files[path.name] = save_tensors(state, path)
        except Exception as error:
            self._failure = failure_of(partial, error)
        records = {name: asdict(record) for name, record in files.items()}
        report = json.dumps({"files": records, "failure": self._failure})
        try:
            self._store.set(self._key(self.engine.rank), report)
        except RuntimeError as error:  # rank 0 is gone, and the run with it
            self._failure = failure_of(partial, error)
            return
        if self.engine.rank == 0:
            try:
                self._finish(partial, manifest)
            except Exception as error:
                self._failure = failure_of(partial, error)
                shutil.rmtree(partial, ignore_errors=True)
            self.save_seconds = time.perf_counter() - self._began_seconds
            self._store.set(self._key("end"), self._failure or "")

    def _finish(self, partial: Path, manifest: Manifest) -> None:
        """Collect what the ranks report, write the manifest, publish the folder and prune."""
        files: Records = {}
        failures = []
        for rank in range(self.engine.layout.world_size):
            report = json.loads(self._await(self._key(rank)))
            self._store.delete_key(self._key(rank))  # else they pile up in rank 0's memory
            files |= {name: FileRecord(**record) for name, record in report["files"].items()}
            failures += [report["failure"]] if report["failure"] else []
        if failures:
            raise CheckpointError(failures[0])
        if self._tokenizer.exists():  # a corpus by Megatron's own tools has none
            files[TOKENIZER_NAME] = copy_durably(self._tokenizer, partial / TOKENIZER_NAME)
        write_sealed(partial, asdict(replace(manifest, files=dict(sorted(files.items())))))
        published = publish(partial)
        settings = self.engine.config.checkpoint
        try:
            prune(published, settings.keep, settings.permanent_every_steps)
        except OSError as error:  # the checkpoint is complete all the same
            tqdm.write(f"note: an old checkpoint could not be deleted: {error}", file=sys.stderr)

    def _key(self, name: object) -> str:
        return f"checkpoint/{self._run}/{self._saves}/{name}"

    def _await(self, key: str) -> bytes:
        pause_seconds = 0.001
        while not self._store.check([key]):
            time.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
        return bytes(self._store.get(key))


def precision_name(config: Config) -> str:
    """Return the precision that `auto` stands for on this machine."""
    return "bf16" if choose_dtype(config) == torch.bfloat16 else "fp32"


def random_state() -> dict[str, torch.Tensor]:
    """Return the generators' states; no layer draws from them today, a resume restores them."""
    state = {"cpu_generator": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_generator"] = torch.cuda.get_rng_state()
    return state


def failure_of(partial: Path, error: Exception) -> str:
    """Say what became of the checkpoint that was being written."""
    folder = partial.with_suffix("")
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError):
        return refusal(folder, error, REMEDY)
    return f"{folder} cannot be written ({type(error).__name__}: {error}): {REMEDY}"
