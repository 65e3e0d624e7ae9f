"""Replay a run's order from its first row and hold it against every checkpoint and every file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from megatron_mode.checkpoint.folders import CHECKPOINTS_NAME, finished_checkpoints
from megatron_mode.checkpoint.manifest import Manifest, read_manifest
from megatron_mode.checkpoint.source_files import check_file, sealed_files
from megatron_mode.errors import CheckpointError
from megatron_mode.mix.digest import OrderDigest
from megatron_mode.mix.order import Order
from megatron_mode.tokens.source.shards import Source

MOST_NAMED = 6

Report = Callable[[int], object]


def find_manifests(run: Path) -> list[Manifest]:
    """Read the manifests of a run's finished checkpoints, oldest first."""
    found = finished_checkpoints(run / CHECKPOINTS_NAME)
    if not found:
        raise CheckpointError(
            f"{run} has no finished checkpoint under {CHECKPOINTS_NAME}/: name the folder of a run "
            "that saved one"
        )
    return [read_manifest(path) for path in found]


def check_settings(manifest: Manifest, settings: Mapping[str, Any]) -> None:
    """Raise CheckpointError naming the settings of the order that differ from a checkpoint's."""
    found = list(setting_differences(manifest, settings).values())
    differing = found[:MOST_NAMED]
    if len(found) > MOST_NAMED:
        differing.append(f"and {len(found) - MOST_NAMED} more")
    if differing:
        raise CheckpointError(
            f"the order of the data differs from that of the checkpoint at step "
            f"{manifest.step}: {'; '.join(differing)} -- restore these or start a new run.dir"
        )


def setting_differences(manifest: Manifest, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return a sentence for each setting of the order that differs from a checkpoint's."""
    saved = manifest.order
    return {
        key: _difference(key, settings.get(key), saved.get(key))
        for key in sorted(saved.keys() | settings.keys())
        if saved.get(key) != settings.get(key)
    }


def _difference(key: str, given: Any, saved: Any) -> str:
    """Name both values; of content digests only the files that differ."""
    if isinstance(given, Mapping) and isinstance(saved, Mapping):
        files = [name for name in sorted({*given, *saved}) if given.get(name) != saved.get(name)]
        return f"{key} is not that of the checkpoint ({', '.join(files)})"
    return f"{key} is {given!r} but the checkpoint has {saved!r}"


def replay(order: Order, global_rows: int, manifests: Sequence[Manifest], report: Report) -> str:
    """Chain the digest from row 0 on and compare it at every checkpoint; return the last one."""
    digest, step, skips = OrderDigest(), 0, list[int]()
    for manifest in manifests:
        if [skip for skip in manifest.skips if skip < step] != skips:
            raise CheckpointError(
                f"the checkpoint of step {manifest.step} left out the updates of steps "
                f"{manifest.skips}, the one of step {step} those of {skips}: they are not of one "
                "run; name the run's own folder"
            )
        if manifest.step * global_rows > order.total_rows:
            raise CheckpointError(
                f"the checkpoint of step {manifest.step} lies beyond the order's "
                f"{order.total_rows // global_rows} steps; name the config of the run"
            )
        ahead = order.steps(step, manifest.step, global_rows)
        for number, rows in enumerate(ahead, start=step):
            digest.update(rows, order.edits, left_out=number in manifest.skips)
            report(1)
        step, skips = manifest.step, manifest.skips
        if digest.hex != manifest.order_digest:
            raise CheckpointError(
                f"the rows replayed up to step {step} have digest {digest.hex[:12]}, but the "
                f"checkpoint has {manifest.order_digest[:12]}: the mix, the seed, the data or the "
                "program is not that of the run; restore it"
            )
    return digest.hex


def check_source_files(
    sources: Sequence[Source], packed_whole: AbstractSet[str], seq_len: int, report: Report
) -> int:
    """Hash every file of the sources and return the bytes read.

    Row tables count where `packed_whole` names their source. Raises DataError naming the file that
    is not what NAME.json says, or the index that is wrong in itself.
    """
    total = 0
    for source in sources:
        source.verify_index()
    for path, digest in sealed_files(sources, packed_whole, seq_len).items():
        size_bytes = check_file(path, digest)
        report(size_bytes)
        total += size_bytes
    return total
