"""Turn a checkpoint into a universal folder beside it, from which any layout can continue.

`step-NNNNNNNN-universal` is in DeepSpeed's universal format, which no layout cuts: each complete
parameter is in `zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt`, what is common in
`zero/optimizer_state.pt` and `mp_rank_KK_model_states.pt`. DeepSpeed's loader cuts them for any
layout.

It is written under a `.partial` name, sealed by a manifest with the digest of every file, and
renamed: a kill leaves nothing that is taken for one. The manifest states the digest of the manifest
it was made from and is used for no other checkpoint. The checkpoint itself is only read.

The folder is the one that `deepspeed.checkpoint.ds_to_universal` makes, to the last byte of every
tensor (a test compares them), but not made by it: it joins a parameter that matches none of its
patterns along dimension 0 without a word, writes every fragment of every rank to a file of its own
first, and takes the folder's name for a regular expression.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from deepspeed.checkpoint.constants import CAT_DIM, PARAM, PARAM_N_SUB_PARAMS
from pydantic import TypeAdapter
from torch.utils.serialization import config as serialization
from tqdm import tqdm

from megatron_mode.atomic import rename_durably, sync_folder
from megatron_mode.checkpoint.collective import agreed, from_rank_0, gather
from megatron_mode.checkpoint.files import (
    Records,
    copy_durably,
    describe,
    save_tensors,
    shared_differences,
    weights_only,
)
from megatron_mode.checkpoint.folders import PARTIAL, remove, universal_of
from megatron_mode.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    read_sealed,
    saved_config,
    write_sealed,
)
from megatron_mode.checkpoint.reshard.native import STATES, NativeCheckpoint
from megatron_mode.cost.topology import Layout
from megatron_mode.engine.pipeline import checkpoint_parameters
from megatron_mode.engine.step import Engine
from megatron_mode.errors import CheckpointError, refusal
from megatron_mode.model.sharding import Whole, whole_parameters

FORMAT = "universal 1"
ZERO, COMMON, STEP = "zero", "optimizer_state.pt", "step"
# Of each rank where all share the work: one reads while the other writes.
SHARED_THREADS = 2


@dataclass(frozen=True)
class UniversalManifest:
    """State what a universal folder holds and what it was made from."""

    source: str
    source_digest: str
    layout: dict[str, int]
    parameters: dict[str, Whole]
    files: Records
    format: str = FORMAT


_ADAPTER = TypeAdapter(UniversalManifest)


def cut_of(engine: Engine) -> str:
    """Name what decides which parts a rank of this run holds: the layout and the schedule."""
    return f"{engine.layout} ({engine.config.parallel.schedule})"


def saved_cut(manifest: Manifest) -> str:
    """Name the same of the run that saved a checkpoint."""
    schedule = manifest.config["parallel"].get("schedule", "1f1b")
    return f"{Layout(**manifest.layout)} ({schedule})"


def universal_for(engine: Engine, source: Path, manifest: Manifest) -> Path:
    """Return an intact universal folder of a checkpoint whose ranks held other parts.

    All ranks call it. One that is there is checked and taken; else `checkpoint.reshard` decides.
    Raises CheckpointError naming both layouts and the command that makes one.
    """
    folder, found = universal_of(source), from_rank_0(lambda: universal_manifest(source))
    if found is None or shared_differences(folder, found.files):
        if engine.config.checkpoint.reshard == "never":
            to = f"tensor={engine.layout.tensor},pipeline={engine.layout.pipeline}"
            raise CheckpointError(
                f"{source} was saved at {saved_cut(manifest)}, this run is at {cut_of(engine)}: "
                "while checkpoint.reshard is never it needs the saved layout; set "
                "checkpoint.reshard=auto, or make it fit with `megatron-mode reshard "
                f"{source.parent.parent} --to {to}`"
            )
        found = make_universal(source, manifest, SHARED_THREADS, tensor=engine.layout.tensor)
    mine = whole_parameters(engine.deepspeed.module, engine.layout.tensor)
    check_parameters(mine, found.parameters, folder)
    return folder


def universal_manifest(source: Path) -> UniversalManifest | None:
    """Return the manifest of a checkpoint's universal folder; None where there is none of it.

    A folder that is damaged or was made from another checkpoint of the same step is none.
    """
    try:
        found = _ADAPTER.validate_json(read_sealed(universal_of(source)), strict=True)
    except (CheckpointError, ValueError, RecursionError):
        return None
    needed = {f"{ZERO}/{name}/{state}.pt" for name in found.parameters for state in (*STATES, STEP)}
    if not {f"{ZERO}/{COMMON}", *needed} <= found.files.keys():
        return None
    made_from = (FORMAT, describe(source / MANIFEST_NAME).sha256)
    return found if (found.format, found.source_digest) == made_from else None


def make_universal(
    source: Path, manifest: Manifest, threads: int, *, tensor: int = 1, show_progress: bool = False
) -> UniversalManifest:
    """Make the universal folder with all ranks, each writing a share; all ranks call it.

    `tensor` is this run's tensor-parallel size. Raises CheckpointError on every rank where files do
    not hold what the manifest says or the disk is full.
    """
    folder = universal_of(source)
    partial = folder.with_name(folder.name + PARTIAL)
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()

    try:
        from_rank_0(begin)
        with agreed(), weights_only():
            wholes = checkpoint_parameters(saved_config(manifest, source).model, tensor)
            native = NativeCheckpoint(source, Layout(**manifest.layout), wholes)
            names = share_of(native.names, rank, ranks)
            records = write_common(native, partial) if rank == 0 else {}
            written = write_parameters(native, partial, names, threads)
            for some in tqdm(
                written, total=len(names), unit="parameter", leave=False, disable=not show_progress
            ):
                records |= some
        files = {name: record for share in gather(records) for name, record in share.items()}
        return from_rank_0(lambda: _seal(source, native, partial, files))
    except BaseException as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            remedy = f"try again, {source.name} is as it was"
            raise CheckpointError(refusal(folder, error, remedy)) from error
        raise


def share_of(names: Sequence[str], index: int, count: int) -> Sequence[str]:
    """Return the names that process `index` of `count` writes, neighbours together."""
    return names[index * len(names) // count : (index + 1) * len(names) // count]


def write_common(source: NativeCheckpoint, target: Path) -> Records:
    """Write what is not a parameter; return the records."""
    (target / ZERO).mkdir(parents=True, exist_ok=True)
    path = target / ZERO / COMMON
    records = {f"{ZERO}/{COMMON}": save_tensors(source.common_state(), path)}
    for file in source.model_files():
        records[file.name] = copy_durably(file, target / file.name)
    return records


def write_parameters(
    source: NativeCheckpoint, target: Path, names: Sequence[str], threads: int
) -> Iterator[Records]:
    """Write the named parameters, some at a time; yield each one's records by path below target.

    A thread holds one state of one complete parameter at a time.
    """

    def write(name: str) -> Records:
        folder = target / ZERO / name
        folder.mkdir(parents=True)
        cut = source.wholes[name].cut
        # In the words of DeepSpeed's loader, which by default cuts nothing of equal shape.
        fields = {} if cut is None else {CAT_DIM: cut.dim}
        fields |= {PARAM_N_SUB_PARAMS: cut.blocks} if cut is not None and cut.blocks > 1 else {}
        records = {
            state: save_tensors({PARAM: source.read(name, state), **fields}, folder / f"{state}.pt")
            for state in STATES
        }
        records[STEP] = save_tensors(source.step(name), folder / f"{STEP}.pt")
        return {f"{ZERO}/{name}/{state}.pt": record for state, record in records.items()}

    with ThreadPoolExecutor(threads, thread_name_prefix="reshard") as pool:
        try:
            yield from pool.map(write, names)
        finally:
            pool.shutdown(cancel_futures=True)


def _seal(
    source: Path, native: NativeCheckpoint, partial: Path, files: Records
) -> UniversalManifest:
    """Seal what was written, flush the names of all files, and give the folder its name."""
    manifest = UniversalManifest(
        source=source.name,
        source_digest=describe(source / MANIFEST_NAME).sha256,
        layout=native.layout._asdict(),
        parameters=dict(native.wholes),
        files=dict(sorted(files.items())),
    )
    for folder in (*(path for path in (partial / ZERO).iterdir() if path.is_dir()), partial / ZERO):
        sync_folder(folder)
    write_sealed(partial, asdict(manifest))
    remove(universal_of(source))
    rename_durably(partial, universal_of(source))
    return manifest


def check_parameters(mine: Mapping[str, Whole], wholes: Mapping[str, Whole], where: Path) -> None:
    """Raise CheckpointError where a rank's parameters are not parts of those of a folder."""
    for name, whole in mine.items():
        saved = wholes.get(name)
        if saved != whole:
            raise CheckpointError(
                f"{where} holds {name} as {saved}, the model that is to load it cuts {whole}: the "
                "checkpoint is of another model or version; name another"
            )


@contextmanager
def universal_loading(engine: Engine) -> Iterator[None]:
    """Let DeepSpeed's `load_checkpoint` inside read a universal folder, by mapping its files.

    Every rank needs a part of each parameter only: mapped, the rest never leaves the disk.
    """
    settings, reading = engine.deepspeed._config, serialization.load
    before = settings.load_universal_checkpoint, reading.mmap
    settings.load_universal_checkpoint = reading.mmap = True
    try:
        yield
    finally:
        settings.load_universal_checkpoint, reading.mmap = before
    optimizer = engine.deepspeed.optimizer
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        state = optimizer.state[parameter]
        # DeepSpeed leaves the count on the CPU, where AdamW's fused kernel cannot read it.
        state["step"] = state["step"].to(parameter.device)
