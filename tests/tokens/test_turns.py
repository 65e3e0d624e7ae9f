"""One parser reads the turns of every verb: nothing in them is dropped without a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_mode.command_line import CommandParser
from megatron_mode.commands import convert as convert_verb
from megatron_mode.tokens.convert.chats import openai as convert
from megatron_mode.tokens.documents import BadLineError, Message, parse_line, read_documents
from megatron_mode.tokens.flags import NO_LM_LOSS
from megatron_mode.tokens.source.shards import Source
from megatron_mode.tokens.template import Rendering, content_bytes, render
from megatron_mode.tokens.tokenizer import Tokenizer

RunPrepare = Callable[..., int]
USER = {"role": "user", "content": "Weather?"}
SUNNY = {"role": "assistant", "content": "Sunny."}


def read(*messages: Any, **more: Any) -> tuple[Message, ...]:
    """Return the turns that `prepare` reads."""
    line = json.dumps({"messages": messages, **more})
    return parse_line(line.encode(), "s", 1).messages


def converted(*messages: Any, **more: Any) -> tuple[Message, ...]:
    """Return the turns that `prepare` reads from what `convert --from openai` writes."""
    line = json.dumps(convert({"messages": list(messages), **more}), allow_nan=False)
    return parse_line(line.encode(), "s", 1).messages


def both(*messages: Any, **more: Any) -> tuple[Message, ...]:
    found = read(*messages, **more)
    assert found == converted(*messages, **more)
    return found


def refused(*messages: Any, **more: Any) -> str:
    """Return the reason that both verbs give."""
    reasons = set()
    for verb in (read, converted):
        with pytest.raises(BadLineError) as caught:
            verb(*messages, **more)
        reasons.add(str(caught.value))
    (reason,) = reasons
    return reason


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reasoning_content", "REASONING-TRACE"),
        ("thinking", "hm"),
        ("audio", {"id": "a"}),
        ("images", ["a.png"]),
        ("channel", "analysis"),
        ("weight", 0.5),
        ("train", "no"),
        ("refusal", "I will not."),
        ("function_call", "f"),
    ],
)
def test_a_field_that_may_change_the_text_is_refused(name: str, value: Any) -> None:
    reason = refused(USER, {**SUNNY, name: value})
    assert reason.startswith("messages[1]")
    assert name in reason


def test_fields_that_change_no_text_are_listed() -> None:
    messages = [{**USER, "name": "ALICE", "id": "1"}, {**SUNNY, "id": "2", "audio": None}]
    document = parse_line(json.dumps({"messages": messages}).encode(), "s", 1)
    assert document.ignored == ("name", "id", "id")
    assert convert({"messages": messages})["ignored"] == ["name", "id", "id"]
    assert both(*messages) == (Message("user", "Weather?"), Message("assistant", "Sunny."))


def test_older_and_other_names_are_mapped() -> None:
    old = {"name": "weather", "arguments": '{"city": "OLDCALL"}'}
    found = both(
        {"role": "developer", "content": [{"type": "text", "text": "Be"},
                                          {"type": "text", "text": "brief."}]},
        {"role": "assistant", "content": "", "function_call": old},
        {"role": "function", "name": "weather", "content": "sunny"},
        {"role": "assistant", "content": None, "refusal": "No."},
    )  # fmt: skip
    assert [message[:2] for message in found] == [
        ("system", "Be\n\nbrief."),
        ("assistant", '[{"name":"weather","arguments":{"city":"OLDCALL"}}]'),
        ("tool", "sunny"),
        ("assistant", "No."),
    ]
    schemas = [{"name": "f"}]
    line = json.dumps({"messages": [USER], "functions": schemas})
    assert parse_line(line.encode(), "s", 1).tools == schemas
    assert "system is" in refused(USER, system="Be brief.")


@pytest.mark.parametrize("given", ["[]", "null", " ", "", [], None])
def test_calls_that_are_none_add_nothing(given: Any) -> None:
    assert both(USER, {**SUNNY, "tool_calls": given})[1].content == "Sunny."


def test_calls_may_be_a_string_of_json() -> None:
    calls = [{"name": "weather", "arguments": {"city": "Paris"}}]
    expected = '[{"name":"weather","arguments":{"city":"Paris"}}]'
    for given in (calls, json.dumps(calls), json.dumps(calls[0]), calls[0]):
        assert both(USER, {**SUNNY, "content": "", "tool_calls": given})[1].content == expected
    assert "tool_calls is" in refused(USER, {**SUNNY, "tool_calls": "weather(Paris)"})
    assert "tool_calls is 3" in refused(USER, {**SUNNY, "tool_calls": 3})


def test_results_stand_in_the_order_of_their_calls() -> None:
    calls = [{"id": f"c{n}", "function": {"name": n, "arguments": "{}"}} for n in "fgf"]
    asked = {"role": "assistant", "content": None, "tool_calls": calls}
    by_id = [{"role": "tool", "tool_call_id": f"c{n}", "content": n.upper()} for n in "gf"]
    by_name = [{"role": "tool", "name": n, "content": n.upper()} for n in "gf"]
    for results in (by_id, by_name):
        for verb in (read, converted):
            assert [m.content for m in verb(asked, *results, SUNNY)[1:]] == ["F", "G", "Sunny."]
    unnamed = [{"role": "tool", "content": "G"}, {"role": "tool", "content": "F"}]
    assert [m.content for m in read(asked, *unnamed)[1:]] == ["G", "F"]
    stranger = {"role": "tool", "tool_call_id": "other", "content": "X"}
    assert [m.content for m in read(asked, by_id[0], by_id[1], stranger)[1:]] == ["G", "F", "X"]


def test_a_dialogue_of_empty_turns_is_refused() -> None:
    assert "only empty turns" in refused({"role": "user", "content": ""}, {**SUNNY, "content": ""})
    assert len(both({"role": "user", "content": ""}, SUNNY)) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('"tools": [{"name": "f", "default": NaN}]', "tools[0].default is NaN"),
        ('"tools": [{"name": "f", "minimum": -1e400}]', "tools[0].minimum is -1e400"),
        ('"tools": "[{\\"maximum\\": Infinity}]"', "tools[0].maximum is Infinity"),
        ('"tools": [{"name": "f", "name": "g"}]', 'the key "name" twice'),
        ('"messages": []', 'the key "messages" twice'),
    ],
)
def test_what_is_no_json_for_others_is_refused(text: str, words: str) -> None:
    line = f'{{"messages": [{{"role": "user", "content": "q"}}], {text}}}'
    with pytest.raises(BadLineError) as caught:
        parse_line(line.encode(), "s", 1)
    assert words in str(caught.value)


def test_arguments_are_finite() -> None:
    call = '{"name": "f", "arguments": {"x": [1e2, 1e999]}}'
    line = f'{{"messages": [{{"role": "assistant", "tool_calls": [{call}]}}]}}'
    with pytest.raises(BadLineError, match=r"messages\[0\].tool_calls\[0\].arguments.x\[1\] is"):
        parse_line(line.encode(), "s", 1)
    written = {**SUNNY, "tool_calls": [{"name": "f", "arguments": '{"x": NaN}'}]}
    with pytest.raises(BadLineError, match=r"arguments.x is NaN; accepted are finite"):
        convert({"messages": [USER, written]})


def weather_rows(missing: Any) -> list[dict[str, Any]]:
    """Return rows of two tools; what one lacks of the other is `missing`, or left out."""

    def filled(**fields: Any) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if value is not Ellipsis}

    rows = []
    for name, arguments in (("weather", {"city": "X"}), ("add", {"x": 1, "y": 2})):
        kinds = {"city": "string", "x": "integer", "y": "integer"}
        given = {key: arguments.get(key, missing) for key in kinds}
        schemas = {key: {"type": k} if key in arguments else missing for key, k in kinds.items()}
        function = {"name": name, "parameters": {"properties": filled(**schemas)}}
        calls = [{"function": {"name": name, "arguments": filled(**given)}}]
        asked = filled(role="user", content=name, tool_calls=missing)
        messages = [asked, {"role": "assistant", "content": None, "tool_calls": calls}]
        rows.append({"messages": messages, "tools": [{"function": function}]})
    return rows


def test_nulls_that_pad_a_table_are_no_text(tmp_path: Path) -> None:
    """The rows give the same text without padding, padded in JSON, and from Parquet."""
    found = []
    for name, missing in (("bare", Ellipsis), ("padded", None)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in weather_rows(missing)))
        found.append([content_bytes(document) for document in read_documents(path)])
    pq.write_table(pa.Table.from_pylist(weather_rows(None)), tmp_path / "table.parquet")
    found.append([content_bytes(d) for d in read_documents(tmp_path / "table.parquet")])
    assert found[0] == found[1] == found[2]
    assert b"null" not in b"".join(found[0][0])
    padded = weather_rows(None)[0]
    assert converted(*padded["messages"])[1].content.endswith('"arguments":{"city":"X"}}]')


def test_nulls_that_are_meant_stay() -> None:
    schema = {"type": "object", "default": None, "enum": ["a", None], "x": None}
    kept = {"type": "object", "default": None, "enum": ["a", None]}
    tools = [{"name": "f", "parameters": {"properties": {"x": schema, "default": None}}}]
    line = json.dumps({"messages": [USER], "tools": tools})
    read_tools = parse_line(line.encode(), "s", 1).tools
    assert read_tools == [{"name": "f", "parameters": {"properties": {"x": kept}}}]
    call = {"name": "f", "arguments": {"x": None, "y": None}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert both(USER, asked)[1].content.endswith('{"x":null,"y":null}}]')
    padded = {**USER, "tool_calls": None}
    assert read(padded, asked, tools=tools)[-1].content.endswith('"arguments":{"x":null}}]')
    odd = [{"name": "f", "parameters": {"properties": {"x": {"anyOf": 3}}}}]
    assert read(padded, asked, tools=odd)[-1].content.endswith('"arguments":{}}]')


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
@pytest.mark.parametrize("rendering", ["chat", "plain"])
def test_a_turn_that_is_not_to_be_learnt_is_flagged(
    tokenizer: Tokenizer, rendering: Rendering, mark: dict[str, Any]
) -> None:
    marked = {"role": "assistant", "content": "WRONG", **mark}
    plain_turns = [USER, {**marked, "weight": 1, "train": True}, USER, SUNNY]
    line = {"id": "a", "messages": [USER, marked, USER, SUNNY]}
    document = parse_line(json.dumps(line).encode(), "s", 1)
    unmarked = parse_line(json.dumps({**line, "messages": plain_turns}).encode(), "s", 1)
    assert both(*line["messages"]) == document.messages
    assert content_bytes(document) != content_bytes(unmarked)
    ids, flags = render(document, tokenizer, rendering)
    same_ids, other_flags = render(unmarked, tokenizer, rendering)
    assert ids == same_ids
    assert not any(flag & NO_LM_LOSS for flag in other_flags)
    silent = [ids[n] for n, flag in enumerate(flags) if flag & NO_LM_LOSS]
    control = tokenizer.control
    expected = {
        "chat": [control["<|assistant|>"], *tokenizer.encode("WRONG"), control["<|end|>"]],
        "plain": tokenizer.encode("WRONG\n\n"),
    }
    assert silent == expected[rendering]
    assert bytes(flag & ~NO_LM_LOSS for flag in flags) == other_flags


def test_marks_and_ignored_fields_reach_what_is_prepared(
    tmp_path: Path, run_prepare: RunPrepare, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [USER, {**SUNNY, "content": "WRONG", "weight": 0}, {**USER, "name": "A"}, SUNNY]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"id": "a", "messages": messages}) + "\n")
    words = ("--input", path, "--out", tmp_path / "data", "--plain-share", "0", "--json")
    assert run_prepare(*words) == 0
    assert json.loads(capsys.readouterr().out)["ignored_fields"] == {"name": 1}
    info = Source.open(tmp_path / "data", "chat").info
    assert 0 < info["flags"]["no_lm_loss"] < info["flags"]["role_assistant"]


def test_convert_counts_what_it_ignores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    messages = [{**USER, "name": "ALICE"}, {**SUNNY, "train": False}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    parser = CommandParser()
    convert_verb.add_arguments(parser)
    words = [str(path), "--from", "openai", "--out", str(out), "--json"]
    assert convert_verb.run(parser.parse(words)) == 0
    assert json.loads(capsys.readouterr().out)["ignored_fields"] == {"name": 1}
    assert [m.is_trained for d in read_documents(out) for m in d.messages] == [True, False]
