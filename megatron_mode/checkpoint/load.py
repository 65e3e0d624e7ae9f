"""Load a checkpoint: into the engine that continues it, or whole into a single process.

Files are loaded with torch's weights-only unpickler and an allow-list, so that a checkpoint cannot
run code.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_mode.checkpoint.manifest import CHECKPOINTS_NAME, Manifest, read_manifest
from megatron_mode.config import Config
from megatron_mode.engine.step import Engine
from megatron_mode.errors import CheckpointError
from megatron_mode.model.decoder import Decoder
from megatron_mode.model.layers import transformer_config
from megatron_mode.model.sharding import Cut, join_parts, parameter_cuts

FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def restore(engine: Engine, folder: Path) -> None:
    """Load every rank's share of a checkpoint, weights, optimizer and generators."""
    try:
        with weights_only():
            path, client_state = engine.deepspeed.load_checkpoint(
                str(folder.parent), tag=folder.name
            )
    except Exception as error:
        raise CheckpointError(
            f"{folder} cannot be loaded ({type(error).__name__}): a file of it is damaged or "
            "missing; delete the folder to resume from the checkpoint before it"
        ) from error
    if path is None:
        raise CheckpointError(f"{folder} could not be loaded: name a finished checkpoint folder")
    torch.set_rng_state(client_state["cpu_generator"])
    if torch.cuda.is_available() and "cuda_generator" in client_state:
        torch.cuda.set_rng_state(client_state["cuda_generator"])


@contextmanager
def weights_only() -> Iterator[None]:
    """Make every torch.load inside refuse pickles, but for the three classes DeepSpeed saves."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(FORCE_WEIGHTS_ONLY)
    os.environ[FORCE_WEIGHTS_ONLY] = "1"
    try:
        # Python before 3.11.4 pickles a member of an enum as getattr(class, name).
        classes = [LossScaler, ZeroStageEnum, fragment_address, (_enum_member, "builtins.getattr")]
        with torch.serialization.safe_globals(classes):
            yield
    finally:
        if before is None:
            del os.environ[FORCE_WEIGHTS_ONLY]
        else:
            os.environ[FORCE_WEIGHTS_ONLY] = before


def resolve_folder(path: Path) -> Path:
    """Accept a checkpoint folder, a run's checkpoints folder or a run folder; return the first."""
    for parent in (path, path / CHECKPOINTS_NAME):
        latest = parent / "latest"
        if latest.is_file():
            return parent / latest.read_text(errors="replace").strip()
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder: name a checkpoint folder or a run folder that has checkpoints"
        )
    return path


def load_decoder(path: Path) -> tuple[Decoder, Config, Manifest]:
    """Build the whole model of a checkpoint in this process, in fp32, whatever its layout was."""
    folder = resolve_folder(path)
    manifest = read_manifest(folder)
    try:
        config = Config.model_validate(manifest.config)
        parts = manifest.layout["tensor"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"the manifest of {folder} holds no config of this version ({type(error).__name__}): "
            "name another checkpoint or use the version that wrote it"
        ) from None
    _join_alone()
    decoder = Decoder(config.model, transformer_config(config.model, 1, torch.float32))
    with torch.no_grad():
        for index, link in enumerate(decoder.links):
            if link.shares is None:
                module = dict(decoder.named_links())[link.name]
                tensors = read_link(folder, index, parameter_cuts(module), parts)
                _fill(module, tensors, f"layer {index} of {folder}")
    return decoder.eval(), config, manifest


def read_link(folder: Path, index: int, cuts: dict[str, Cut], parts: int) -> dict[str, Tensor]:
    """Read one link's parameters from its `layer_II-model_TT` files, `parts` of them, joined."""
    files = [folder / f"layer_{index:02d}-model_{p:02d}-model_states.pt" for p in range(parts)]
    shards: list[dict[str, Any]] = []
    for file in files:
        try:
            shards.append(torch.load(file, map_location="cpu", weights_only=True))
        except FileNotFoundError:
            raise CheckpointError(
                f"{file} is missing: the checkpoint is not complete; name another"
            ) from None
        except Exception as error:
            raise CheckpointError(
                f"{file} cannot be read ({type(error).__name__}): the file is damaged; name "
                "another checkpoint"
            ) from error
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


def _join_alone() -> None:
    # megatron-core's layers ask for their groups even when there is nobody to talk to.
    from megatron.core import parallel_state

    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, not re-exported
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()


def _enum_member(owner: object, name: str) -> Enum:
    """Stand in for getattr inside a checkpoint, where it may only name a member of an enum.

    Raises UnpicklingError for anything else.
    """
    if isinstance(owner, type) and issubclass(owner, Enum) and name in owner.__members__:
        return owner.__members__[name]
    raise UnpicklingError(f"a checkpoint asks for {name!r} of {owner!r}")
