"""Check that the prepared files a run reads are what was sealed.

RUN/data.json keeps a digest of samples of every file: a few blocks, which the next start compares
before anything is read. The complete digests take longer. They are computed once a run, in the
background of its first steps; a file that was found intact is noted in data.json too.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mode.atomic import write_whole
from megatron_mode.checkpoint.collective import from_rank_0
from megatron_mode.checkpoint.files import describe
from megatron_mode.config import Config
from megatron_mode.errors import DataError
from megatron_mode.mix.corpus import Corpus
from megatron_mode.tokens.source.row_table import table_path
from megatron_mode.tokens.source.seal import sampled_digest
from megatron_mode.tokens.source.shards import SAMPLED, Source

RECORD_NAME = "data.json"
WAIT_SECONDS = 10.0


def sealed_files(
    sources: Iterable[Source], packed_whole: Collection[str], seq_len: int
) -> dict[Path, str]:
    """Return the SHA-256 that NAME.json states of every file of the sources.

    Row tables count where `packed_whole` names their source. Sources by Megatron's own tools state
    no digests and are passed over.
    """
    expected = {}
    for source in sources:
        for suffix, digest in source.content_digests.items():
            if suffix != SAMPLED:
                expected[source.root / f"{source.name}{suffix}"] = digest
        table = source.row_table_digest(seq_len)
        if table and source.name in packed_whole:
            expected[table_path(source.root, source.name, seq_len)] = table
    return expected


def check_file(path: Path, digest: str) -> int:
    """Hash a file again and return its size; DataError where it is not what was sealed."""
    try:
        found = describe(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); copy or prepare it again"
        ) from None
    if found.sha256 != digest:
        raise DataError(
            f"{path} has SHA-256 {found.sha256[:12]} but its source's .json file says "
            f"{digest[:12]}: it changed since it was prepared; copy or prepare it again"
        )
    return found.bytes


class DataCheck:
    """Check what a run reads: samples when it is made, complete digests on a thread of rank 0."""

    def __init__(self, folder: Path, config: Config, corpus: Corpus) -> None:
        """Compare samples with those of the run's earlier starts; all ranks call it.

        Raises DataError on every rank where one differs. Nothing is written before `start`.
        """
        self._record, self._verify, self._failure = folder / RECORD_NAME, config.data.verify, ""
        entries = (*config.mix.mode1.sources, *config.mix.mode2.sources)
        packed_whole = {entry.name for entry in entries if entry.packing == "whole"}
        sources = {source.name: source for source in (*corpus.valid, *corpus.read_sources)}
        self._files = sealed_files(sources.values(), packed_whole, config.model.seq_len)
        self._known: dict[str, dict[str, Any]] = {}
        from_rank_0(self._compare_samples)
        self._thread = threading.Thread(target=self._hash_all, name="data check", daemon=True)

    def start(self) -> None:
        """Note the samples in RUN/data.json once the run resumed; `data.verify` hashes the rest."""
        if dist.get_rank() == 0:
            self._write()
            if self._verify:
                self._thread.start()

    def check(self) -> None:
        """Raise DataError on rank 0 where the thread met a file that is not what was sealed."""
        if self._failure:
            raise DataError(self._failure)

    def wait(self) -> None:
        """Give the last files a moment at the end of a run, and check them."""
        if self._thread.is_alive():
            self._thread.join(WAIT_SECONDS)
        self.check()

    def _compare_samples(self) -> None:
        before: Any = {}
        with contextlib.suppress(OSError, ValueError, RecursionError):
            before = json.loads(self._record.read_text(encoding="utf-8"))
        for path, digest in self._files.items():
            known = before.get(path.name) if isinstance(before, dict) else None
            if not isinstance(known, dict) or known.get("sha256") != digest:
                known = {"sha256": digest, "complete": False}  # new, or prepared again
            sample = sampled_digest([path])
            if known.setdefault("sample", sample) != sample:
                check_file(path, digest)  # which a file that was mended since passes
                known = {"sha256": digest, "complete": True, "sample": sample}
            self._known[path.name] = known

    def _hash_all(self) -> None:
        for path, digest in self._files.items():
            known = self._known[path.name]
            if not known["complete"]:
                try:
                    check_file(path, digest)
                except DataError as error:  # the training loop asks for it
                    self._failure = str(error)
                else:
                    known["complete"] = True
                self._write()

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # a full disk: the next start checks again
            write_whole(self._record, json.dumps(self._known, indent=1) + "\n")
