"""Save a checkpoint with all ranks, then let old ones go."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mode.checkpoint.manifest import (
    CHECKPOINTS_NAME,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    tag_of,
    write_latest,
    write_manifest,
)
from megatron_mode.engine.step import Engine
from megatron_mode.errors import CheckpointError

# torch's writers say a failed write so; the last where it fails while the file is closed.
TORN_FILE_SIGNS = ("PytorchStreamWriter", "inline_container", "iostream error")


def save_checkpoint(engine: Engine, run_dir: Path, manifest: Manifest, tokenizer: Path) -> Path:
    """Write `step-NNNNNNNN` with every rank's share; rank 0 finishes it and keeps the newest.

    The tokenizer goes along, so that a checkpoint can be used on its own. The manifest comes last:
    a folder without it is unfinished and never resumed from.
    """
    checkpoints = run_dir / CHECKPOINTS_NAME
    folder = checkpoints / tag_of(manifest.step)
    if engine.rank == 0:
        checkpoints.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    with told_in_a_sentence(folder):
        engine.deepspeed.save_checkpoint(
            str(checkpoints), tag=folder.name, client_state=random_state(), save_latest=False
        )
    dist.barrier()
    if engine.rank == 0:
        with told_in_a_sentence(folder):
            if tokenizer.exists():  # a corpus by Megatron's own tools has none
                shutil.copyfile(tokenizer, folder / TOKENIZER_NAME)
            write_manifest(folder, manifest)
            write_latest(checkpoints, manifest.step)
        prune(checkpoints, engine.config.checkpoint.keep)
    dist.barrier()
    return folder


@contextmanager
def told_in_a_sentence(folder: Path) -> Iterator[None]:
    """Turn what torch raises on a full disk, a RuntimeError, into CheckpointError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        is_torn_file = any(sign in str(error) for sign in TORN_FILE_SIGNS)
        if isinstance(error, RuntimeError) and not is_torn_file:
            raise  # a peer is gone, or a bug of ours
        free_bytes = shutil.disk_usage(folder.parent).free
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(
            f"{folder} cannot be written: the disk has {free_bytes} bytes left; free space and "
            "start the run again, it goes on from the checkpoint before this one"
        ) from error


def random_state() -> dict[str, torch.Tensor]:
    """Return the generators' states; no layer draws from them today, resume restores them."""
    state = {"cpu_generator": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_generator"] = torch.cuda.get_rng_state()
    return state


def prune(checkpoints: Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` finished checkpoints, and unfinished ones before them."""
    finished = sorted(path.parent for path in checkpoints.glob(f"step-*/{MANIFEST_NAME}"))
    kept = set(finished[-keep:])
    newest = finished[-1] if finished else None
    dropped = [
        folder
        for folder in sorted(checkpoints.glob("step-*"))
        if newest is not None and folder not in kept and folder < newest
    ]
    for folder in dropped:
        # The manifest goes first, so that a folder half deleted counts as unfinished.
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    return dropped
