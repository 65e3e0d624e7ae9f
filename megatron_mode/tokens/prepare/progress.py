"""Show how far a preparation is."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def progress_bar(label: str, total: int, show: bool, unit: str = "B") -> Any:
    """Return a bar over bytes or tokens; silent where stderr is no terminal."""
    return tqdm(
        total=total,
        desc=label,
        unit=unit,
        unit_scale=True,
        leave=False,
        disable=None if show else True,
    )
