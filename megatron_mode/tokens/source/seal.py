"""Read NAME.json, which describes and seals a prepared source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mode.errors import DataError

FORMAT_VERSION = 1
REQUIRED = {"mode": int, "tokenizer": str, "tokens": int, "documents": int, "files": dict}
SEALED_SUFFIXES = (".bin", ".idx", ".flags.bin", ".docs.arrow")
SAMPLES, SAMPLE_BYTES = 64, 4096


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
    except (ValueError, OSError, RecursionError):
        raise DataError(f"{path} cannot be read; prepare the source again.") from None
    given = info.get("format") if isinstance(info, dict) else None
    if given != FORMAT_VERSION:
        raise DataError(
            f"{path} has format {given}; accepted is {FORMAT_VERSION}, so prepare the source again."
        )
    wrong = [key for key, kind in REQUIRED.items() if not isinstance(info.get(key), kind)]
    if not wrong and not all(map(_is_described, map(info["files"].get, SEALED_SUFFIXES))):
        wrong = ["files"]
    if wrong:
        raise DataError(
            f"{path} has {wrong[0]} = {info.get(wrong[0])!r}, which `megatron-mode prepare` never "
            "writes; prepare or copy the source again."
        )
    return info


def _is_described(file: Any) -> bool:
    return isinstance(file, dict) and {"bytes", "sha256"} <= file.keys()


def sampled_digest(paths: Sequence[Path]) -> str:
    """Hash sizes and SAMPLES blocks of each file, evenly spaced: what can be known without a seal.

    A change between the blocks is not seen.
    """
    digest = hashlib.sha256()
    for path in paths:
        size_bytes = path.stat().st_size
        digest.update(str(size_bytes).encode())
        with path.open("rb") as stream:
            for number in range(SAMPLES):
                stream.seek(max(size_bytes - SAMPLE_BYTES, 0) * number // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
