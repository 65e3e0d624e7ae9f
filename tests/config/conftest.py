"""Give the tests of the configuration the repository and its run files."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny() -> Path:
    return ROOT / "configs/run/tiny.yaml"
