"""The wheel holds what it should, once."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel_names(root, tmp_path_factory):
    """Build a wheel from a copy of the tree and return the names in it."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    for name in ("megatron_mode", "kernels", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / name, tree / name, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tree / name)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(folder)],
        cwd=tree,
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_kernels_are_installed_once_and_under_our_name(wheel_names, root):
    assert [n for n in wheel_names if n.startswith("kernels/")] == []
    installed = [n for n in wheel_names if n.startswith("megatron_mode/kernels/")]
    ours = [f"megatron_mode/{f.relative_to(root)}" for f in (root / "kernels").rglob("*.py")]
    assert sorted(installed) == sorted(ours)


def test_data_files_travel(wheel_names, root):
    data = (
        "configs/*/*.yaml",
        "megatron_mode/report/templates/*",
        "megatron_mode/tokens/sample/**/*",
        "megatron_mode/py.typed",
    )
    for pattern in data:
        files = [file for file in root.glob(pattern) if file.is_file()]
        assert files, pattern
        for file in files:
            name = str(file.relative_to(root))
            assert name.replace("configs/", "megatron_mode/configs/") in wheel_names
    assert not any(Path(name).parts[0] == "tests" for name in wheel_names)
