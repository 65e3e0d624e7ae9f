"""Write and read prepared sources: DIR/NAME.{bin,idx,flags.bin,docs.arrow,json}.

NAME.bin and NAME.idx are megatron-core's IndexedDataset; NAME.flags.bin has one byte a token
(`flags`); NAME.docs.arrow says which document starts where; NAME.json describes and seals them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mode.errors import DataError
from megatron_mode.tokens.flags import MODE2, counts_by_flag
from megatron_mode.tokens.source.document_table import (
    DocumentRow,
    DocumentTable,
    DocumentTableWriter,
)
from megatron_mode.tokens.source.hashed_file import HashedFile
from megatron_mode.tokens.source.index import Index, SpooledLengths, index_chunks
from megatron_mode.tokens.source.seal import (
    FORMAT_VERSION,
    SAMPLE_BYTES,
    SAMPLES,
    SEALED_SUFFIXES,
    check_ids,
    check_present,
    check_sizes,
    read_info,
    sampled_digest,
)
from megatron_mode.tokens.vocabulary import INFO_FILE, Vocabulary, read_vocabulary

SAMPLED = "sampled"
FLUSH_BYTES = 1 << 22
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
        self._tokens = 0
        self._histogram = np.zeros(256, np.int64)
        self._ids_buffer: list[NDArray[Any]] = []
        self._flags_buffer: list[bytes] = []
        self._buffered_tokens = 0
        self._files: dict[str, HashedFile] = {}
        self._lengths = SpooledLengths(self._root / f".{name}.lengths.partial")
        try:
            for suffix in SEALED_SUFFIXES:
                self._files[suffix] = HashedFile(self._root / f"{name}{suffix}")
            self._table = DocumentTableWriter(self._files[".docs.arrow"])
        except OSError:
            self.discard()
            raise

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
        self._ids_buffer.append(np.asarray(ids, self._dtype))
        self._flags_buffer.append(flags)
        row = DocumentRow(
            id, source or self._name, rendering or self.info["rendering"], self._tokens
        )
        self._table.add(row)
        self._lengths.append(len(flags))
        self._tokens += len(flags)
        self._buffered_tokens += len(flags)
        if self._buffered_tokens >= FLUSH_BYTES or len(self._flags_buffer) >= FLUSH_DOCUMENTS:
            self._flush()

    def _flush(self) -> None:
        if not self._ids_buffer:
            return
        ids = np.concatenate(self._ids_buffer)
        flags = b"".join(self._flags_buffer)
        limit = self._vocabulary.padded_vocab_size
        assert ids.size == 0 or ids.max() < limit, "ids lie inside the vocabulary"
        self._files[".bin"].write(ids.tobytes())
        self._files[".flags.bin"].write(flags)
        self._histogram += np.bincount(np.frombuffer(flags, np.uint8), minlength=256)
        self._ids_buffer.clear()
        self._flags_buffer.clear()
        self._buffered_tokens = 0

    def finish(self) -> dict[str, Any]:
        """Complete the files, give them their names (NAME.json last) and return NAME.json."""
        self._flush()
        self._table.close()
        for chunk in index_chunks(self._lengths, self._dtype.name):
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
            "documents": len(self._lengths),
            "tokens": self._tokens,
            "flags": counts_by_flag(self._histogram),
            **self.info,
            "files": {suffix: file.description() for suffix, file in self._files.items()},
        }
        seal = HashedFile(self._root / f"{self._name}.json")
        self._files[".json"] = seal
        seal.write((json.dumps(self.info, indent=2, ensure_ascii=False) + "\n").encode())
        seal.close()
        for file in self._files.values():
            os.replace(file.temporary, file.path)
        self._lengths.remove()
        return self.info

    def discard(self) -> None:
        """Remove what was written so far."""
        for file in self._files.values():
            # A full disk refuses the last buffer; the file goes anyway.
            with contextlib.suppress(OSError):
                file.close()
            file.temporary.unlink(missing_ok=True)
        self._lengths.remove()

    def __enter__(self) -> SourceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self.finish()
        except BaseException:
            self.discard()
            raise


class Source:
    """Read one prepared source through memory maps."""

    vocab_size: int | None = None
    """All ids are below it; None checks nothing."""

    def __init__(self, root: Path, name: str, mode: int, info: dict[str, Any]) -> None:
        self.root, self.name, self.mode, self.info = root, name, mode, info
        self._index = Index(self._path(".idx"))
        self.tokens, self.documents = self._index.tokens, self._index.documents
        check_sizes(root, name, self.tokens, self._index.dtype.itemsize, info)
        self._ids = self._map(".bin", self._index.dtype)
        self._flags = self._map(".flags.bin", np.dtype(np.uint8)) if self.has_flags else None
        self._table: DocumentTable | None = None

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
    def has_flags(self) -> bool:
        """Tell whether a flags file stands beside the tokens."""
        return bool(self.info)

    @property
    def content_digests(self) -> dict[str, str]:
        """Return the SHA-256 of each content file as recorded at preparation, by suffix.

        Without a record, one digest of samples (`seal.sampled_digest`) under SAMPLED.
        """
        if not self.has_flags:
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
        if self.vocab_size is not None:
            where, begin = self.root / self.name, begin_token
            check_ids(where, ids, self.vocab_size, lambda at: self.document_of(begin + at))
        if self._flags is not None:
            return ids, np.array(self._flags[begin_token:end_token])
        return ids, np.full(len(ids), MODE2 if self.mode == 2 else 0, np.uint8)

    def limit_ids(self, vocab_size: int) -> None:
        """Refuse ids outside of the vocabulary: here in samples, later in all that is read."""
        self.vocab_size = vocab_size
        for number in range(SAMPLES):
            begin = max(self.tokens - SAMPLE_BYTES, 0) * number // (SAMPLES - 1)
            self.read(begin, begin + SAMPLE_BYTES)

    def verify_index(self) -> None:
        """Read the complete index; raise DataError where it is wrong."""
        self._index.verify(self._path(".idx"))

    def document_starts(self, begin_token: int, end_token: int) -> NDArray[np.int64]:
        """Return the first tokens of the documents that start in [begin_token, end_token)."""
        return self._index.document_starts(begin_token, end_token)

    def document_of(self, token: int) -> int:
        """Return the document that a token belongs to."""
        return self._index.document_of(token)

    def document_spans(self, begin: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the first token and the length in tokens of documents begin .. end - 1."""
        return self._index.document_spans(begin, end)

    def find_document(self, id: str) -> int | None:
        """Return the index of the document of an id, None where there is none: a scan of ids."""
        if not self.has_flags:
            stem, _, number = id.rpartition(":")
            found = stem == self.name and number.isdecimal() and int(number) < self.documents
            return int(number) if found else None
        return DocumentTable(self._path(".docs.arrow")).find(id)

    def document(self, index: int) -> tuple[NDArray[Any], NDArray[Any], str, str, str]:
        """Return ids, flags, id, source and rendering of one document."""
        ids, flags = self.read(
            self._index.document_start(index), self._index.document_start(index + 1)
        )
        if not self.has_flags:
            return ids, flags, f"{self.name}:{index}", self.name, "plain"
        if self._table is None:
            self._table = DocumentTable(self._path(".docs.arrow"))
        row = self._table.row(index)
        return ids, flags, row.id, row.source, row.rendering

    def _path(self, suffix: str) -> Path:
        return self.root / f"{self.name}{suffix}"

    def _map(self, suffix: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        if self.tokens == 0:
            return np.empty(0, dtype)  # an empty file cannot be mapped
        return np.memmap(self._path(suffix), dtype, mode="r")
