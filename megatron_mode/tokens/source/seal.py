"""Read NAME.json, which describes and seals a prepared source, and check what stands beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mode.atomic import write_whole
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
            f"{path} has format {given}; only {FORMAT_VERSION} can be read, so prepare the source "
            "again."
        )
    wrong = [key for key, kind in REQUIRED.items() if not isinstance(info.get(key), kind)]
    files = [] if wrong else map(info["files"].get, SEALED_SUFFIXES)
    if not all(isinstance(file, dict) and {"bytes", "sha256"} <= file.keys() for file in files):
        wrong = ["files"]
    if wrong:
        raise DataError(
            f"{path} has {wrong[0]} = {info.get(wrong[0])!r}, which `megatron-mode prepare` never "
            "writes; prepare or copy the source again."
        )
    return info


def write_info(root: Path, name: str, info: dict[str, Any]) -> None:
    """Replace NAME.json."""
    write_whole(root / f"{name}.json", json.dumps(info, indent=2, ensure_ascii=False) + "\n")


def sample_places(size: int) -> list[int]:
    """Return where the SAMPLES blocks of SAMPLE_BYTES begin, evenly spaced from start to end."""
    return [max(size - SAMPLE_BYTES, 0) * number // (SAMPLES - 1) for number in range(SAMPLES)]


def sampled_digest(paths: Sequence[Path]) -> str:
    """Hash sizes and samples of each file: what can be known without a seal.

    A change between the samples is not seen.
    """
    digest = hashlib.sha256()
    for path in paths:
        size_bytes = path.stat().st_size
        digest.update(str(size_bytes).encode())
        with path.open("rb") as stream:
            for place in sample_places(size_bytes):
                stream.seek(place)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
