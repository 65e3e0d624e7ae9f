"""Check that text survives the tokenizer exactly and never becomes a control piece."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mode.errors import DataError
from megatron_mode.tokens.tokenizer import Tokenizer, train_tokenizer
from megatron_mode.tokens.vocabulary import CONTROL_PIECES, Vocabulary, padded

AWKWARD = [
    "",
    " ",
    "   three  spaces   ",
    "\n\n\t\r\n",
    "<|doc|>",
    "<s></s><unk><0x0A>",
    "\u2581", "a\u2581\u2581b \u2581", "\u2585", "\u2047", "\ufffd", "\ufeffx",
    "e\u0301 \u00e9 \ufb01 \u2160 \uff21",  # what NFKC would change
    "\u65e5\u672c\u8a9e \U0001f600\u200d\U0001f680",
    "\x00",
]  # fmt: skip

any_text = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        st.sampled_from([*AWKWARD, *CONTROL_PIECES, "Ishmael", " the sea"]),
    ),
    max_size=8,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=any_text)
def test_text_round_trips_exactly_and_holds_no_control_piece(
    tokenizer: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.pieces(ids)) == text
    assert not set(ids) & set(tokenizer.control.values())
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(any_text, max_size=6))
def test_a_batch_is_its_texts_one_by_one(tokenizer: Tokenizer, texts: list[str]) -> None:
    batch = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    assert batch == [tokenizer.encode(text) for text in texts]


def test_control_pieces_show_their_names_and_decode_to_nothing(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.control["<|user|>"], *tokenizer.encode("hi \u00e9"), 10**6]
    shown = tokenizer.pieces(ids)
    assert len(shown) == len(ids)
    assert shown[0] == "<|user|>"
    assert shown[-1] == "\u2047"
    assert "".join(shown[1:-1]) == "hi \u00e9"
    assert tokenizer.decode(ids) == "hi \u00e9"


def test_a_broken_byte_sequence_is_shown_as_such(tokenizer: Tokenizer) -> None:
    broken = tokenizer.encode("\u65e5")[:2]
    assert tokenizer.pieces([*broken, *tokenizer.encode("a")]) == ["", "", "\ufffda"]
    assert tokenizer.pieces(broken) == ["", "\ufffd"]


def test_sizes_digest_and_control_ids(tokenizer: Tokenizer, model_path: Path) -> None:
    assert list(tokenizer.control) == list(CONTROL_PIECES)
    assert len(set(tokenizer.control.values())) == len(CONTROL_PIECES)
    assert tokenizer.vocabulary.padded_vocab_size % 128 == 0
    assert 0 <= tokenizer.vocabulary.padded_vocab_size - tokenizer.vocab_size < 128
    assert tokenizer.vocabulary.digest == hashlib.sha256(model_path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("size", "expected"), [(1, 128), (128, 128), (129, 256), (2048, 2048)])
def test_padding(size: int, expected: int) -> None:
    assert padded(size) == expected


def test_training_is_deterministic_and_learns_words(tmp_path: Path, model_path: Path) -> None:
    texts = ["the whale and the sea\n" * 20, "the whale, the whale"]
    sizes = [train_tokenizer(texts, tmp_path / name, 400) for name in ("a", "b")]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert len(sizes[0].encode(" the whale")) <= 2


@pytest.mark.parametrize(
    ("texts", "vocab_size", "words"),
    [([], 512, "no text"), (["\n"], 512, "no text"), (["a tale of two ships"], 200, "too small")],
)
def test_training_refuses(tmp_path: Path, texts: list[str], vocab_size: int, words: str) -> None:
    with pytest.raises(DataError, match=words):
        train_tokenizer(texts, tmp_path / "m", vocab_size)
    assert not (tmp_path / "m").exists()


def foreign_model(path: Path, **options: object) -> Path:
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a tale of two ships at sea"] * 5), model_writer=buffer,
        vocab_size=300, model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
        minloglevel=2, **options,
    )  # fmt: skip
    path.write_bytes(buffer.getvalue())
    return path


def test_foreign_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"no model")
    for path, words in (
        (tmp_path / "missing", "cannot be read"),
        (tmp_path / "junk", "not a SentencePiece model"),
        (foreign_model(tmp_path / "plain"), "lacks the control piece <|doc|>"),
        (foreign_model(tmp_path / "dummy", control_symbols=list(CONTROL_PIECES)), "changes text"),
        (
            foreign_model(tmp_path / "user", user_defined_symbols=list(CONTROL_PIECES)),
            "lacks the control piece",
        ),
    ):
        with pytest.raises(DataError, match=words.replace("|", r"\|")):
            Tokenizer.load(path)


def test_model_beside_another_tokenizer_json_is_refused(tmp_path: Path, model_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_path.read_bytes())
    Vocabulary("0" * 64, 512, 512, {}).write(tmp_path)
    with pytest.raises(DataError, match="digest"):
        Tokenizer.load(tmp_path / "tokenizer.model")
