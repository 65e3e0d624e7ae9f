"""Read NAME.json, which describes and seals a prepared source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_mode.errors import DataError

FORMAT_VERSION = 1


def check_present(root: Path, name: str) -> None:
    """Raise DataError when DIR/NAME is no source, naming the sources that DIR does hold."""
    if not (root / f"{name}.idx").exists():
        found = ", ".join(sorted(path.stem for path in root.glob("*.idx"))) or "none"
        raise DataError(
            f"{root / name}.idx does not exist; the sources in {root} are: {found}; correct the "
            "name or data.root, or run `megatron-mode prepare`."
        )
    if (root / f"{name}.flags.bin").exists() and not (root / f"{name}.json").exists():
        raise DataError(f"{root / name}.json is missing beside its flags; copy it too.")


def read_info(root: Path, name: str) -> dict[str, Any]:
    """Read NAME.json; {} for a corpus by Megatron's own tools, which has none."""
    path = root / f"{name}.json"
    try:
        info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError):
        raise DataError(f"{path} cannot be read; prepare the source again.") from None
    if info.get("format") != FORMAT_VERSION:
        raise DataError(
            f"{path} has format {info.get('format')}; accepted is {FORMAT_VERSION}, so prepare "
            "the source again."
        )
    return info
