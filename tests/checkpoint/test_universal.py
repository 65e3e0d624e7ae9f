"""A universal folder is loaded only into a model that cuts its parameters alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mode.checkpoint.reshard.universal import check_parameters, share_of
from megatron_mode.errors import CheckpointError
from megatron_mode.model.sharding import Cut, Whole

HERE = Path("step-00000001-universal")


MINE = {"weight": Whole((8, 4), None)}


def test_the_same_cut_is_accepted() -> None:
    check_parameters(MINE, {**MINE, "of another stage": Whole((4,), None)}, HERE)


@pytest.mark.parametrize("saved", [Whole((16, 4), Cut(0)), Whole((8, 8), Cut(1)), None])
def test_another_cut_is_refused_by_name(saved: Whole | None) -> None:
    """At two tensor ranks 16 x 4 in two parts has the local shape 8 x 4 too."""
    wholes = {} if saved is None else {"weight": saved}
    with pytest.raises(CheckpointError, match=f"{HERE.name} holds weight as .* name another"):
        check_parameters(MINE, wholes, HERE)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_shares_are_all_parameters_once(count: int) -> None:
    names = [f"{index}.weight" for index in range(11)]
    shares = [share_of(names, index, count) for index in range(count)]
    assert [name for share in shares for name in share] == names
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
