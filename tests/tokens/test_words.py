"""Check that the table of words gives SentencePiece's own ids."""

from __future__ import annotations

import base64
import io
import random
from typing import Any, cast

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from megatron_mode.tokens import words
from megatron_mode.tokens.tokenizer import Tokenizer
from megatron_mode.tokens.words import WordEncoder, keeps_words_apart

ALPHABET = "ab zA\u00e9\u4e2d\u0301 \n\n\t.,(_1 9\u201d\x00\u00a0'e"


def whole(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text without SentencePiece's mark in it as a whole."""
    return tokenizer._processor.encode(text)


@given(st.lists(st.text(st.sampled_from(ALPHABET), max_size=60), max_size=8))
def test_words_give_the_ids_of_the_text(tokenizer: Tokenizer, texts: list[str]) -> None:
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [whole(tokenizer, text) for text in texts]


@given(st.text(max_size=200))
def test_any_text(tokenizer: Tokenizer, text: str) -> None:
    if words.SPACE_MARK not in text:
        assert tokenizer.encode(text) == whole(tokenizer, text)


@given(st.text(st.sampled_from(ALPHABET + words.SPACE_MARK), max_size=100))
def test_words_hold_the_whole_text(text: str) -> None:
    assert "".join(words.WORD.findall(text)) == text


def test_a_full_table_starts_again(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "KEPT_WORDS", 20)
    monkeypatch.setattr(words, "KEPT_WORD_CHARACTERS", 5)
    encoder = WordEncoder(tokenizer._processor, tokenizer._byte_ids)
    draw = random.Random(1)
    for _ in range(100):
        text = " ".join("sea" * draw.randrange(4) + str(draw.randrange(30)) for _ in range(30))
        assert encoder.encode_batch([text])[0].tolist() == whole(tokenizer, text)


def test_models_with_longer_pieces_encode_whole_texts() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat, on the mat"] * 50),
        model_writer=model,
        model_type="bpe",
        vocab_size=40,
        split_by_whitespace=False,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert not keeps_words_apart(processor)


def test_our_own_models_use_the_table(tokenizer: Tokenizer) -> None:
    assert keeps_words_apart(tokenizer._processor)


def test_a_word_beyond_all_bounds_takes_little_memory_and_reads_back(tokenizer: Tokenizer) -> None:
    """Up to the bound a word is encoded at once; a longer one is cut into such words."""
    bound = 65536
    letters = "".join(random.Random(1).choices("abcdefghij", k=2 * bound + 5))
    word = letters[:bound]
    assert tokenizer.encode(word) == whole(tokenizer, word)
    expected = [whole(tokenizer, letters[n : n + bound]) for n in (0, bound, 2 * bound)]
    assert tokenizer.encode(letters) == [token_id for ids in expected for token_id in ids]
    for text in (letters, "\u00e9" * (bound + 3), " " * (bound + 3) + "a"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_words_are_searched_in_parts(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(f"sea{n} wave{n}" for n in range(300))
    sizes = []

    class Watched:
        def encode(self, searched: str, num_threads: int) -> list[int]:
            sizes.append(len(searched))
            return list(tokenizer._processor.encode(searched, num_threads=num_threads))

    monkeypatch.setattr(words, "SEARCHED_CHARACTERS", 100)
    encoder = WordEncoder(cast(Any, Watched()), tokenizer._byte_ids)
    assert encoder.encode_batch([text])[0].tolist() == whole(tokenizer, text)
    assert max(sizes) < 150


def test_a_text_without_spaces_is_cut_into_stretches(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base64 has a word every third character: a long text must not hold them all at once."""
    drawn = random.Random(1)
    text = base64.b64encode(drawn.randbytes(300_000)).decode() + "\u00e9 sea" * 9
    assert tokenizer.encode(text) == whole(tokenizer, text)
    encoder, held = WordEncoder(tokenizer._processor, tokenizer._byte_ids), []
    encode = encoder._encode
    monkeypatch.setattr(
        encoder, "_encode", lambda p: held.append(sum(len(w) for _, w in p)) or encode(p)
    )
    encoder.encode_batch([text, "sea"])
    assert len(held) > 1
    assert max(held) < words.STRETCH_CHARACTERS


@given(st.lists(st.text(st.sampled_from(ALPHABET), max_size=90), max_size=4))
def test_stretches_leave_no_trace(tokenizer: Tokenizer, texts: list[str]) -> None:
    encoder = WordEncoder(tokenizer._processor, tokenizer._byte_ids)
    with pytest.MonkeyPatch.context() as patch:
        # No word of these texts is longer than half a stretch.
        patch.setattr(words, "STRETCH_CHARACTERS", 200)
        patch.setattr(words, "WORDS_AT_ONCE", 3)
        joined = [text * 5 for text in texts]
        found = [ids.tolist() for ids in encoder.encode_batch(joined)]
    assert found == [whole(tokenizer, text) for text in joined]
