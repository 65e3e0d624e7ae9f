"""The layers of the design hold, and what must start instantly imports no torch."""

import subprocess
import sys
import tomllib

import pytest

SCRIPT = """
import importlib, sys
importlib.import_module(sys.argv[1])
heavy = {"torch", "deepspeed", "megatron", "triton", "transformers"} & set(sys.modules)
sys.exit(f"{sys.argv[1]} imports {sorted(heavy)}" if heavy else 0)
"""


def test_layers_hold(root):
    """Run import-linter on the contracts of pyproject.toml."""
    run = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_planning_imports_no_torch(root):
    """Import each module of the no-torch contract; the packages above it run too."""
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = [c for c in settings["contracts"] if c["id"] == "no-torch"]
    for module in contract["source_modules"]:
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, module], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr


def test_kernels_do_not_shadow_the_package_of_that_name(root):
    run = subprocess.run(
        [sys.executable, "-c", "import kernels"],
        cwd=root,
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "import megatron_mode.kernels" in run.stderr
    assert run.returncode == 1


@pytest.mark.parametrize("module", ["megatron_mode.kernels"])
def test_kernels_are_importable_under_their_own_name(module, tmp_path):
    subprocess.run([sys.executable, "-c", f"import {module}"], cwd=tmp_path, check=True)
