"""Turn text into ids and back, exactly: SentencePiece BPE with byte fallback, no normalisation.

Control pieces are SentencePiece control symbols, so they never arise from text: encoding the
literal text "<|doc|>" gives ordinary pieces. The one character that SentencePiece would change,
U+2581 (its own mark for a space), is written as its three byte pieces.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_mode.errors import DataError
from megatron_mode.tokens.vocabulary import (
    CONTROL_PIECES,
    INFO_FILE,
    MODEL_FILE,
    Vocabulary,
    check_digest,
    padded,
    read_vocabulary,
)
from megatron_mode.tokens.words import SPACE_MARK, WordEncoder, keeps_words_apart

UNKNOWN_DISPLAY = "\u2047"
PROBE_TEXT = "  a\n\n\tb  <|doc|>\u00e9\u2581 \u2160\r\n "
# SentencePiece skips training sentences that hold these, and no piece spans a line break.
TRAINING_BREAKS = re.compile("[\n\r\t\x00\u2581\u2585]+")
TRAINING_LINE_CHARACTERS = 4000
TRAINING_OPTIONS: dict[str, Any] = {
    "model_type": "bpe",
    "hard_vocab_limit": False,
    "byte_fallback": True,
    "character_coverage": 0.9999,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "max_sentence_length": 8 * TRAINING_LINE_CHARACTERS,
    "control_symbols": list(CONTROL_PIECES),
    "unk_id": 0,
    "bos_id": -1,
    "eos_id": -1,
    "pad_id": -1,
    # Fixed, because the model file records it; BPE merges use one thread anyway.
    "num_threads": 2,
    "minloglevel": 2,
}


class Tokenizer:
    """Encode and decode with one SentencePiece model that holds our control pieces."""

    def __init__(self, model: bytes, origin: str) -> None:
        """Load a model from memory; origin names it in errors.

        Raises DataError for a model without control or byte pieces, or one that changes text.
        """
        import sentencepiece

        def refusal(reason: str) -> DataError:
            return DataError(
                f"Tokenizer {origin} {reason}; accepted are models trained by `megatron-mode "
                "prepare --vocab-size N`."
            )

        try:
            self._processor = processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise refusal("is not a SentencePiece model") from None
        id_of, size = processor.piece_to_id, processor.get_piece_size()
        self._byte_ids = tuple(id_of(f"<0x{byte:02X}>") for byte in range(256))
        self._bytes_by_id = {index: byte for byte, index in enumerate(self._byte_ids)}
        control = {piece: id_of(piece) for piece in CONTROL_PIECES}
        digest = hashlib.sha256(model).hexdigest()
        self.vocabulary = Vocabulary(digest, size, padded(size), control)
        self._words: WordEncoder | None = None
        for piece, index in control.items():
            if not processor.is_control(index):
                raise refusal(f"lacks the control piece {piece}")
        is_lossless = all(map(processor.is_byte, self._byte_ids))
        if not is_lossless or self.decode(self.encode(PROBE_TEXT)) != PROBE_TEXT:
            raise refusal("changes text (normalisation, added spaces or no byte fallback)")
        if keeps_words_apart(processor):
            self._words = WordEncoder(processor, self._byte_ids)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a model file.

        Raises DataError when it is missing, foreign, or not what tokenizer.json beside it says.
        """
        path = Path(path)
        try:
            tokenizer = cls(path.read_bytes(), str(path))
        except OSError as error:
            raise DataError(
                f"Tokenizer {path} cannot be read ({error.strerror}); name the tokenizer.model "
                "that `megatron-mode prepare` wrote."
            ) from None
        if path.name == MODEL_FILE and (path.parent / INFO_FILE).exists():
            check_digest(path, tokenizer.vocabulary.digest, read_vocabulary(path.parent))
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Return the number of ids in use."""
        return self.vocabulary.vocab_size

    @property
    def control(self) -> dict[str, int]:
        """Return the id of each control piece."""
        return self.vocabulary.control

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; never a control piece. The text holds no lone surrogates."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[array[int]]:
        """Return the ids of each text, on one thread."""
        if self._words is not None:
            return self._words.encode_batch(texts)
        return [array("i", self._encode(text)) for text in texts]

    def _encode(self, text: str) -> Iterator[int]:
        for number, part in enumerate(text.split(SPACE_MARK)):
            if number:
                yield from (self._byte_ids[byte] for byte in SPACE_MARK.encode())
            yield from self._processor.encode(part, num_threads=1)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; control pieces and padding add nothing to it."""
        text: str = self._processor.decode([int(i) for i in ids if i < self.vocab_size])
        return text

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return the display text of each id, so that joined they read like the text.

        A control piece shows its name. A character that is spread over byte pieces shows at its
        last byte; the ones before it show "".
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        shown: list[str] = []
        for index in map(int, ids):
            byte = self._bytes_by_id.get(index)
            if byte is not None:
                shown.append(decoder.decode(bytes([byte])))
                continue
            broken = decoder.decode(b"", final=True)
            decoder.reset()
            is_known = 0 <= index < self.vocab_size and not self._processor.is_unknown(index)
            piece = self._processor.id_to_piece(index) if is_known else UNKNOWN_DISPLAY
            shown.append(broken + piece.replace(SPACE_MARK, " "))
        if shown:
            shown[-1] += decoder.decode(b"", final=True)
        return shown


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts into what SentencePiece accepts as training sentences."""
    for text in texts:
        for line in TRAINING_BREAKS.split(text):
            for start in range(0, len(line), TRAINING_LINE_CHARACTERS):
                yield line[start : start + TRAINING_LINE_CHARACTERS]


def train_tokenizer(texts: Iterable[str], out_path: Path, vocab_size: int) -> Tokenizer:
    """Train a model on texts, write it to out_path, and load it.

    vocab_size counts control and byte pieces; the model gets fewer ids when the texts do not hold
    enough different words. Raises DataError when the texts are empty or vocab_size is too small.
    """
    import sentencepiece

    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_lines(texts),
            model_writer=buffer,
            vocab_size=vocab_size,
            **TRAINING_OPTIONS,
        )
    except RuntimeError as error:
        reason = str(error)
        if needed := re.search(r"required_chars\.\s*\d+ vs (\d+)", reason):
            raise DataError(
                f"--vocab-size {vocab_size} is too small for the characters of this text; at "
                f"least {needed[1]} is accepted, so raise it."
            ) from None
        if "empty" in reason.lower():
            raise DataError(
                "The input holds no text to train a tokenizer on; add documents."
            ) from None
        raise DataError(
            f"No tokenizer could be trained with --vocab-size {vocab_size} ({reason.strip()}); "
            "give more text or another --vocab-size."
        ) from None
    out_path.write_bytes(buffer.getvalue())
    return Tokenizer(buffer.getvalue(), str(out_path))
