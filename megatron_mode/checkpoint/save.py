"""Save checkpoints: copy the state aside, write it in the background, publish it when it is whole.

Every rank writes its own files on a thread and tells rank 0 their digests through the store that
the group met at. Rank 0's thread then writes the manifest, renames the folder and lets old ones go.
Training goes on meanwhile; the next save first waits for this one to end.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_mode.checkpoint.files import FileRecord, copy_durably
from megatron_mode.checkpoint.folders import (
    CHECKPOINTS_NAME,
    PARTIAL,
    prune,
    publish,
    tag_of,
)
from megatron_mode.checkpoint.manifest import TOKENIZER_NAME, Manifest, write_manifest
from megatron_mode.checkpoint.order_record import OrderRecord, make_manifest
from megatron_mode.checkpoint.probe import Probe
from megatron_mode.checkpoint.writer import use_writer
from megatron_mode.engine.step import Engine
from megatron_mode.errors import CheckpointError, refusal

REMEDY = "start the run again, it goes on from the checkpoint before this one"
LONGEST_PAUSE_SECONDS = 0.25
# Ranks make their `Checkpoints` alike, so that each gets the same number on all of them.
RUNS_OF_GROUP = itertools.count()


class Checkpoints:
    """Save the checkpoints of a run, one at a time.

    `save_seconds` is, on rank 0, how long the last one took until it was whole, 0.0 before that.
    """

    def __init__(self, engine: Engine, run_dir: Path, tokenizer: Path, probe: Probe) -> None:
        self.save_seconds = 0.0
        self._stall_seconds = 0.0
        self._engine, self._tokenizer, self._probe = engine, tokenizer, probe
        self._checkpoints = run_dir / CHECKPOINTS_NAME
        self._writer = use_writer(engine)
        self._store = dist.distributed_c10d._get_default_store()
        self._saves, self._run = 0, next(RUNS_OF_GROUP)
        self._failure: str | None = None
        self._began_seconds = 0.0

    def save(self, step: int, record: OrderRecord) -> None:
        """Save the state after `step` steps; returns when the state is copied.

        Without `checkpoint.asynchronous` it returns when the checkpoint is whole. Raises
        CheckpointError where this or the last checkpoint cannot be written. All ranks call it.
        """
        begin = time.perf_counter()
        self.wait()
        self._began_seconds = time.perf_counter()
        manifest = make_manifest(self._engine, record, step, self._probe.measure(self._engine))
        self._saves += 1
        partial = self._checkpoints / (tag_of(step) + PARTIAL)
        try:
            if self._engine.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            dist.barrier()
            self._engine.deepspeed.save_checkpoint(
                str(self._checkpoints),
                tag=partial.name,
                client_state=random_state(),
                save_latest=False,
            )
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(failure_of(partial, error)) from error
        self._writer.write(
            lambda files, error: self._end_of_writing(partial, manifest, files, error)
        )
        if not self._engine.config.checkpoint.asynchronous:
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
        """Wait until the last checkpoint is whole; CheckpointError on all ranks if it failed."""
        if self._saves:
            self._failure = self._await(self._key("end")).decode() or None
        self.check()

    def _key(self, name: object) -> str:
        return f"checkpoint/{self._run}/{self._saves}/{name}"

    def _end_of_writing(
        self,
        partial: Path,
        manifest: Manifest,
        files: dict[str, FileRecord],
        error: Exception | None,
    ) -> None:
        """Tell rank 0 what was written; rank 0 makes a checkpoint of it. Runs on the thread."""
        self._failure = failure = failure_of(partial, error) if error else None
        records = {name: asdict(record) for name, record in files.items()}
        told = json.dumps({"files": records, "failure": failure})
        try:
            self._store.set(self._key(self._engine.rank), told)
        except RuntimeError as error:  # rank 0 is gone, and the run with it
            self._failure = failure_of(partial, error)
            return
        if self._engine.rank == 0:
            try:
                self._finish(partial, manifest)
            except Exception as error:  # told by the training loop, as above
                self._failure = failure_of(partial, error)
                shutil.rmtree(partial, ignore_errors=True)
            self.save_seconds = time.perf_counter() - self._began_seconds
            self._store.set(self._key("end"), self._failure or "")

    def _finish(self, partial: Path, manifest: Manifest) -> None:
        files: dict[str, FileRecord] = {}
        failures = []
        for rank in range(self._engine.layout.world_size):
            told = json.loads(self._await(self._key(rank)))
            self._store.delete_key(self._key(rank))  # else they pile up in rank 0's memory
            files |= {name: FileRecord(**record) for name, record in told["files"].items()}
            failures += [told["failure"]] if told["failure"] else []
        if failures:
            raise CheckpointError(failures[0])
        if self._tokenizer.exists():  # a corpus by Megatron's own tools has none
            files[TOKENIZER_NAME] = copy_durably(self._tokenizer, partial / TOKENIZER_NAME)
        write_manifest(partial, manifest.with_files(files))
        check_sizes(partial, files)
        published = publish(partial)
        settings = self._engine.config.checkpoint
        try:
            prune(published, settings.keep, settings.permanent_every_steps)
        except OSError as error:  # the checkpoint is whole all the same
            tqdm.write(f"note: an old checkpoint could not be deleted: {error}", file=sys.stderr)

    def _await(self, key: str) -> bytes:
        pause_seconds = 0.001
        while not self._store.check([key]):
            time.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
        return bytes(self._store.get(key))


def check_sizes(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Raise CheckpointError where a file that was just written is gone, by whatever hand."""
    for name, record in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != record.bytes:
            raise CheckpointError(
                f"{path} is no longer what was just written: something else changes {folder.parent}"
                f"; let one run alone work there, and {REMEDY}"
            )


def failure_of(partial: Path, error: Exception) -> str:
    """Say what became of the checkpoint that was being written."""
    if isinstance(error, CheckpointError):
        return str(error)
    folder = partial.with_suffix("")
    if isinstance(error, OSError):
        return refusal(folder, error, REMEDY)
    return f"{folder} cannot be written ({type(error).__name__}: {error}): {REMEDY}"


def random_state() -> dict[str, torch.Tensor]:
    """Return the generators' states; no layer draws from them today, resume restores them."""
    state = {"cpu_generator": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_generator"] = torch.cuda.get_rng_state()
    return state
