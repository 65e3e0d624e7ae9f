"""Open what a run reads: the tokenizer's vocabulary, training sources and held-out sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mode.config.fields import Config, SourceConfig
from megatron_mode.errors import ConfigError
from megatron_mode.mix.order import Order
from megatron_mode.mix.rows import RowReader, rows_in_stream
from megatron_mode.tokens.shards import Source
from megatron_mode.tokens.vocabulary import Vocabulary, read_vocabulary


@dataclass(frozen=True)
class Corpus:
    """Hold opened sources; `train` is Mode 1 then Mode 2, in config order, as in Order."""

    root: Path
    vocabulary: Vocabulary
    train: tuple[Source, ...]
    valid: tuple[Source, ...]

    def rows_by_source(self, seq_len: int) -> dict[str, int]:
        """Return how many rows of `seq_len` tokens each training source holds."""
        return {source.name: rows_in_stream(source.tokens, seq_len) for source in self.train}


def open_corpus(config: Config) -> Corpus:
    """Open every source that the config names; DataError names what is missing or does not fit."""
    root = Path(config.data.root)
    vocabulary = read_vocabulary(root)
    mix = config.mix
    train = _open(root, mix.mode1.sources, 1) + _open(root, mix.mode2.sources, 2)
    valid = _open(root, mix.valid.sources, None)
    return Corpus(root, vocabulary, train, valid)


def check_corpus(config: Config) -> None:
    """Raise DataError or ConfigError where the prepared data does not give the run its rows."""
    corpus = open_corpus(config)
    build_order(resolve_vocabulary(config, corpus), corpus)


def resolve_vocabulary(config: Config, corpus: Corpus) -> Config:
    """Fill model.vocab_size from the data, or refuse a config that says otherwise."""
    padded = corpus.vocabulary.padded_vocab_size
    given = config.model.vocab_size
    if given is not None and given != padded:
        raise ConfigError(
            f"model.vocab_size is {given}, but the data in {corpus.root} was prepared with a "
            f"padded vocabulary of {padded}: remove model.vocab_size or prepare the data again"
        )
    if padded % config.parallel.tensor:
        raise ConfigError(
            f"parallel.tensor is {config.parallel.tensor}, which does not divide the padded "
            f"vocabulary of {padded}: use a power of two up to 128"
        )
    return config.model_copy(
        update={"model": config.model.model_copy(update={"vocab_size": padded})}
    )


def build_order(config: Config, corpus: Corpus) -> Order:
    """Return the order of the whole run."""
    return Order(
        config.mix,
        config.model.seq_len,
        config.run.steps * config.batch.global_rows,
        config.run.seed,
        corpus.rows_by_source(config.model.seq_len),
    )


def build_reader(config: Config, sources: Sequence[Source]) -> RowReader:
    """Return the reader of rows of these sources."""
    return RowReader(sources, config.model.seq_len, config.mix)


def _open(root: Path, configs: tuple[SourceConfig, ...], mode: int | None) -> tuple[Source, ...]:
    return tuple(Source.open(root, config.name, mode or config.mode) for config in configs)
