"""Render a document as token ids and flags.

    text     <|doc|> text
    chat     <|doc|> (<|role|> content <|end|>)*     tools: JSON, first in a system message
    plain    <|doc|> content, blank line, content    no other piece: nothing gives the roles away

In `chat` the pieces around a content carry its role; in `plain` the blank line after a content
does, because it is what ends the turn. All pieces of a turn that is not trained carry NO_LM_LOSS.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Literal, NamedTuple

from megatron_mode.tokens.documents import Document
from megatron_mode.tokens.flags import CONTROL, MODE2, NO_LM_LOSS, role_bits
from megatron_mode.tokens.tokenizer import Tokenizer
from megatron_mode.tokens.turns import BLANK_LINE

Rendering = Literal["chat", "plain"]


class Part(NamedTuple):
    """Hold a control piece or a stretch of text, with the role it belongs to."""

    text: str
    is_control: bool = False
    role: str = "none"
    is_trained: bool = True


def parts(document: Document, rendering: Rendering) -> list[Part]:
    """Return what a document is made of, in order, starting with <|doc|>."""
    result = [Part("<|doc|>", True)]
    if document.mode == 1:
        return [*result, Part(document.text)]
    messages = document.dialogue
    for number, (role, content, is_trained) in enumerate(messages, start=1):
        if rendering == "chat":
            pieces = [(f"<|{role}|>", True), (content, False), ("<|end|>", True)]
        else:
            pieces = [(content + BLANK_LINE * (number < len(messages)), False)]
        result += [Part(text, is_control, role, is_trained) for text, is_control in pieces]
    return result


def plain_text(document: Document) -> str:
    """Return the text of the plain rendering."""
    return "".join(part.text for part in parts(document, "plain") if not part.is_control)


def content_bytes(document: Document) -> list[bytes]:
    """Return what a document says, whatever its rendering: its text, or role and content by turn.

    Documents with equal contents are copies. A turn that is not trained differs from one that is.
    """
    if document.mode == 1:
        return [document.text.encode()]
    return [
        part.encode()
        for role, content, is_trained in document.dialogue
        for part in (role if is_trained else f"{role} untrained", content)
    ]


def render_batch(
    documents: Sequence[Document], renderings: Sequence[Rendering], tokenizer: Tokenizer
) -> list[tuple[array[int], bytes]]:
    """Return (ids, flags) of each document in its rendering, with one call of the tokenizer."""
    parts_by_document = [parts(d, r) for d, r in zip(documents, renderings, strict=True)]
    texts = [p.text for found in parts_by_document for p in found if not p.is_control]
    encoded = iter(tokenizer.encode_batch(texts))
    rendered = []
    for document, found in zip(documents, parts_by_document, strict=True):
        mode_bit = MODE2 if document.mode == 2 else 0
        ids = array("i")
        flags = bytearray()
        for part in found:
            bits = mode_bit | role_bits(part.role) | (0 if part.is_trained else NO_LM_LOSS)
            if part.is_control:
                ids.append(tokenizer.control[part.text])
                flags.append(bits | CONTROL)
            else:
                text_ids = next(encoded)
                ids += text_ids
                flags += bytes([bits]) * len(text_ids)
        rendered.append((ids, bytes(flags)))
    return rendered


def render(
    document: Document, tokenizer: Tokenizer, rendering: Rendering
) -> tuple[list[int], bytes]:
    """Return the ids of one document and a flag byte for each."""
    ids, flags = render_batch([document], [rendering], tokenizer)[0]
    return ids.tolist(), flags
