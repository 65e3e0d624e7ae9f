"""Load the complete model of a checkpoint into one process, whatever its layout was."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_mode.checkpoint.files import load_tensors
from megatron_mode.checkpoint.folders import CHECKPOINTS_NAME, current_checkpoint
from megatron_mode.checkpoint.manifest import Manifest, check_files, read_manifest, saved_config
from megatron_mode.config import Config
from megatron_mode.cost.ranks import layer_file
from megatron_mode.errors import CheckpointError
from megatron_mode.model.decoder import Decoder
from megatron_mode.model.layers import transformer_config
from megatron_mode.model.sharding import join_parts, parameter_cuts


def resolve_folder(path: Path) -> Path:
    """Return the checkpoint that a checkpoint, checkpoints or run folder names."""
    for parent in (path, path / CHECKPOINTS_NAME):
        current = current_checkpoint(parent)
        if current is not None:
            return current
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder: name a checkpoint folder or a run folder that has checkpoints"
        )
    return path


def load_decoder(path: Path) -> tuple[Decoder, Config, Manifest]:
    """Build the complete model of a checkpoint, in fp32; `path` as in `resolve_folder`."""
    folder = resolve_folder(path)
    manifest = read_manifest(folder)
    config = saved_config(manifest, folder)
    join_alone()
    decoder = Decoder(config.model, transformer_config(config.model, 1, torch.float32))
    modules = dict(decoder.named_links())
    for index, link in enumerate(decoder.links):
        if link.shares is None:
            fill(modules[link.name], folder, manifest, index)
    return decoder.eval(), config, manifest


def fill(module: nn.Module, folder: Path, manifest: Manifest, index: int) -> None:
    """Fill link `index` from its checked `layer_II-model_TT` files, their parts joined."""
    names = [layer_file(index, part) for part in range(manifest.layout["tensor"])]
    check_files(folder, manifest, names)
    shards: list[dict[str, Tensor]] = [load_tensors(folder / name) for name in names]
    cuts = parameter_cuts(module)
    for name, parameter in module.named_parameters():
        parts = [shard[name] for shard in shards if name in shard]
        found = None
        if parts:
            found = join_parts(parts, cuts[name]) if name in cuts else parts[0]
        if found is None or found.shape != parameter.shape:
            shape = None if found is None else tuple(found.shape)
            raise CheckpointError(
                f"{name} in layer {index} of {folder} has shape {shape}, the manifest's model "
                f"{tuple(parameter.shape)}: its files are of two runs; name another checkpoint"
            )
        parameter.data.copy_(found)


def join_alone() -> None:
    """Make the groups that megatron-core's layers ask for, with this process alone."""
    from megatron.core import parallel_state

    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, not re-exported
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
