"""Collect rendered documents on disk in input order, then write them shuffled as a source.

In memory stay some 50 bytes a document; tokens, flags and ids lie in files beside the target.
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mode.tokens.encode import RENDERING_CODES, StagedPart
from megatron_mode.tokens.shards import SourceWriter
from megatron_mode.tokens.split import Split
from megatron_mode.tokens.vocabulary import Vocabulary


class Stage:
    """Hold one prepared source while its documents are still in input order."""

    def __init__(self, folder: Path, part: StagedPart) -> None:
        self.name, self.source, self.mode = part.name, part.source, part.mode
        self._base = folder / f"{part.name}.staged"
        self._renderings = bytearray()
        self._id_lengths, self._lengths, self._keys = array("i"), array("i"), array("Q")

    @property
    def keys(self) -> NDArray[np.uint64]:
        """Return the order key of each document, in input order."""
        return np.frombuffer(self._keys, np.uint64)

    def append(self, part: StagedPart) -> None:
        """Append a batch. Files are opened anew each time: any number of sources may be open."""
        for suffix, data in ((".bin", part.tokens), (".flags", part.flags), (".ids", part.ids)):
            with self._path(suffix).open("ab") as stream:
                stream.write(data)
        self._renderings += part.renderings
        self._id_lengths += part.id_lengths
        self._lengths += part.lengths
        self._keys += part.keys

    def write(
        self,
        root: Path,
        vocabulary: Vocabulary,
        split: Split,
        known_keys: NDArray[np.uint64],
        **info: Any,
    ) -> dict[str, Any]:
        """Write the shuffled source, remove the staged files and return NAME.json.

        known_keys are the sorted keys of everything that shares this source's name.
        """
        tokens = self._map(".bin", np.dtype(vocabulary.token_dtype))
        flags = self._map(".flags", np.dtype(np.uint8))
        ids = self._map(".ids", np.dtype(np.uint8))
        ends = np.cumsum(np.frombuffer(self._lengths, np.int32), dtype=np.int64)
        id_ends = np.cumsum(np.frombuffer(self._id_lengths, np.int32), dtype=np.int64)

        def identifier(document: int) -> str:
            end = int(id_ends[document])
            return ids[end - self._id_lengths[document] : end].tobytes().decode()

        keys = self.keys.copy()
        renamed = self._rename_repeats(keys, known_keys, split, identifier)
        writer = SourceWriter(
            root,
            self.name,
            mode=self.mode,
            vocabulary=vocabulary,
            rendering=self._rendering(),
            plain_documents=self._renderings.count(RENDERING_CODES.index("plain")),
            repeated_ids=len(renamed),
            **info,
        )
        with writer:
            for document in np.argsort(keys, kind="stable").tolist():
                end = int(ends[document])
                span = slice(end - self._lengths[document], end)
                writer.add(
                    tokens[span],
                    flags[span].tobytes(),
                    id=renamed.get(document) or identifier(document),
                    source=self.source,
                    rendering=RENDERING_CODES[self._renderings[document]],
                )
        for suffix in (".bin", ".flags", ".ids"):
            self._path(suffix).unlink()
        return writer.info

    def _rendering(self) -> str:
        found = set(self._renderings)
        return RENDERING_CODES[found.pop()] if len(found) == 1 else "mixed"

    def _rename_repeats(
        self,
        keys: NDArray[np.uint64],
        known_keys: NDArray[np.uint64],
        split: Split,
        identifier: Any,
    ) -> dict[int, str]:
        """Give the second and later document of an id a suffix, and its own key in `keys`."""
        order = np.argsort(keys, kind="stable")
        repeats = order[1:][keys[order][1:] == keys[order][:-1]]
        taken: set[int] = set()
        last_number: dict[int, int] = {}
        renamed: dict[int, str] = {}
        for document in repeats.tolist():
            first_key = int(keys[document])
            number = last_number.get(first_key, 1)
            while True:
                number += 1
                candidate = f"{identifier(document)}#{number}"
                key = split.order_key(self.source, candidate)
                if key not in taken and not contains(known_keys, key):
                    break
            last_number[first_key] = number
            taken.add(key)
            renamed[document] = candidate
            keys[document] = key
        return renamed

    def _path(self, suffix: str) -> Path:
        return self._base.with_name(self._base.name + suffix)

    def _map(self, suffix: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        path = self._path(suffix)
        if path.stat().st_size == 0:
            return np.empty(0, dtype)  # an empty file cannot be mapped
        return np.memmap(path, dtype, mode="r")


def contains(sorted_keys: NDArray[np.uint64], key: int) -> bool:
    """Tell whether a sorted array holds a key."""
    position = int(np.searchsorted(sorted_keys, np.uint64(key)))
    return position < len(sorted_keys) and int(sorted_keys[position]) == key
