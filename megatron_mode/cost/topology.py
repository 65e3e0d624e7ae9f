"""Map ranks to coordinates: rank = (pipeline * data_size + data) * tensor_size + tensor.

Imports no torch, so that planning stays instant. DeepSpeed's and megatron-core's groups follow
from the same formula; `build` asserts that they do.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from megatron_mode.config import Config

Axis = Literal["tensor", "pipeline", "data"]


class Coordinates(NamedTuple):
    """Place a rank on the three axes of the mesh."""

    pipeline: int
    data: int
    tensor: int


class Layout(NamedTuple):
    """Give the sizes of the three axes of the mesh."""

    tensor: int
    pipeline: int
    data: int

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.tensor * self.pipeline * self.data

    def coordinates(self, rank: int) -> Coordinates:
        """Return the place of `rank`."""
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(pipeline, data, tensor)

    def rank(self, at: Coordinates) -> int:
        """Return the rank at the coordinates."""
        return (at.pipeline * self.data + at.data) * self.tensor + at.tensor

    def ranks_along(self, axis: Axis, rank: int) -> list[int]:
        """Return the ranks that differ from `rank` on one axis only, itself included.

        They hold the parts of its matrices (tensor), the same weights (data), or the stages that
        its micro-batches pass through (pipeline).
        """
        at = self.coordinates(rank)
        return [self.rank(at._replace(**{axis: i})) for i in range(getattr(self, axis))]

    def __str__(self) -> str:
        return f"tensor {self.tensor} x pipeline {self.pipeline} x data {self.data}"


def accumulation_steps(config: Config, data: int) -> int:
    """Return micro-batches a data-parallel rank runs in one step."""
    return config.batch.global_rows // (config.batch.micro_rows * data)
