"""Install megatron_mode; the tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_mode/__init__.py").read_text())
assert VERSION, "megatron_mode/__init__.py states no __version__"

# kernels/ lives at the top, beside its own benchmark; PyPI has another package of that name, so it
# is installed as megatron_mode.kernels only. The symlink megatron_mode/kernels serves type checkers
# and is left out here, so that a wheel holds one copy. configs/ travels the same way.
PACKAGE_DIR = {"megatron_mode.kernels": "kernels", "megatron_mode.configs": "configs"}
KERNELS = [
    "megatron_mode.kernels",
    *(f"megatron_mode.kernels.{p}" for p in find_packages("kernels")),
]

setup(
    name="megatron_mode",
    version=VERSION.group(1),
    description="Train decoder language models that know, at each token, which mode they are in.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["megatron_mode*"], exclude=["megatron_mode.kernels*"]),
        *KERNELS,
        "megatron_mode.configs",
    ],
    package_dir=PACKAGE_DIR,
    package_data={
        "megatron_mode": ["py.typed"],
        "megatron_mode.report": ["templates/*"],
        "megatron_mode.tokens": ["sample/*", "sample/agent-log/*"],
        "megatron_mode.configs": ["*/*.yaml", "README.md"],
    },
    install_requires=[
        "torch==2.13.0",
        "deepspeed>=0.19.3",  # before, gradients were scaled wrongly at pipeline > 1 (#8152)
        "megatron-core>=0.16.1",
        "triton; sys_platform == 'linux'",
        "jinja2",
        "ninja",
        "numpy",
        "pyarrow",
        "pydantic>=2.7",
        "PyYAML",
        "sentencepiece",
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        "dev": [
            # Peers of `python -m megatron_mode.kernels.bench`.
            "cut-cross-entropy",
            "liger-kernel",
            "hypothesis",
            "import-linter>=2.3",
            "mypy",
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "transformers",
            "types-PyYAML",
            "types-tqdm",
        ],
        "docs": ["mkdocs>=1.6"],
        # Optional accelerators. NVIDIA's apex is absent on purpose: the PyPI package of that name
        # is another project.
        "cuda": ["nvidia-ml-py", "transformer-engine[pytorch]"],
    },
    entry_points={"console_scripts": ["megatron-mode = megatron_mode.__main__:main"]},
)
