"""Check renderings against the text that the design writes down."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mode.tokens.documents import Document, Message
from megatron_mode.tokens.flags import CONTROL, MODE2, ROLES, role_of
from megatron_mode.tokens.template import Rendering, render, render_batch
from megatron_mode.tokens.tokenizer import Tokenizer

TOOLS = [{"name": "get_price", "parameters": {"a": "\u00e9"}}]
USER, ASSISTANT = Message("user", "Price?\n"), Message("assistant", "It is 3. <|end|>")


def shown(
    document: Document, tokenizer: Tokenizer, rendering: Rendering
) -> tuple[str, list[tuple[str, str]]]:
    """Return the joined display text, and (role, text) of each stretch of equal role."""
    ids, flags = render(document, tokenizer, rendering)
    assert len(ids) == len(flags)
    stretches: list[tuple[str, str]] = []
    pieces = tokenizer.pieces(ids)
    for piece, role in zip(pieces, role_of(np.frombuffer(flags, np.uint8)), strict=True):
        name = ROLES[role]
        if stretches and stretches[-1][0] == name:
            stretches[-1] = (name, stretches[-1][1] + piece)
        else:
            stretches.append((name, piece))
    return "".join(pieces), stretches


def dialogue(*messages: Message, tools: object = None) -> Document:
    return Document("d", "chat", 2, messages=messages, tools=tools)


def test_text(tokenizer: Tokenizer) -> None:
    text, stretches = shown(Document("d", "books", 1, text="A\n\nb "), tokenizer, "chat")
    assert text == "<|doc|>A\n\nb "
    assert [role for role, _ in stretches] == ["none"]


def test_chat(tokenizer: Tokenizer) -> None:
    text, stretches = shown(dialogue(USER, ASSISTANT), tokenizer, "chat")
    assert text == "<|doc|><|user|>Price?\n<|end|><|assistant|>It is 3. <|end|><|end|>"
    assert stretches == [
        ("none", "<|doc|>"),
        ("user", "<|user|>Price?\n<|end|>"),
        ("assistant", "<|assistant|>It is 3. <|end|><|end|>"),
    ]


def test_plain_has_blank_lines_and_no_other_piece(tokenizer: Tokenizer) -> None:
    ids, flags = render(dialogue(USER, ASSISTANT), tokenizer, "plain")
    text = "Price?\n\n\nIt is 3. <|end|>"
    assert ids == [tokenizer.control["<|doc|>"], *tokenizer.encode(text)]
    assert [bool(f & CONTROL) for f in flags] == [True] + [False] * (len(ids) - 1)
    _, stretches = shown(dialogue(USER, ASSISTANT), tokenizer, "plain")
    assert stretches[1:] == [("user", "Price?\n\n\n"), ("assistant", "It is 3. <|end|>")]


def test_tools_lead_in_a_system_message(tokenizer: Tokenizer) -> None:
    schema = '[{"name":"get_price","parameters":{"a":"\u00e9"}}]'
    text, _ = shown(dialogue(USER, tools=TOOLS), tokenizer, "chat")
    assert text == f"<|doc|><|system|>{schema}<|end|><|user|>Price?\n<|end|>"
    system = Message("system", "Be brief.")
    text, stretches = shown(dialogue(system, USER, tools=TOOLS), tokenizer, "chat")
    assert stretches[1] == ("system", f"<|system|>{schema}\n\nBe brief.<|end|>")
    text, _ = shown(dialogue(system, USER, tools=TOOLS), tokenizer, "plain")
    assert text == f"<|doc|>{schema}\n\nBe brief.\n\nPrice?\n"
    assert json.loads(schema) == TOOLS


messages = st.builds(
    Message,
    st.sampled_from(ROLES[1:]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)


@settings(max_examples=100, deadline=None)
@given(turns=st.lists(messages, min_size=1, max_size=5))
def test_any_dialogue(tokenizer: Tokenizer, turns: list[Message]) -> None:
    document = dialogue(*turns)
    ids, flags = render(document, tokenizer, "chat")
    expected = "".join(f"<|{m.role}|>{m.content}<|end|>" for m in turns)
    assert "".join(tokenizer.pieces(ids)) == f"<|doc|>{expected}"
    assert all(flag & MODE2 for flag in flags)
    control = set(tokenizer.control.values())
    assert [i in control for i in ids] == [bool(flag & CONTROL) for flag in flags]
    ids, flags = render(document, tokenizer, "plain")
    assert ids[1:] == tokenizer.encode("\n\n".join(m.content for m in turns))


@pytest.mark.parametrize("rendering", ["chat", "plain"])
def test_a_batch_is_its_documents(tokenizer: Tokenizer, rendering: Rendering) -> None:
    documents = [Document("a", "b", 1, text="sea"), dialogue(USER, tools=TOOLS), dialogue(USER)]
    together = render_batch(documents, [rendering] * 3, tokenizer)
    together = [(ids.tolist(), flags) for ids, flags in together]
    assert together == [render(d, tokenizer, rendering) for d in documents]
