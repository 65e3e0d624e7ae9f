"""Replay a run's order from its first row and compare it with every checkpoint and every file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_mode.checkpoint.folders import CHECKPOINTS_NAME, finished_checkpoints
from megatron_mode.checkpoint.manifest import Manifest, read_manifest
from megatron_mode.checkpoint.order_record import OrderRecord
from megatron_mode.checkpoint.resumable import refuse, setting_differences
from megatron_mode.checkpoint.source_files import check_file, sealed_files
from megatron_mode.errors import CheckpointError
from megatron_mode.mix.audit.order_document import OrderDocument
from megatron_mode.mix.order import Order
from megatron_mode.tokens.source.shards import Source


def verify_run(
    run: Path, document: OrderDocument, sources: Sequence[Source], *, show_progress: bool
) -> dict[str, Any]:
    """Compare an order with all checkpoints of a run, hash its sources; say what agreed.

    Raises CheckpointError or DataError naming the first thing that differs.
    """
    manifests = [read_manifest(path) for path in finished_checkpoints(run / CHECKPOINTS_NAME)]
    if not manifests:
        raise CheckpointError(
            f"{run} has no finished checkpoint under {CHECKPOINTS_NAME}/: name the folder of a run "
            "that saved one"
        )
    for manifest in manifests:
        refuse(manifest, setting_differences(manifest, document.settings).values())
    last, hidden = manifests[-1], None if show_progress else True
    with tqdm(total=last.step, desc="replay", unit="step", leave=False, disable=hidden) as bar:
        digest = replay(document.order, document.global_rows, manifests, bar.update)
    for source in sources:
        source.verify_index()
    files, size_bytes = sealed_files(sources, document.packed_whole, document.order.seq_len), 0
    with tqdm(desc="hash", unit="B", unit_scale=True, leave=False, disable=hidden) as bar:
        for path, expected in files.items():
            bytes_read = check_file(path, expected)
            bar.update(bytes_read)
            size_bytes += bytes_read
    return {
        "verified": str(run),
        "checkpoints": [manifest.step for manifest in manifests],
        "order_digest": digest,
        "skips": last.skips,
        "hashed_bytes": size_bytes,
    }


def replay(
    order: Order,
    global_rows: int,
    manifests: Sequence[Manifest],
    report: Callable[[int], object],
) -> str:
    """Chain the digest from row 0 and compare it at every checkpoint; return the last one."""
    record = OrderRecord({}, order.edits)
    for manifest in manifests:
        step = record.recent[-1][0]
        if [skip for skip in manifest.skips if skip < step] != record.skips:
            raise CheckpointError(
                f"the checkpoint of step {manifest.step} left out the updates of steps "
                f"{manifest.skips}, the one of step {step} those of {record.skips}: they are not "
                "of one run; name the run's own folder"
            )
        if manifest.step * global_rows > order.total_rows:
            raise CheckpointError(
                f"the checkpoint of step {manifest.step} is beyond the order's "
                f"{order.total_rows // global_rows} steps; name the config of the run"
            )
        for _ in record.follow(order, manifest.step, global_rows, manifest.skips):
            report(1)
        found, expected = record.digest.hex, manifest.order_digest
        if found != expected:
            raise CheckpointError(
                f"the rows replayed up to step {manifest.step} have digest {found[:12]}, but the "
                f"checkpoint has {expected[:12]}: the mix, the seed, the data or the program is "
                "not that of the run; restore it"
            )
    return record.digest.hex
