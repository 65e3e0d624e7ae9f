from __future__ import annotations

import json
import random
from dataclasses import asdict

import numpy as np
import pytest

from megatron_mode.evaluate.passages import choose_passages
from megatron_mode.tokens.documents import Document, Message
from megatron_mode.tokens.source.shards import Source, SourceWriter
from megatron_mode.tokens.template import render
from megatron_mode.tokens.tokenizer import train_tokenizer

SEQ_LEN = 96
WORDS = [
    "the",
    "river",
    "rose",
    "over",
    "its",
    "banks",
    "and",
    "lower",
    "fields",
    "lay",
    "under",
    "water",
    "for",
    "a",
    "week",
]


def running(draw, count):
    return " ".join(draw.choice(WORDS) for _ in range(count)) + "."


def quoting(draw, sentences):
    return " ".join(f"“{running(draw, 5)}” {running(draw, 3)}" for _ in range(sentences))


def code(draw, lines):
    return "\n".join(f'{{[ "a b c" ]}} = {draw.randrange(9)}' for _ in range(lines))


def chat(draw, turns):
    roles = ("user", "assistant")
    return tuple(Message(roles[turn % 2], running(draw, 6)) for turn in range(turns))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    texts = [running(draw, 200), quoting(draw, 30), code(draw, 30)]
    tokenizer = train_tokenizer(texts, root / "tokenizer.model", 400)
    (root / "tokenizer.json").write_text(json.dumps(asdict(tokenizer.vocabulary)))
    documents = {
        "code": [(1, code(draw, 40), (), "plain") for _ in range(3)],
        "novel": [(1, running(draw, 300), (), "plain") for _ in range(4)]
        + [(1, quoting(draw, 40), (), "plain")]
        + [(1, running(draw, 300), (), "plain")],
        "single": [(2, "", chat(draw, 1), "plain") for _ in range(20)],
        "dialogues": [(2, "", chat(draw, turns), "chat") for turns in (8, 8)]
        + [(2, "", chat(draw, turns), "plain") for turns in (2, 2, 10, 2)],
    }
    sources = {}
    for name, rows in documents.items():
        mode = rows[0][0]
        with SourceWriter(root, name, mode=mode, vocabulary=tokenizer.vocabulary) as writer:
            for index, (_, text, messages, rendering) in enumerate(rows):
                document = Document(f"{name}-{index}", name, mode, text, messages)
                ids, flags = render(document, tokenizer, rendering)
                writer.add(ids, flags, id=document.id, rendering=rendering)
        sources[name] = Source.open(root, name, mode)
    return sources, tokenizer


def document_at(source, token):
    _, _, identity, _, rendering = source.document(source.document_of(token))
    return identity, rendering


def test_each_kind_finds_its_text(corpus):
    sources, tokenizer = corpus
    chosen = {p.kind: p for p in choose_passages(list(sources.values()), tokenizer, SEQ_LEN)}
    assert list(chosen) == ["prose", "dialogue", "quoting"]
    assert chosen["prose"].source == "novel"
    assert document_at(sources["novel"], chosen["prose"].begin_token)[0] != "novel-4"
    # Code holds more quoted strings than the novel; it is not prose that quotes.
    assert document_at(sources["novel"], chosen["quoting"].begin_token)[0] == "novel-4"
    dialogue = chosen["dialogue"]
    assert document_at(sources["dialogues"], dialogue.begin_token) == ("dialogues-4", "plain")
    assert dialogue.title == "Dialogue without role markers"


def test_every_passage_is_a_whole_row_of_its_source(corpus):
    sources, tokenizer = corpus
    for passage in choose_passages(list(sources.values()), tokenizer, SEQ_LEN):
        ids, _ = sources[passage.source].read(passage.begin_token, passage.begin_token + SEQ_LEN)
        assert len(ids) == SEQ_LEN


def test_kinds_without_text_are_left_out(corpus):
    sources, tokenizer = corpus

    def kinds(*names):
        found = choose_passages([sources[name] for name in names], tokenizer, SEQ_LEN)
        return [passage.kind for passage in found]

    assert kinds("dialogues") == ["dialogue"]
    assert kinds("single") == []
    assert kinds() == []
    assert choose_passages(list(sources.values()), tokenizer, 10**6) == []


class Counting:
    """Stand in for a source of a trillion tokens and count what is read."""

    name, tokens = "large", 10**12

    def __init__(self, control):
        self.control, self.read_tokens = control, 0

    def document_starts(self, begin, end):
        return np.array([begin]) if end > begin else np.array([])

    def read(self, begin, end):
        self.read_tokens += end - begin
        return np.full(end - begin, 300), np.zeros(end - begin, np.uint8)


def test_a_large_source_is_not_read_through(corpus):
    source = Counting(corpus[1].control)
    assert choose_passages([source], corpus[1], SEQ_LEN)
    assert source.read_tokens <= 128 * SEQ_LEN


def test_the_choice_is_the_same_each_time(corpus):
    sources, tokenizer = corpus
    first, second = (choose_passages(list(sources.values()), tokenizer, 64) for _ in range(2))
    assert first == second
