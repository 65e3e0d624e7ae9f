"""Hold the permutation to being one, to its inverse, and to looking shuffled."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mode.mix.permutation import epoch_key, invert, permute, stream_key


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_every_index_appears_once_and_comes_back(size: int, key: int) -> None:
    image = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(image), np.arange(size))
    assert np.array_equal(invert(image, size, key), np.arange(size))


@given(size=st.integers(1, 2**62), data=st.data(), key=st.integers(0, 2**64 - 1))
def test_large_sizes_stay_inside_and_come_back(size: int, data: st.DataObject, key: int) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8)))
    image = permute(index, size, key)
    assert np.all((image >= 0) & (image < size))
    assert np.array_equal(invert(image, size, key), index)


def test_sizes_and_keys_by_element_equal_one_at_a_time() -> None:
    rng = np.random.default_rng(1)
    size = rng.integers(1, 10**12, 500)
    size[:100] = rng.integers(1, 5, 100)
    index, key = rng.integers(0, size), rng.integers(0, 2**63, 500).astype(np.uint64)
    together = permute(index, size, key)
    alone = [permute(i, s, k)[0] for i, s, k in zip(index, size, key, strict=True)]
    assert together.tolist() == alone
    assert np.array_equal(invert(together, size, key), index)


def test_all_orders_of_four_appear_alike_often() -> None:
    keys = epoch_key(stream_key(3, "web"), np.repeat(np.arange(24_000), 4))
    orders = permute(np.tile(np.arange(4), 24_000), 4, keys).reshape(-1, 4)
    counts = np.unique(orders @ [64, 16, 4, 1], return_counts=True)[1]
    chi_square = np.sum((counts - 1000) ** 2 / 1000)
    assert len(counts) == 24
    assert chi_square < 60  # 23 degrees of freedom: p = 4e-5


def test_neighbours_are_scattered_and_epochs_differ() -> None:
    size = 100_003
    key = stream_key(1, "web")
    first, second = (permute(np.arange(size), size, epoch_key(key, e)) for e in (0, 1))
    expected = 1 / 3  # mean distance of two uniform points
    assert np.mean(np.abs(np.diff(first))) / size == pytest.approx(expected, abs=0.01)
    assert np.mean(first == second) < 1e-3
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    assert abs(np.corrcoef(first, np.arange(size))[0, 1]) < 0.02


def test_keys_depend_on_every_part() -> None:
    keys = {stream_key(*parts) for parts in [(1, "a"), (1, "b"), (2, "a"), ("1", "a"), (1, "a", 0)]}
    assert len(keys) == 5


def test_images_are_fixed_for_ever() -> None:
    """A changed permutation would change every run that resumes."""
    image = permute(np.arange(6), 1_000_003, epoch_key(stream_key(1234, "web"), 0))
    assert image.tolist() == EXPECTED_IMAGE


EXPECTED_IMAGE = [717391, 531055, 379577, 810974, 755242, 738590]


@pytest.mark.parametrize(("index", "size"), [(-1, 5), (5, 5), (0, 2**62 + 1)])
def test_outside_is_refused(index: int, size: int) -> None:
    with pytest.raises(ValueError, match="must be in"):
        permute(index, size, 0)
