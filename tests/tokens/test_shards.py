"""Check the prepared source against plain lists and against megatron-core's own files."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mode.errors import DataError
from megatron_mode.tokens.flags import CONTROL, MODE2
from megatron_mode.tokens.source.document_table import BATCH_DOCUMENTS
from megatron_mode.tokens.source.seal import SEALED_SUFFIXES
from megatron_mode.tokens.source.shards import Source, SourceWriter
from megatron_mode.tokens.vocabulary import Vocabulary

SMALL = Vocabulary("a" * 64, 1000, 1024, {"<|doc|>": 1})
LARGE = Vocabulary("b" * 64, 70_000, 70_016, {"<|doc|>": 1})

Documents = list[tuple[list[int], bytes]]

documents_of = st.lists(
    st.lists(st.tuples(st.integers(0, 999), st.integers(0, 255)), min_size=1, max_size=6).map(
        lambda pairs: ([i for i, _ in pairs], bytes(f for _, f in pairs))
    ),
    max_size=12,
)


def write(root: Path, documents: Documents, vocabulary: Vocabulary = SMALL, mode: int = 2) -> None:
    vocabulary.write(root)
    with SourceWriter(root, "chat", mode=mode, vocabulary=vocabulary, licence="CC0") as writer:
        for number, (ids, flags) in enumerate(documents):
            writer.add(ids, flags, id=f"d{number}", rendering=("chat", "plain")[number % 2])


EXAMPLE: Documents = [([1, 5, 6], b"\x41\x09\x09"), ([1, 7], b"\x41\x11"), ([1], b"\x41")]


@settings(max_examples=60, deadline=None)
@given(documents=documents_of, data=st.data())
def test_reader_against_lists(documents: Documents, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), documents)
        source = Source.open(folder, "chat")
        all_ids = [i for ids, _ in documents for i in ids]
        all_flags = [f for _, flags in documents for f in flags]
        owner = [d for d, (ids, _) in enumerate(documents) for _ in ids]
        starts = [owner.index(d) for d in range(len(documents))]
        assert (source.tokens, source.documents) == (len(all_ids), len(documents))
        begin = data.draw(st.integers(0, len(all_ids)))
        end = data.draw(st.integers(begin, len(all_ids)))
        ids, flags = source.read(begin, end)
        assert (ids.dtype, flags.dtype) == (np.int64, np.uint8)
        assert ids.tolist() == all_ids[begin:end]
        assert flags.tolist() == all_flags[begin:end]
        found = source.document_starts(begin, end)
        assert found.tolist() == [s for s in starts if begin <= s < end]
        assert [source.document_of(token) for token in range(len(owner))] == owner
        for number, (expected_ids, expected_flags) in enumerate(documents):
            ids, flags, *rest = source.document(number)
            assert (ids.tolist(), flags.tobytes()) == (expected_ids, expected_flags)
            assert rest == [f"d{number}", "chat", ("chat", "plain")[number % 2]]


def test_info_counts_and_digests(tmp_path: Path) -> None:
    write(tmp_path, EXAMPLE)
    source = Source.open(tmp_path, "chat", mode=2)
    info = source.info
    assert (source.name, source.mode, info["format"], info["licence"]) == ("chat", 2, 1, "CC0")
    assert info["flags"]["mode2"] == 6
    assert info["flags"]["control"] == 3
    assert info["flags"]["role_system"] == 2
    assert info["flags"]["role_user"] == 1
    assert info["flags"]["role_none"] == 3
    for suffix in SEALED_SUFFIXES:
        content = (tmp_path / f"chat{suffix}").read_bytes()
        assert source.content_digests[suffix] == hashlib.sha256(content).hexdigest()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*(f"chat{s}" for s in SEALED_SUFFIXES), "chat.json", "tokenizer.json"]
    )


def test_many_documents_span_batches_of_the_table(tmp_path: Path) -> None:
    count = BATCH_DOCUMENTS + 3
    write(tmp_path, [([1], b"\0")] * count)
    source = Source.open(tmp_path, "chat")
    for number in (0, BATCH_DOCUMENTS - 1, BATCH_DOCUMENTS, count - 1):
        assert source.document(number)[2] == f"d{number}"


@pytest.mark.parametrize(("vocabulary", "high"), [(SMALL, 999), (LARGE, 69_999)])
def test_files_equal_those_of_megatron_core(
    tmp_path: Path, vocabulary: Vocabulary, high: int
) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    documents = [([1, high, 3], b"\0\0\0"), ([high], b"\0"), (list(range(50)), b"\0" * 50)]
    write(tmp_path, documents, vocabulary)
    dataset = IndexedDataset(str(tmp_path / "chat"))
    assert dataset.index.dtype is DType.optimal_dtype(vocabulary.padded_vocab_size)
    assert [dataset[i].tolist() for i in range(len(dataset))] == [ids for ids, _ in documents]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dataset.index.dtype)
    for ids, _ in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        ours, theirs = (tmp_path / f"{name}{suffix}" for name in ("chat", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(("mode", "flag"), [(1, 0), (2, MODE2)])
def test_a_corpus_by_megatron_loads_without_flags(tmp_path: Path, mode: int, flag: int) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = [[[3, 4], [5]], [[6, 7, 8]], [[9], [10], [11, 12]]]  # sentences of documents
    builder = IndexedDatasetBuilder(str(tmp_path / "web.bin"), dtype=np.int32)
    for sentences in documents:
        tokens = [i for sentence in sentences for i in sentence]
        builder.add_document(torch.tensor(tokens), [len(s) for s in sentences])
    builder.finalize(str(tmp_path / "web.idx"))
    with pytest.raises(DataError, match="mode is unknown"):
        Source.open(tmp_path, "web")
    source = Source.open(tmp_path, "web", mode=mode)
    ids, flags = source.read(1, 9)
    assert ids.tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert flags.tolist() == [flag] * 8
    assert source.document_starts(0, 10).tolist() == [0, 3, 6]
    assert [source.document_of(t) for t in range(10)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    ids, _, *rest = source.document(2)
    assert (ids.tolist(), rest) == ([9, 10, 11, 12], ["web:2", "web", "plain"])
    digests = source.content_digests
    assert (source.info, list(digests)) == ({}, ["sampled"])
    changed = bytearray((tmp_path / "web.bin").read_bytes())
    changed[5] ^= 1
    (tmp_path / "web.bin").write_bytes(bytes(changed))
    assert Source.open(tmp_path, "web", mode=mode).content_digests != digests


@pytest.mark.parametrize("suffix", SEALED_SUFFIXES)
def test_truncated_and_missing_files_are_named(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, EXAMPLE)
    path = tmp_path / f"chat{suffix}"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"chat{suffix} ".replace(".", r"\.")):
        Source.open(tmp_path, "chat")
    path.unlink()
    with pytest.raises(DataError, match=rf"chat{suffix} ".replace(".", r"\.")):
        Source.open(tmp_path, "chat")


def test_other_refusals(tmp_path: Path) -> None:
    write(tmp_path, EXAMPLE)
    with pytest.raises(DataError, match=r"the sources in .* are: chat"):
        Source.open(tmp_path, "chta")
    with pytest.raises(DataError, match="prepared as Mode 2 but the config lists it as Mode 1"):
        Source.open(tmp_path, "chat", mode=1)
    LARGE.write(tmp_path)
    with pytest.raises(DataError, match="prepared with tokenizer aaaaaaaaaaaa"):
        Source.open(tmp_path, "chat")
    SMALL.write(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"another model")
    with pytest.raises(DataError, match=r"tokenizer\.model has digest"):
        Source.open(tmp_path, "chat")
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json does not exist"):
        Source.open(tmp_path, "chat")
    SMALL.write(tmp_path)
    info = json.loads((tmp_path / "chat.json").read_text())
    (tmp_path / "chat.json").write_text(json.dumps({**info, "format": 99}))
    with pytest.raises(DataError, match="format 99"):
        Source.open(tmp_path, "chat")
    (tmp_path / "chat.json").unlink()
    with pytest.raises(DataError, match=r"chat\.json is missing beside its flags"):
        Source.open(tmp_path, "chat", mode=2)
    (tmp_path / "chat.idx").write_bytes(b"MMIDIDX\0\0" + b"\7" * 40)
    (tmp_path / "chat.flags.bin").unlink()
    with pytest.raises(DataError, match="accepted are version 1"):
        Source.open(tmp_path, "chat", mode=2)


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with SourceWriter(tmp_path, "chat", mode=2, vocabulary=SMALL) as writer:
            writer.add([1, 2], b"\x41\x01", id="a")
            assert not (tmp_path / "chat.bin").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_rewrite_replaces_the_source(tmp_path: Path) -> None:
    write(tmp_path, EXAMPLE)
    write(tmp_path, EXAMPLE[:1])
    source = Source.open(tmp_path, "chat")
    assert (source.documents, source.tokens) == (1, 3)


def test_reading_maps_and_does_not_load(tmp_path: Path) -> None:
    write(tmp_path, EXAMPLE)
    source: Any = Source.open(tmp_path, "chat")
    assert isinstance(source._ids, np.memmap)
    assert isinstance(source._flags, np.memmap)
    ids, flags = source.read(0, 2)
    flags[0] = CONTROL  # what a caller does to its copy stays there
    ids[0] = 9
    assert source.read(0, 1)[0][0] == 1
    assert source.read(0, 1)[1][0] == 0x41
