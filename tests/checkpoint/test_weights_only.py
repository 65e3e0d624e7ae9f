"""A checkpoint cannot run code, and loads whatever Python wrote it."""

from __future__ import annotations

import pickle

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from spoilt_checkpoints import Bomb

from megatron_mode.checkpoint.files import weights_only


class Asks:
    """Pickle as getattr(owner, name), as Python before 3.11.4 does with a member of an enum."""

    def __init__(self, owner, name):
        self.asked = (owner, name)

    def __reduce__(self):
        return getattr, self.asked


def saved(tmp_path, value):
    torch.save({"value": value}, tmp_path / "state.pt")
    return tmp_path / "state.pt"


def read(path):
    """Read as DeepSpeed does, which asks torch for all that a pickle may hold."""
    return torch.load(path, weights_only=False)


def test_members_of_an_enum_load_from_any_python(tmp_path):
    for value in (ZeroStageEnum.gradients, Asks(ZeroStageEnum, "gradients")):
        path = saved(tmp_path, value)
        with weights_only():
            assert read(path)["value"] is ZeroStageEnum.gradients


@pytest.mark.parametrize("name", ["mro", "__init__", "__class__"])
def test_nothing_else_of_an_enum_is_looked_up(name, tmp_path):
    path = saved(tmp_path, Asks(ZeroStageEnum, name))
    with weights_only(), pytest.raises(pickle.UnpicklingError):
        read(path)


def test_no_function_is_called(tmp_path):
    mark = tmp_path / "went off"
    path = saved(tmp_path, Bomb(mark))
    with weights_only(), pytest.raises(pickle.UnpicklingError):
        read(path)
    assert not mark.exists()
    read(path)
    assert mark.exists(), "the bomb is one"
