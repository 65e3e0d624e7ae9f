"""Check copies, repeated ids and the shuffle against a preparation that holds everything."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_mode.errors import DataError
from megatron_mode.tokens.documents import read_documents
from megatron_mode.tokens.prepare import buckets, encode, units
from megatron_mode.tokens.prepare.request import Split
from megatron_mode.tokens.source.shards import Source
from megatron_mode.tokens.template import content_bytes

RunPrepare = Callable[..., int]
WriteLines = Callable[[Path, list[Any]], Path]
Dialogue = Callable[..., dict[str, Any]]

IDS = st.sampled_from(["a", "b", "a#2", "a#3", "a#2#2", "b#02", "b#", "#2", "c"])
LINES = st.lists(st.tuples(IDS, st.integers(0, 6), st.booleans()), min_size=1, max_size=40)


def expected(path: Path, keeps_copies: bool) -> dict[str, list[str]]:
    """Return the ids of each source in input order: copies dropped, the others unique."""
    met: set[Any] = set()
    kept = defaultdict(list)
    for document in read_documents(path):
        contents = (document.source, *content_bytes(document))
        if keeps_copies or contents not in met:
            kept[document.source].append(document.id)
        met.add(contents)
    unique = {}
    for source, ids in kept.items():
        existing, used = set(ids), set()
        unique[source] = []
        for identifier in ids:
            name = identifier
            if name in used:
                numbered = (f"{identifier}#{number}" for number in itertools.count(2))
                name = next(n for n in numbered if n not in existing and n not in used)
            used.add(name)
            unique[source].append(name)
    return unique


def prepared_ids(root: Path, sources: list[str]) -> dict[str, list[str]]:
    found = {}
    for name in sources:
        outputs = [f"{name}{suffix}" for suffix in ("", "-valid", "-valid-plain")]
        present = [Source.open(root, n) for n in outputs if (root / f"{n}.idx").exists()]
        found[name] = sorted(s.document(i)[2] for s in present for i in range(s.documents))
    return found


@pytest.fixture
def tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make units, buckets and pieces hold next to nothing, so that borders are met."""
    for module, name, value in (
        (encode, "BATCH_LINES", 3), (units, "UNIT_BYTES", 60), (buckets, "BUCKET_BYTES", 400),
        (buckets, "SCANNED_ENTRIES", 2),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("duplicates", ["drop", "keep"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES)
def test_copies_and_ids(
    tmp_path: Path, write_lines: WriteLines, dialogue: Dialogue, run_prepare: RunPrepare,
    tiny_pieces: None, duplicates: str, lines: list[tuple[str, int, bool]],
) -> None:  # fmt: skip
    objects = [
        dialogue(name, str(content), "Aye.")
        if is_chat
        else {"id": name, "source": "books", "text": str(content)}
        for name, content, is_chat in lines
    ]
    path = write_lines(tmp_path / "in.jsonl", objects)
    arguments = ("--valid-share", "0.4", "--duplicates", duplicates, "--workers", "1")
    run_prepare("--out", tmp_path / "d", "--input", path, *arguments)
    wanted = expected(path, duplicates == "keep")
    found = prepared_ids(tmp_path / "d", list(wanted))
    assert found == {name: sorted(ids) for name, ids in wanted.items()}
    for source, ids in wanted.items():
        total = sum((o["source"] == source) for o in objects)
        infos = [json.loads(p.read_text()) for p in (tmp_path / "d").glob(f"{source}*.json")]
        assert {info["duplicates_dropped"] for info in infos} == {total - len(ids)}


def test_the_first_copy_stays_and_its_id_decides(
    tmp_path: Path, write_lines: WriteLines, run_prepare: RunPrepare
) -> None:
    lines = [{"id": f"{copy}{i}", "text": f"Page {i}."} for copy in "ab" for i in range(300)]
    path = write_lines(tmp_path / "s.jsonl", lines)
    run_prepare("--out", tmp_path / "d", "--input", path, "--valid-share", "0.3")
    ids = prepared_ids(tmp_path / "d", ["s"])["s"]
    assert ids == sorted(f"a{i}" for i in range(300))
    split = Split(1234, 0.25, 0.3, frozenset())
    held_out = Source.open(tmp_path / "d", "s-valid")
    drawn = [d.id for d in itertools.islice(read_documents(path), 300) if split.is_held_out(d)]
    assert sorted(held_out.document(i)[2] for i in range(held_out.documents)) == sorted(drawn)


def test_a_dialogue_is_a_copy_whatever_its_rendering(
    tmp_path: Path, write_lines: WriteLines, dialogue: Dialogue, run_prepare: RunPrepare
) -> None:
    lines = [dialogue(f"d{i}", "What is it?", "A whale.") for i in range(50)]
    other = {
        "id": "x",
        "source": "chat",
        "messages": [{"role": "system", "content": "What is it?"}],
    }
    path = write_lines(tmp_path / "in.jsonl", [*lines, other])
    run_prepare("--out", tmp_path / "d", "--input", path, "--plain-share", "0.5")
    source = Source.open(tmp_path / "d", "chat")
    assert (source.documents, source.info["duplicates_dropped"]) == (2, 49)


def test_a_repeated_id_can_be_refused(
    tmp_path: Path, write_lines: WriteLines, run_prepare: RunPrepare, tiny_pieces: None
) -> None:
    lines = [{"id": f"n{i}", "source": "s", "text": f"{i}"} for i in range(20)]
    lines[5]["id"] = lines[17]["id"] = "twin"
    path = write_lines(tmp_path / "in.jsonl", lines)
    arguments = ("--out", tmp_path / "d", "--input", path, "--duplicate-ids", "error")
    with pytest.raises(DataError, match=r"id twin at in.jsonl:6 and at in.jsonl:18"):
        run_prepare(*arguments)
    lines[17]["text"] = "5"  # a copy of the other, which is dropped
    write_lines(path, lines)
    run_prepare(*arguments)
    assert Source.open(tmp_path / "d", "s").documents == 19


def test_all_documents_may_share_one_id(
    tmp_path: Path, write_lines: WriteLines, run_prepare: RunPrepare, tiny_pieces: None
) -> None:
    lines = [{"id": "0", "source": "s", "text": f"{i}"} for i in range(100)]
    path = write_lines(tmp_path / "in.jsonl", lines)
    run_prepare("--out", tmp_path / "d", "--input", path)
    names = {"0", *(f"0#{number}" for number in range(2, 101))}
    assert set(prepared_ids(tmp_path / "d", ["s"])["s"]) == names
    assert Source.open(tmp_path / "d", "s").info["repeated_ids"] == 99


@pytest.mark.parametrize("duplicates", ["drop", "keep"])
def test_the_shuffle_is_a_uniform_permutation(
    tmp_path: Path, write_lines: WriteLines, run_prepare: RunPrepare, duplicates: str
) -> None:
    count, parts = 8000, 10
    lines = [{"id": str(i), "source": "s", "text": f"{i}"} for i in range(count)]
    path = write_lines(tmp_path / "in.jsonl", lines)
    run_prepare("--out", tmp_path / "d", "--input", path, "--duplicates", duplicates)
    source = Source.open(tmp_path / "d", "s")
    order = np.array([int(source.document(i)[2]) for i in range(count)])
    assert np.array_equal(np.sort(order), np.arange(count))
    # Each tenth of the input falls evenly on the tenths of the output: 81 degrees of freedom,
    # chi-square below 143 in all but one of 20,000 shuffles. The seed is fixed.
    table = np.histogram2d(order, np.arange(count), bins=parts)[0]
    fair = count / parts**2
    assert ((table - fair) ** 2 / fair).sum() < 143
    assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 0.05
    assert (np.diff(order) == 1).sum() < 8


def test_kept_copies_do_not_lie_together(
    tmp_path: Path, write_lines: WriteLines, run_prepare: RunPrepare
) -> None:
    lines = [{"id": f"{i}", "source": "s", "text": f"{i % 100}"} for i in range(1000)]
    path = write_lines(tmp_path / "in.jsonl", lines)
    run_prepare("--out", tmp_path / "d", "--input", path, "--duplicates", "keep")
    source = Source.open(tmp_path / "d", "s")
    contents = [int(source.document(i)[2]) % 100 for i in range(source.documents)]
    neighbours = sum(a == b for a, b in itertools.pairwise(contents))
    assert source.documents == 1000
    assert neighbours < 30  # 10 are expected
