"""Open what a run reads: the vocabulary, the sources of the mix, of its edits and held out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mode.config.fields import Config
from megatron_mode.config.mix import SourceConfig
from megatron_mode.errors import ConfigError, DataError
from megatron_mode.mix.digest import order_config
from megatron_mode.mix.edits.documents import edited_sources, find_changed, find_document
from megatron_mode.mix.edits.overrides import EditStream, plan_edits
from megatron_mode.mix.order import Order
from megatron_mode.mix.packing import PackedSource, PackingName, pack
from megatron_mode.mix.rows import RowReader
from megatron_mode.mix.schedule import Integral
from megatron_mode.tokens.source.shards import Source
from megatron_mode.tokens.vocabulary import INFO_FILE, Vocabulary, padded, read_vocabulary


@dataclass(frozen=True)
class Corpus:
    """Hold opened sources.

    `train` is Mode 1 then Mode 2, in config order, as in Order; `edits` are the sources that
    injections, cohorts and replacements read, by name, those of the mix among them.
    """

    root: Path
    vocabulary: Vocabulary
    train: tuple[Source, ...]
    valid: tuple[Source, ...]
    edits: dict[str, Source]

    @property
    def document_id(self) -> int | None:
        """Return the id of `<|doc|>`; None for a corpus whose vocabulary does not name it."""
        return self.vocabulary.control.get("<|doc|>")

    @property
    def read_sources(self) -> tuple[Source, ...]:
        """Return every source that training reads, each once."""
        names = {source.name for source in self.train}
        return (*self.train, *(s for name, s in self.edits.items() if name not in names))


def open_corpus(config: Config) -> Corpus:
    """Open every source that the config names; DataError names what is missing or does not fit."""
    root = Path(config.data.root)
    vocabulary = find_vocabulary(config, root)
    mix = config.mix
    train = _open(root, mix.mode1.sources, 1) + _open(root, mix.mode2.sources, 2)
    valid = _open(root, mix.valid.sources, None)
    by_name = {source.name: source for source in train}
    asked = [name for name, _ in _edit_streams(config)]
    asked += [pair.by.partition("/")[0] for pair in mix.edits.replace]
    edits = {n: by_name.get(n) or Source.open(root, n) for n in dict.fromkeys(asked)}
    for source in (*train, *valid, *edits.values()):
        source.limit_ids(vocabulary.padded_vocab_size)
    return Corpus(root, vocabulary, train, valid, edits)


def find_vocabulary(config: Config, root: Path) -> Vocabulary:
    """Read tokenizer.json, or take model.vocab_size for a corpus by Megatron's own tools.

    Such a corpus has neither flags nor a tokenizer beside it; it then needs model.vocab_size.
    """
    given = config.model.vocab_size
    has_none = not (root / INFO_FILE).exists() and not any(root.glob("*.flags.bin"))
    if has_none and any(root.glob("*.idx")):
        if given is None:
            raise DataError(
                f"{root} holds no {INFO_FILE}, as Megatron's preprocess_data writes none: set "
                "model.vocab_size to the padded vocabulary of its tokenizer, or copy "
                f"{INFO_FILE} there"
            )
        return Vocabulary("", given, padded(given), {})
    return read_vocabulary(root)


def check_corpus(config: Config) -> None:
    """Raise DataError or ConfigError where the prepared data does not give the run its rows."""
    corpus = open_corpus(config)
    build_order(resolve_vocabulary(config, corpus), corpus)


def resolve_vocabulary(config: Config, corpus: Corpus) -> Config:
    """Fill model.vocab_size from the data, or refuse a config that says otherwise."""
    padded_size = corpus.vocabulary.padded_vocab_size
    given = config.model.vocab_size
    if given is not None and given != padded_size:
        raise ConfigError(
            f"model.vocab_size is {given}, but the data in {corpus.root} was prepared with a "
            f"padded vocabulary of {padded_size}: remove model.vocab_size or prepare the data again"
        )
    if padded_size % config.parallel.tensor:
        raise ConfigError(
            f"parallel.tensor is {config.parallel.tensor}, which does not divide the padded "
            f"vocabulary of {padded_size}: use a power of two up to 128"
        )
    return config.model_copy(
        update={"model": config.model.model_copy(update={"vocab_size": padded_size})}
    )


def packed_sources(config: Config, corpus: Corpus) -> list[PackedSource]:
    """Return the sources with their packings, in the order of Order.source_names.

    Those of the mix come first, then those that injections and cohorts show.
    """
    entries = (*config.mix.mode1.sources, *config.mix.mode2.sources)
    asked = [(source, entry.packing) for source, entry in zip(corpus.train, entries, strict=True)]
    packed = [pack(source, packing, config.model.seq_len) for source, packing in asked]
    shown = _edit_streams(config)
    return packed + [pack(corpus.edits[name], p, config.model.seq_len) for name, p in shown]


def build_order(config: Config, corpus: Corpus) -> Order:
    """Return the order of the complete run."""
    mix, seq_len, seed = config.mix, config.model.seq_len, config.run.seed
    total_rows = config.run.steps * config.batch.global_rows
    packed = packed_sources(config, corpus)
    mixed, shown = packed[: len(corpus.train)], packed[len(corpus.train) :]
    streams, notes = [], []
    for entry in shown:
        name, lengths = entry.source.name, entry.source.document_spans(0, entry.source.documents)[1]
        if not entry.rows:
            raise DataError(
                f"mix.edits reads {name} with packing {entry.packing}, which gives no row of "
                f"{seq_len} tokens; add text, lower model.seq_len or choose packing document"
            )
        streams.append(EditStream(name, entry.packing, entry.rows, entry.source.mode))
        if entry.packing == "document" and (cut := int((lengths > seq_len).sum())):
            notes.append(
                f"{cut:,} of {len(lengths):,} documents of {name} are longer than a row of "
                f"{seq_len} tokens: an edit that shows one cuts it off"
            )
    edits = plan_edits(
        mix,
        Integral(mix.mode2_fraction, seq_len, total_rows),
        streams,
        changed=find_changed(mix.edits, mixed, corpus.edits),
        documents={
            injection.document: find_document(injection.document, corpus.edits, "mix.edits.inject")
            for injection in mix.edits.inject
        },
        global_rows=config.batch.global_rows,
        seed=seed,
    )
    notes = [*edits.notes, *notes, *silent_notes(config, corpus)]
    rows = {entry.source.name: entry.rows for entry in mixed}
    edits = dataclasses.replace(edits, notes=notes)
    return Order(mix, seq_len, total_rows, seed, rows, edits=edits)


def order_settings(config: Config, corpus: Corpus, order: Order) -> dict[str, object]:
    """Return everything that the order depends on, the tokenizer included (`order_config`)."""
    tokenizer = {"data.tokenizer": corpus.vocabulary.digest}
    return {**order_config(config, corpus.read_sources, order.edits), **tokenizer}


def build_reader(config: Config, corpus: Corpus, sources: Sequence[Source]) -> RowReader:
    """Return the reader of rows of these sources, as streams: for held-out text."""
    seq_len = config.model.seq_len
    packed = [PackedSource(source, seq_len) for source in sources]
    return RowReader(packed, seq_len, config.mix, document_id=corpus.document_id)


def build_train_reader(config: Config, corpus: Corpus, order: Order) -> RowReader:
    """Return the reader of the rows that an order names, edits applied."""
    packed = packed_sources(config, corpus)
    packed = edited_sources(packed, order.edits.changed, corpus.edits, corpus.document_id)
    return RowReader(packed, config.model.seq_len, config.mix, document_id=corpus.document_id)


def _edit_streams(config: Config) -> list[tuple[str, PackingName]]:
    """Name the sources that injections and cohorts show, each packing of them once."""
    edits = config.mix.edits
    asked: list[tuple[str, PackingName]]
    asked = [(injection.document.partition("/")[0], "document") for injection in edits.inject]
    asked += [(cohort.source, cohort.packing) for cohort in edits.cohorts]
    return list(dict.fromkeys(asked))


def silent_notes(config: Config, corpus: Corpus) -> list[str]:
    """Say where the mix gives Mode 2 no LM loss because its sources hold no assistant turn."""
    flags = [source.info.get("flags", {}) for source in corpus.train if source.mode == 2]
    has_turns = any(counts.get("role_assistant", 0) for counts in flags)
    if config.mix.mode2_lm_loss != "assistant" or has_turns or not flags:
        return []
    return [
        "mix.mode2_lm_loss is assistant, but no Mode 2 source holds an assistant turn: Mode 2 "
        "carries no LM loss; set it to all to train on these texts"
    ]


def _open(root: Path, entries: Sequence[SourceConfig], mode: int | None) -> tuple[Source, ...]:
    return tuple(Source.open(root, entry.name, mode or entry.mode) for entry in entries)
