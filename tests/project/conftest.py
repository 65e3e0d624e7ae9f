"""Give the tests of the project the repository and its source files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def sources() -> dict[str, str]:
    """Text of every Python file of ours, by path from the root; kernels/ once."""
    files = [ROOT / "setup.py"]
    for folder in ("megatron_mode", "kernels", "launch", "tests", "benchmarks"):
        files += sorted((ROOT / folder).rglob("*.py"))
    link = ROOT / "megatron_mode" / "kernels"
    return {
        str(file.relative_to(ROOT)): file.read_text(encoding="utf-8")
        for file in files
        if not file.is_relative_to(link)
    }


@pytest.fixture(scope="session")
def trees(sources) -> dict[str, ast.Module]:
    return {path: ast.parse(text) for path, text in sources.items()}
