"""Open any input as numbered JSON lines, choosing the reader by what the file holds.

    JSON lines, plain or gzip'd or zstd-compressed                  -> lines
    a file named .json that holds one array, compressed or not      -> json_array
    Parquet, Arrow IPC, folders written by datasets.save_to_disk    -> columns

A compressed or binary file is known by its first bytes; a name that promises another format is
refused, because it means that the file was cut or mixed up.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_mode.errors import DataError
from megatron_mode.tokens.read.json_array import JsonArray, holds_array
from megatron_mode.tokens.read.lines import JsonLines, LineReader

ACCEPTED = (
    "accepted are .jsonl, .jsonl.gz, .jsonl.zst, .parquet and .arrow files and folders written "
    "by save_to_disk"
)
Kind = Literal["gzip", "zstd", "parquet", "arrow"]
HEAD_BYTES = 8
MAGIC: dict[Kind, tuple[bytes, ...]] = {
    "gzip": (b"\x1f\x8b",),
    # The second to last: a skippable frame, which parallel compressors put first.
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + n]) + b"\x2a\x4d\x18" for n in range(16))),
    "parquet": (b"PAR1",),
    "arrow": (b"ARROW1\0\0", b"\xff\xff\xff\xff"),
}
SUFFIXES: dict[str, Kind] = {
    ".gz": "gzip",
    ".zst": "zstd",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
DOCUMENT_COLUMNS = ("id", "source", "text", "messages", "tools", "functions", "system")


def open_reader(path: Path, columns: Sequence[str] | None = DOCUMENT_COLUMNS) -> LineReader:
    """Open an input; of a table take these columns, or all when columns is None.

    Raises DataError when it is missing, of no known format, or not what its name says.
    """
    files, kind = input_files(path), "arrow" if path.is_dir() else kind_of(path)
    if kind == "gzip" or kind == "zstd" or kind is None:
        return (JsonArray if holds_array(path, kind) else JsonLines)(path, kind)
    from megatron_mode.tokens.read.columns import Table, arrow_batches, parquet_batches

    return Table(parquet_batches if kind == "parquet" else arrow_batches, files, columns)


def kind_of(path: Path) -> Kind | None:
    """Return the format that a file begins like, None for text.

    Raises DataError when it cannot be read, or its name says something else.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
            stream.seek(0)  # which a pipe refuses
    except OSError as error:
        raise DataError(
            f"Input {path} cannot be read ({error.strerror or error}); {ACCEPTED}, so correct the "
            "name, or write what a pipe gives to a file first."
        ) from None
    found = next((kind for kind, magic in MAGIC.items() if head.startswith(magic)), None)
    promised = SUFFIXES.get(path.suffix)
    if promised is not None and found != promised:
        raise DataError(
            f"Input {path} is named {path.suffix} but does not begin like {promised} "
            f"({head[:4].hex(' ') or 'it is empty'}); fetch it again, or give it the name of what "
            "it holds."
        )
    is_utf16 = head.startswith((b"\xff\xfe", b"\xfe\xff")) or (found is None and 0 in head[:2])
    if is_utf16 and b"{" in head.replace(b"\0", b""):
        raise DataError(f"Input {path} is UTF-16; save it as UTF-8.")
    return found


def input_files(path: Path) -> list[Path]:
    """Return the files of an input: itself, or in order those that datasets.save_to_disk wrote."""
    if not path.is_dir():
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = read_json(path / "dataset_dict.json").get("splits")
        names = splits if isinstance(splits, list) else []
        raise DataError(
            f"Input {path} holds several splits ({', '.join(map(str, names))}); name one, such "
            f"as {path / str(next(iter(names), 'train'))}."
        )
    if not (path / "state.json").is_file():
        raise DataError(
            f"Input {path} cannot be read (it is a folder without state.json); {ACCEPTED}, so "
            "name the files in it."
        )
    state = read_json(path / "state.json")
    if state.get("_indices_data_files"):
        raise DataError(
            f"Input {path} is a selection of rows kept as a list of indices; call "
            "flatten_indices() before save_to_disk()."
        )
    try:
        files = [path / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise DataError(
            f"{path / 'state.json'} lists no _data_files; write the folder again with "
            "save_to_disk()."
        ) from None
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is missing, which state.json beside it lists; copy it too.")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a small file; raise DataError when it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); write the folder again.") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no JSON object; write the folder again.")
    return value


def size_bytes(path: Path) -> int:
    """Return the size of an input on disk; 0 when it is missing."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
