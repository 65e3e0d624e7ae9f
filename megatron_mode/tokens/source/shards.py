"""Write and read prepared sources: DIR/NAME.{bin,idx,flags.bin,docs.arrow,json}.

NAME.bin and NAME.idx are megatron-core's IndexedDataset; NAME.flags.bin has one byte a token
(`flags`); NAME.docs.arrow says which document starts where; NAME.json describes and seals them.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from megatron_mode.atomic import HashedFile
from megatron_mode.errors import DataError
from megatron_mode.tokens.flags import MODE2, counts_by_flag
from megatron_mode.tokens.source.document_table import DocumentTableWriter, read_document_table
from megatron_mode.tokens.source.index import Index, index_chunks
from megatron_mode.tokens.source.seal import (
    FORMAT_VERSION,
    SAMPLE_BYTES,
    SEALED_SUFFIXES,
    check_present,
    read_info,
    sample_places,
    sampled_digest,
    write_info,
)
from megatron_mode.tokens.vocabulary import INFO_FILE, Vocabulary, read_vocabulary

SAMPLED = "sampled"
FLUSH_BYTES = 1 << 20
FLUSH_DOCUMENTS = 1 << 14  # Each held takes 250 bytes beside its tokens.


class SourceWriter:
    """Write one prepared source; its files appear under their names only when it is complete.

    Use it as a context: leaving it normally publishes the source, an exception removes it.
    """

    def __init__(
        self, root: str | Path, name: str, *, mode: int, vocabulary: Vocabulary, **info: Any
    ) -> None:
        """Open the files. info is written to NAME.json (rendering, licence, seed, ...)."""
        self._root, self._name, self._mode = Path(root), name, mode
        self.info: dict[str, Any] = {"rendering": "plain" if mode == 1 else "chat", **info}
        self._vocabulary = vocabulary
        self._dtype = np.dtype(vocabulary.token_dtype)
        self._documents = self._tokens = self._held_tokens = 0
        self._histogram = np.zeros(256, np.int64)
        self._held_ids: list[NDArray[Any]] = []
        self._held_flags: list[bytes] = []
        self._files: dict[str, HashedFile] = {}
        with contextlib.ExitStack() as stack:
            self._lengths = stack.enter_context(tempfile.TemporaryFile(dir=self._root))
            for suffix in SEALED_SUFFIXES:
                file = HashedFile(self._root / f".{name}{suffix}.partial")
                stack.callback(remove_partial, file)
                self._files[suffix] = file
            self._table = DocumentTableWriter(self._files[".docs.arrow"])
            self._open = stack.pop_all()

    def add(
        self,
        ids: Sequence[int] | NDArray[Any],
        flags: bytes,
        *,
        id: str,
        source: str | None = None,
        rendering: str | None = None,
    ) -> None:
        """Append one document: its ids, and a flag byte for each."""
        assert len(ids) == len(flags), "a flag byte for each token"
        rendering = rendering or self.info["rendering"]
        self._table.add(id, source or self._name, rendering, self._tokens)
        self._held_ids.append(np.asarray(ids, self._dtype))
        self._held_flags.append(flags)
        self._tokens += len(flags)
        self._held_tokens += len(flags)
        if self._held_tokens >= FLUSH_BYTES or len(self._held_flags) >= FLUSH_DOCUMENTS:
            self._flush()

    def _flush(self) -> None:
        if not self._held_ids:
            return
        ids = np.concatenate(self._held_ids)
        flags = b"".join(self._held_flags)
        limit = self._vocabulary.padded_vocab_size
        assert ids.size == 0 or ids.max() < limit, "ids are inside the vocabulary"
        self._files[".bin"].write(ids)
        self._files[".flags.bin"].write(flags)
        self._lengths.write(np.array(list(map(len, self._held_flags)), "<i4").tobytes())
        self._lengths.flush()
        self._histogram += np.bincount(np.frombuffer(flags, np.uint8), minlength=256)
        self._documents += len(self._held_flags)
        self._held_tokens = 0
        self._held_ids.clear()
        self._held_flags.clear()

    def _finish(self) -> None:
        """Complete the files and give them their names, NAME.json last."""
        self._flush()
        self._table.close()
        # An empty file cannot be mapped.
        lengths = np.memmap(self._lengths, "<i4", "r") if self._documents else np.empty(0, "<i4")
        for chunk in index_chunks(lengths, self._dtype.name):
            self._files[".idx"].write(chunk)
        for file in self._files.values():
            file.close()
        self.info = {
            "format": FORMAT_VERSION,
            "name": self._name,
            "mode": self._mode,
            "tokenizer": self._vocabulary.digest,
            "vocab_size": self._vocabulary.vocab_size,
            "padded_vocab_size": self._vocabulary.padded_vocab_size,
            "documents": self._documents,
            "tokens": self._tokens,
            "flags": counts_by_flag(self._histogram),
            **self.info,
            "files": {suffix: file.description for suffix, file in self._files.items()},
        }
        for suffix, file in self._files.items():
            file.path.replace(self._root / f"{self._name}{suffix}")
        write_info(self._root, self._name, self.info)

    def __enter__(self) -> SourceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._open:
            if kind is None:
                self._finish()


def remove_partial(file: HashedFile) -> None:
    """Remove a file that has no name of its own yet, even if a full disk refuses its last bytes."""
    with contextlib.suppress(OSError):
        file.close()
    file.path.unlink(missing_ok=True)


class Source(Index):
    """Read a prepared source through memory maps: the index of its documents, and their tokens."""

    vocab_size: int | None = None
    """All ids are below it; None checks nothing."""

    def __init__(self, root: Path, name: str, mode: int, info: dict[str, Any]) -> None:
        self.root, self.name, self.mode, self.info = root, name, mode, info
        super().__init__(self._path(".idx"))
        self._check_sizes()
        self._ids = self._map(".bin", self.dtype)
        self._flags = self._map(".flags.bin", np.dtype(np.uint8)) if info else None

    def _check_sizes(self) -> None:
        """Compare file sizes with the index and NAME.json."""
        expected = {".bin": self.tokens * self.dtype.itemsize}
        if self.info:
            files = self.info["files"]
            expected[".flags.bin"] = self.tokens
            expected |= {suffix: files[suffix]["bytes"] for suffix in (".idx", ".docs.arrow")}
        for suffix, size_bytes in expected.items():
            path = self._path(suffix)
            found = path.stat().st_size if path.exists() else None
            if found != size_bytes:
                state = "is missing" if found is None else f"has {found} bytes"
                raise DataError(
                    f"{path} {state} where {size_bytes} bytes are expected; prepare or copy the "
                    "source again."
                )

    @functools.cached_property
    def _table(self) -> Any:
        return read_document_table(self._path(".docs.arrow"))

    @classmethod
    def open(cls, root: str | Path, name: str, mode: int | None = None) -> Source:
        """Open DIR/NAME and check mode, tokenizer and sizes; raise DataError naming the file.

        mode is what the config says; a corpus without flags (Megatron's own) needs it.
        """
        root = Path(root)
        check_present(root, name)
        info = read_info(root, name)
        if not info:
            if mode is None:
                raise DataError(
                    f"Source {root / name} has no {name}.json, so its mode is unknown; list it "
                    "under mix.mode1 or mix.mode2, or set its mode to 1 or 2."
                )
            return cls(root, name, mode, info)
        if mode is not None and mode != info["mode"]:
            raise DataError(
                f"Source {root / name} is prepared as Mode {info['mode']} but the config lists it "
                f"as Mode {mode}; list it under mix.mode{info['mode']}.sources."
            )
        vocabulary = read_vocabulary(root)
        if vocabulary.digest != info["tokenizer"]:
            raise DataError(
                f"Source {root / name} was prepared with tokenizer {info['tokenizer'][:12]} but "
                f"{root / INFO_FILE} names {vocabulary.digest[:12]}; prepare the source again "
                "with this tokenizer."
            )
        return cls(root, name, info["mode"], info)

    @property
    def content_digests(self) -> dict[str, str]:
        """Return the SHA-256 of each content file as recorded at preparation, by suffix.

        Without a record, one digest of samples (`seal.sampled_digest`) under SAMPLED.
        """
        if not self.info:
            return {SAMPLED: sampled_digest([self._path(".bin"), self._path(".idx")])}
        return {suffix: file["sha256"] for suffix, file in self.info.get("files", {}).items()}

    @property
    def mode_tokens(self) -> dict[str, Any] | None:
        """Return how mode tokens stand in the documents, None where there are none."""
        found = self.info.get("mode_tokens")
        return found if isinstance(found, dict) else None

    def row_table_digest(self, seq_len: int) -> str | None:
        """Return the SHA-256 of NAME.rows.T.bin as recorded when it was packed."""
        digest: str | None = self.info.get("row_tables", {}).get(str(seq_len), {}).get("sha256")
        return digest

    def read(self, begin_token: int, end_token: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return ids (int64) and flags (uint8) of tokens [begin_token, end_token).

        Raises DataError for an id outside of the vocabulary.
        """
        ids = self._ids[begin_token:end_token].astype(np.int64)
        # One comparison: as unsigned numbers negative ids are the largest.
        if self.vocab_size and len(ids) and ids.view(np.uint64).max() >= self.vocab_size:
            at = int(np.argmax((ids < 0) | (ids >= self.vocab_size)))
            raise DataError(
                f"Source {self.root / self.name} has the id {ids[at]} in document "
                f"{self.document_of(begin_token + at)}; accepted are ids from 0 to "
                f"{self.vocab_size - 1} (model.vocab_size is {self.vocab_size}), so set it to the "
                "padded vocabulary of the tokenizer, or prepare or copy the source again."
            )
        if self._flags is not None:
            return ids, np.array(self._flags[begin_token:end_token])
        return ids, np.full(len(ids), MODE2 if self.mode == 2 else 0, np.uint8)

    def limit_ids(self, vocab_size: int) -> None:
        """Refuse ids outside of the vocabulary: here in samples, later in all that is read."""
        self.vocab_size = vocab_size
        for begin in sample_places(self.tokens):
            self.read(begin, begin + SAMPLE_BYTES)

    def find_document(self, id: str) -> int | None:
        """Return the index of the document of an id, None where there is none: a scan of ids."""
        if self.info:
            is_text = not any("\ud800" <= c <= "\udfff" for c in id)  # as all in a UTF-8 file is
            at = pc.index(self._table["id"], id).as_py() if is_text else -1
            return None if at < 0 else int(at)
        stem, _, number = id.rpartition(":")
        found = stem == self.name and number.isdecimal() and int(number) < self.documents
        return int(number) if found else None

    def document(self, index: int) -> tuple[NDArray[Any], NDArray[Any], str, str, str]:
        """Return ids, flags, id, source and rendering of one document."""
        (begin,), (length,) = self.document_spans(index, index + 1)
        ids, flags = self.read(int(begin), int(begin + length))
        if not self.info:
            return ids, flags, f"{self.name}:{index}", self.name, "plain"
        (row,) = self._table.slice(index, 1).to_pylist()
        return ids, flags, row["id"], row["source"], row["rendering"]

    def _path(self, suffix: str) -> Path:
        return self.root / f"{self.name}{suffix}"

    def _map(self, suffix: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        if self.tokens == 0:
            return np.empty(0, dtype)  # an empty file cannot be mapped
        return np.memmap(self._path(suffix), dtype, mode="r")
