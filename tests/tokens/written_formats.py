"""Write lists of JSON objects in every format that the readers take."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

Objects = list[dict[str, Any]]

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXT}
    ),
    min_size=1,
    max_size=4,
).filter(lambda messages: any(message["content"] for message in messages))
TOOLS = st.lists(
    st.fixed_dictionaries({"name": TEXT}, optional={"parameters": st.dictionaries(TEXT, TEXT)}),
    max_size=2,
).map(json.dumps)
NAMES = {"id": TEXT, "source": st.sampled_from(["books", "a.b-c_1"])}
OBJECTS = st.lists(
    st.fixed_dictionaries({"text": TEXT.filter(bool)}, optional=NAMES)
    | st.fixed_dictionaries({"messages": MESSAGES}, optional={**NAMES, "tools": TOOLS}),
    max_size=6,
)
MESSAGE_TYPE = pa.struct([("role", pa.string()), ("content", pa.string())])
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("text", pa.string()),
        ("messages", pa.list_(MESSAGE_TYPE)),
        ("tools", pa.string()),
        ("stars", pa.int64()),
    ]
)


def json_lines(objects: Objects, end: str = "\n") -> bytes:
    """Return the objects as JSON lines."""
    return "".join(json.dumps(value) + end for value in objects).encode()


def zstd(data: bytes) -> bytes:
    """Return one zstd frame."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


def halves(objects: Objects) -> list[Objects]:
    """Cut a list in two."""
    return [objects[: len(objects) // 2], objects[len(objects) // 2 :]]


def parquet(objects: Objects, **options: Any) -> bytes:
    """Return a Parquet file with row groups of two rows."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(objects, SCHEMA), sink, **{"row_group_size": 2, **options})
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


def arrow(objects: Objects, *, as_file: bool = False, is_packed: bool = False) -> bytes:
    """Return an Arrow IPC stream or file with batches of three rows."""
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(objects, SCHEMA)
    if is_packed:
        table = table.set_column(1, "source", table["source"].dictionary_encode())
    options = pa.ipc.IpcWriteOptions(compression="zstd" if is_packed else None)
    open_writer = pa.ipc.new_file if as_file else pa.ipc.new_stream
    with open_writer(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=3)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


WRITERS: dict[str, Callable[[Objects], bytes]] = {
    "a.jsonl": json_lines,
    "crlf.jsonl": lambda objects: json_lines(objects, "\r\n"),
    "bom.jsonl": lambda objects: b"\xef\xbb\xbf" + json_lines(objects),
    "a.jsonl.gz": lambda objects: b"".join(
        gzip.compress(json_lines(half), 1) for half in halves(objects)
    ),
    "a.jsonl.zst": lambda objects: b"".join(zstd(json_lines(half)) for half in halves(objects)),
    "a.json": lambda objects: json.dumps(objects, indent=1).encode(),
    "a.parquet": parquet,
    "sums.parquet": lambda objects: parquet(objects, write_page_checksum=True, compression="zstd"),
    "stream.arrow": arrow,
    "packed.arrow": lambda objects: arrow(objects, is_packed=True),
    "file.arrow": lambda objects: arrow(objects, as_file=True),
}


def write_dataset(folder: Path, objects: Objects) -> Path:
    """Write what datasets.save_to_disk leaves: Arrow streams and a state that lists them."""
    folder.mkdir(parents=True)
    names = []
    for number, half in enumerate(halves(objects)):
        names.append(f"data-{number:05}-of-00002.arrow")
        (folder / names[-1]).write_bytes(arrow(half))
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder
