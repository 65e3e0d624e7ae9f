"""Describe a vocabulary without loading it: DATA_ROOT/tokenizer.json beside tokenizer.model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_mode.errors import DataError

MODEL_FILE = "tokenizer.model"
INFO_FILE = "tokenizer.json"
PADDING_MULTIPLE = 128

CONTROL_PIECES = (
    "<|doc|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|end|>",
    "<|mode1|>",
    "<|mode2|>",
)


def padded(vocab_size: int) -> int:
    """Return the smallest multiple of 128 that holds vocab_size ids."""
    return -(-vocab_size // PADDING_MULTIPLE) * PADDING_MULTIPLE


@dataclass(frozen=True)
class Vocabulary:
    """Hold what the rest of the program needs to know about a tokenizer."""

    digest: str
    vocab_size: int
    padded_vocab_size: int
    control: dict[str, int]

    @property
    def token_dtype(self) -> str:
        """Name the numpy type of .bin files (megatron-core's DType.optimal_dtype)."""
        return "uint16" if self.padded_vocab_size < 65500 else "int32"

    def write(self, root: Path) -> None:
        """Write DATA_ROOT/tokenizer.json."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        (root / INFO_FILE).write_text(text, encoding="utf-8")


def read_vocabulary(root: Path) -> Vocabulary:
    """Read DATA_ROOT/tokenizer.json and check it against tokenizer.model where that is present.

    Raises DataError when the file is missing, unreadable or describes another model.
    """
    path = root / INFO_FILE
    try:
        vocabulary = Vocabulary(**json.loads(path.read_text(encoding="utf-8")))
        sizes = (vocabulary.vocab_size, vocabulary.padded_vocab_size, *vocabulary.control.values())
        if not isinstance(vocabulary.digest, str) or any(type(size) is not int for size in sizes):
            raise TypeError("the digest is no text, or a size or piece no integer")
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist; data.root must be a folder written by "
            "`megatron-mode prepare`, so run that first or correct data.root."
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); run `megatron-mode prepare` again."
        ) from None
    model = root / MODEL_FILE
    if model.exists():
        check_digest(model, hashlib.sha256(model.read_bytes()).hexdigest(), vocabulary)
    return vocabulary


def check_digest(model: Path, digest: str, vocabulary: Vocabulary) -> None:
    """Raise DataError when a model file is not the one that tokenizer.json describes."""
    if digest != vocabulary.digest:
        raise DataError(
            f"{model} has digest {digest[:12]} but {INFO_FILE} beside it names "
            f"{vocabulary.digest[:12]}; restore the model that the data was prepared with, or run "
            "`megatron-mode prepare` again."
        )
