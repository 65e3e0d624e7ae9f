"""Write and load checkpoints in DeepSpeed's universal format, which no layout cuts.

`zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt` hold every parameter whole, `zero/optimizer_state.pt`
and `mp_rank_KK_model_states.pt` what is common. DeepSpeed's loader cuts them for any layout.

The folder is the one that `deepspeed.checkpoint.ds_to_universal` makes, to the last byte of every
tensor (a test compares them), but not made by it: it joins a parameter that matches none of its
patterns along dimension 0 without a word, writes every fragment of every rank to a file of its own
first, and takes the folder's name for a regular expression.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from deepspeed.checkpoint.constants import CAT_DIM, PARAM, PARAM_N_SUB_PARAMS
from torch.utils.serialization import config as serialization

from megatron_mode.atomic import sync_folder
from megatron_mode.checkpoint.files import FileRecord, copy_durably, save_tensors
from megatron_mode.checkpoint.reshard.native import STATES, NativeCheckpoint
from megatron_mode.engine.step import Engine
from megatron_mode.errors import CheckpointError
from megatron_mode.model.sharding import Cut, Whole, whole_parameters

ZERO = "zero"
COMMON = "optimizer_state.pt"
STEP = "step"
Records = dict[str, FileRecord]


def share_of(names: Sequence[str], index: int, count: int) -> Sequence[str]:
    """Return the names that process `index` of `count` writes, neighbours together."""
    return names[index * len(names) // count : (index + 1) * len(names) // count]


def write_parameters(
    source: NativeCheckpoint, target: Path, names: Sequence[str], threads: int
) -> Iterator[Records]:
    """Write the named parameters, some at a time; yield each one's records by path below target.

    The source has opened them. A thread holds one state of one whole parameter at a time.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="reshard") as pool:
        try:
            yield from pool.map(lambda name: _write_parameter(source, target, name), names)
        finally:
            pool.shutdown(cancel_futures=True)


def write_common(source: NativeCheckpoint, target: Path) -> Records:
    """Write what is not a parameter; return the records."""
    (target / ZERO).mkdir(parents=True, exist_ok=True)
    path = target / ZERO / COMMON
    records = {f"{ZERO}/{COMMON}": save_tensors(source.common_state(), path)}
    for file in source.model_files():
        records[file.name] = copy_durably(file, target / file.name)
    return records


def files_of_parameters(names: Iterable[str]) -> set[str]:
    """Name the files that a folder of these parameters has below it, but the layout's own."""
    states = (*STATES, STEP)
    return {
        f"{ZERO}/{COMMON}",
        *(f"{ZERO}/{name}/{state}.pt" for name in names for state in states),
    }


def sync_folders(target: Path) -> None:
    """Flush the names of all files that were written."""
    for folder in (*sorted(p for p in (target / ZERO).iterdir() if p.is_dir()), target / ZERO):
        sync_folder(folder)
    sync_folder(target)


def check_parameters(engine: Engine, wholes: Mapping[str, Whole], where: Path) -> None:
    """Raise CheckpointError where this rank's parameters are not parts of those of a folder."""
    mine = whole_parameters(engine.deepspeed.module, engine.layout.tensor)
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


def _write_parameter(source: NativeCheckpoint, target: Path, name: str) -> Records:
    folder = target / ZERO / name
    folder.mkdir(parents=True)
    cut = _cut_fields(source.wholes[name].cut)
    records = {}
    for state in STATES:
        saved = save_tensors({PARAM: source.read(name, state), **cut}, folder / f"{state}.pt")
        records[f"{ZERO}/{name}/{state}.pt"] = saved
    saved = save_tensors(source.step(name), folder / f"{STEP}.pt")
    records[f"{ZERO}/{name}/{STEP}.pt"] = saved
    return records


def _cut_fields(cut: Cut | None) -> dict[str, int]:
    """State a cut in the words of DeepSpeed's loader, whose default is no cut for equal shapes."""
    if cut is None:
        return {}
    blocks = {PARAM_N_SUB_PARAMS: cut.blocks} if cut.blocks > 1 else {}
    return {CAT_DIM: cut.dim, **blocks}
