"""Load the model of a checkpoint whole into a single process, whatever its layout was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_mode.checkpoint.folders import CHECKPOINTS_NAME, current_checkpoint
from megatron_mode.checkpoint.manifest import Manifest, check_files, read_manifest, saved_config
from megatron_mode.checkpoint.unpickle import load_tensors
from megatron_mode.config import Config
from megatron_mode.cost.ranks import layer_file
from megatron_mode.errors import CheckpointError
from megatron_mode.model.decoder import Decoder
from megatron_mode.model.layers import transformer_config
from megatron_mode.model.sharding import Cut, join_parts, parameter_cuts


def resolve_folder(path: Path) -> Path:
    """Accept a checkpoint folder, a run's checkpoints folder or a run folder; return the first."""
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
    """Build the whole model of a checkpoint in this process, in fp32, whatever its layout was."""
    folder = resolve_folder(path)
    manifest = read_manifest(folder)
    config = saved_config(manifest, folder)
    join_alone()
    decoder = Decoder(config.model, transformer_config(config.model, 1, torch.float32))
    with torch.no_grad():
        for index, link in enumerate(decoder.links):
            if link.shares is None:
                module = dict(decoder.named_links())[link.name]
                tensors = read_link(folder, manifest, index, parameter_cuts(module))
                _fill(module, tensors, f"layer {index} of {folder}")
    return decoder.eval(), config, manifest


def read_link(
    folder: Path, manifest: Manifest, index: int, cuts: dict[str, Cut]
) -> dict[str, Tensor]:
    """Read one link's parameters from its checked `layer_II-model_TT` files, joined."""
    parts = manifest.layout["tensor"]
    names = [layer_file(index, part) for part in range(parts)]
    check_files(folder, manifest, names)
    shards: list[dict[str, Any]] = [load_tensors(folder / name) for name in names]
    return {
        name: join_parts([shard[name] for shard in shards], cuts[name]) if name in cuts else tensor
        for name, tensor in shards[0].items()
        if isinstance(tensor, Tensor)
    }


def _fill(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    for name, parameter in module.named_parameters():
        found = tensors[name].shape if name in tensors else None
        if found != parameter.shape:
            raise CheckpointError(
                f"{name} in {where} has shape {found and tuple(found)}, the manifest's model "
                f"{tuple(parameter.shape)}: its files are of two runs; name another checkpoint"
            )
        parameter.copy_(tensors[name])


def join_alone() -> None:
    """Make the groups that megatron-core's layers ask for even when there is nobody to talk to."""
    from megatron.core import parallel_state

    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, not re-exported
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
