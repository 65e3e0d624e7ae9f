"""Read complete parameters and their optimizer state from DeepSpeed's files, by name.

A ZeRO-1 checkpoint holds flat fp32 groups, cut in three ways: over stages (`mp_rank_KK`, KK = stage
* tensor size + tensor part), inside a parameter over tensor parts, and then flat over data ranks.
Everything here uses the names that the files give. Which stage holds a parameter, and how often,
does not matter, so both pipeline schedules read alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    OPTIMIZER_STATE_DICT,
    PARAM_GROUPS,
    PARAM_SHAPES,
    PARAM_SLICE_MAPPINGS,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from torch import Tensor

from megatron_mode.checkpoint.files import load_tensors
from megatron_mode.cost.ranks import model_state_file, optimizer_file
from megatron_mode.cost.topology import Layout
from megatron_mode.errors import CheckpointError
from megatron_mode.model.sharding import Whole, join_parts, part_shape

WEIGHT = "fp32"
STATES = (WEIGHT, "exp_avg", "exp_avg_sq")
SHARDED = (BASE_OPTIMIZER_STATE, PARAM_SLICE_MAPPINGS, SINGLE_PARTITION_OF_FP32_GROUPS)


class NativeCheckpoint:
    """Give the complete parameters of a checkpoint one by one; files are mapped, not read.

    Use it inside `weights_only`. Raises CheckpointError, naming the file, where it does not hold
    exactly `wholes`.
    """

    def __init__(self, folder: Path, layout: Layout, wholes: Mapping[str, Whole]) -> None:
        self.folder, self.layout, self.wholes = folder, layout, wholes
        self._shards: dict[Path, dict[str, Any]] = {}
        self._groups: list[dict[str, int]] = [
            self._check_stage(stage) for stage in range(layout.pipeline)
        ]
        for name in wholes:
            if not self.stages_of(name):
                raise CheckpointError(
                    f"{folder} holds no {name}, which the model of its manifest has: its files "
                    "are of two runs or of another version; name another checkpoint"
                )

    @property
    def names(self) -> list[str]:
        """List the parameters, those of one stage beside each other."""
        return sorted(self.wholes, key=lambda name: self.stages_of(name)[0])

    def stages_of(self, name: str) -> list[int]:
        """List the stages that hold a parameter: two for a tied one."""
        return [stage for stage, groups in enumerate(self._groups) if name in groups]

    def model_files(self) -> list[Path]:
        """List the files that hold what is not cut: counters, generators."""
        ranks = range(self.layout.pipeline * self.layout.tensor)
        return [self.folder / model_state_file(rank) for rank in ranks]

    def common_state(self) -> dict[str, Any]:
        """Return the optimizer state that all ranks share: its settings, not its tensors."""
        state = self._shard(0, 0, 0)
        shared = {key: value for key, value in state.items() if key not in SHARDED}
        return {**shared, PARAM_GROUPS: state[BASE_OPTIMIZER_STATE][PARAM_GROUPS]}

    def read(self, name: str, state: str) -> Tensor:
        """Join one state of a parameter: its weight in fp32, or one of its moments.

        Tensor parts and stages that hold copies of it must agree.
        """
        copies = [self._join(stage, name, state) for stage in self.stages_of(name)]
        return self._only(copies, name, "pipeline stages")

    def step(self, name: str) -> Tensor:
        """Return how many updates a parameter has had."""
        stage = self.stages_of(name)[0]
        state = _optimizer_state(self._shard(stage, 0, 0), self._groups[stage][name])
        count: Tensor = state["step"] if state else torch.tensor(0.0)
        return count.clone()

    def _join(self, stage: int, name: str, state: str) -> Tensor:
        parts = [self._part(stage, part, name, state) for part in range(self.layout.tensor)]
        cut = self.wholes[name].cut
        return join_parts(parts, cut) if cut else self._only(parts, name, "tensor parts")

    def _part(self, stage: int, part: int, name: str, state: str) -> Tensor:
        """Join what the data ranks hold of one tensor part, flat, in their order."""
        group = self._groups[stage][name]
        pieces: list[Tensor] = []
        updated: set[bool] = set()
        for data in range(self.layout.data):
            shard = self._shard(stage, part, data)
            address = shard[PARAM_SLICE_MAPPINGS][group].get(name)
            if address is not None:
                weights = shard[SINGLE_PARTITION_OF_FP32_GROUPS][group]
                flat = weights
                if state != WEIGHT:
                    moments = _optimizer_state(shard, group)
                    flat = moments[state] if moments else torch.zeros_like(weights)
                    updated.add(bool(moments))
                pieces.append(flat.narrow(0, address.start, address.numel))
        shape = part_shape(self.wholes[name], self.layout.tensor)
        if sum(piece.numel() for piece in pieces) != math.prod(shape) or len(updated) > 1:
            raise CheckpointError(
                f"{self._shard_file(stage, part, 0)} and those of the other data ranks do not hold "
                f"all of {name}: the checkpoint is not complete; name another"
            )
        return torch.cat(pieces).view(shape)

    def _check_stage(self, stage: int) -> dict[str, int]:
        """Compare the shapes in a stage's files with the model; return each name's group."""
        found: dict[str, int] = {}
        for part in range(self.layout.tensor):
            path = self.folder / model_state_file(self._model_rank(stage, part))
            groups = load_tensors(path, mmap=True).get(PARAM_SHAPES)
            if groups is None:
                raise CheckpointError(
                    f"{path} does not name its parameters: parallel.zero_stage 0 saves optimizer "
                    "state without names; for another layout use a checkpoint of "
                    "parallel.zero_stage 1"
                )
            for group, shapes in enumerate(groups):
                for name, shape in shapes.items():
                    whole = self.wholes.get(name)
                    expected = part_shape(whole, self.layout.tensor) if whole else None
                    if tuple(shape) != expected:
                        known = f"has shape {expected}" if whole else "is not known"
                        raise CheckpointError(
                            f"{path} holds {name} of shape {tuple(shape)}, which {known} in the "
                            f"model of its manifest at tensor size {self.layout.tensor}: "
                            "model/sharding.py must say how it is cut, or its files are of two runs"
                        )
                    found[name] = group
        return found

    def _only(self, copies: list[Tensor], name: str, where: str) -> Tensor:
        """Return the first of copies that must all be equal."""
        if not all(torch.equal(copies[0], copy) for copy in copies[1:]):
            raise CheckpointError(
                f"the copies of {name} in {self.folder} differ between {where}: they drifted "
                "apart in training, or model/sharding.py does not say how it is cut; resume at "
                f"the layout {self.layout} that saved them, or name another checkpoint"
            )
        return copies[0]

    def _shard(self, stage: int, part: int, data: int) -> dict[str, Any]:
        path = self._shard_file(stage, part, data)
        if path not in self._shards:
            self._shards[path] = load_tensors(path, mmap=True)[OPTIMIZER_STATE_DICT]
        return self._shards[path]

    def _shard_file(self, stage: int, part: int, data: int) -> Path:
        rank = self._model_rank(stage, part)
        fp32, bf16 = (self.folder / optimizer_file(data, rank, bf16=kind) for kind in (False, True))
        return bf16 if bf16.exists() else fp32

    def _model_rank(self, stage: int, part: int) -> int:
        return stage * self.layout.tensor + part


def _optimizer_state(shard: Mapping[str, Any], group: int) -> Mapping[str, Any]:
    """Return moments and count of a group; {} where no update has been taken yet."""
    state: Mapping[str, Any] = shard[BASE_OPTIMIZER_STATE]["state"].get(group, {})
    return state
