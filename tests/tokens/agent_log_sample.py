"""Write the sample agent log: tasks with files, a calendar, a calculator and weather.

Run it to rewrite the file that ships; a test holds that the two are equal.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_mode.commands.prepare import SAMPLE_FOLDER

SAMPLE = SAMPLE_FOLDER / "agent-log" / "agent-log.jsonl.gz"
RUNS = 320
Event = dict[str, Any]

WORDS = [
    *("harbour", "garden", "orchard", "lantern", "meadow", "quarry", "timber", "ledger", "copper"),
    *("saddle", "violet", "window", "barley", "chimney", "feather", "granite", "willow"),
    *("compass", "pantry", "ribbon"),
]
CITIES = [
    *("Oslo", "Lima", "Accra", "Hanoi", "Quito", "Turin"),
    *("Perth", "Leeds", "Osaka", "Porto", "Tunis", "Riga"),
]
PEOPLE = [
    *("Ada", "Bram", "Chidi", "Dana", "Emil", "Farah"),
    *("Goran", "Hana", "Ines", "Jonas", "Keiko", "Lars"),
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
SKIES = ["clear sky", "light rain", "broken clouds", "fog", "snow showers", "strong wind"]


def schema(name: str, description: str, **properties: str) -> dict[str, Any]:
    """Return a tool schema; every property is required."""
    typed = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": typed, "required": list(typed)}
    return {"name": name, "description": description, "parameters": parameters}


def said(kind: str, content: Any) -> Event:
    return {"type": kind, "content": content}


def action(tool: str, **arguments: Any) -> Event:
    return {"type": "action", "tool": tool, "arguments": arguments}


def files(draw: random.Random) -> tuple[list[Any], list[Event]]:
    """Find a word in a folder, or change a file."""
    tools = [
        schema("list_files", "List the files of a folder.", folder="string"),
        schema("read_file", "Return the text of a file.", path="string"),
        schema("write_file", "Replace the text of a file.", path="string", text="string"),
    ]
    folder = f"{draw.choice(WORDS)}/{draw.choice(['notes', 'drafts', 'lists'])}"
    names = [f"{word}.txt" for word in draw.sample(WORDS, draw.randint(2, 5))]
    thing, place, name = draw.choice(WORDS), draw.choice(CITIES), draw.choice(names)
    path, amount = f"{folder}/{name}", draw.randint(2, 90)
    text = f"{amount} crates of {thing} for {draw.choice(PEOPLE)} in {place}.\n"
    listing = [action("list_files", folder=folder), said("observation", sorted(names))]
    if draw.random() < 0.2:
        wrong = f"{folder}/{draw.choice(WORDS)}.md"
        return tools, [
            said("user", f"What does {wrong} say?"),
            action("read_file", path=wrong),
            said("observation", {"error": "no such file", "path": wrong}),
            said("thought", "The file is not there. I look at what the folder does hold."),
            *listing,
            said("final", f"There is no {wrong}. The folder holds {', '.join(sorted(names))}."),
        ]
    reading = [action("read_file", path=path), said("observation", text)]
    if draw.random() < 0.5:
        return tools, [
            said("user", f"How many crates does {name} in {folder} speak of?"),
            said("thought", f"I should check that {name} is there before I read it."),
            *listing,
            *reading,
            said("final", f"{name} speaks of {amount} crates of {thing}."),
        ]
    more = amount + draw.randint(1, 9)
    changed = text.replace(str(amount), str(more), 1)
    return tools, [
        said("user", f"Please make it {more} crates in {path}."),
        *reading,
        said("thought", f"The file says {amount}; I replace the number and keep the rest."),
        action("write_file", path=path, text=changed),
        said("observation", {"written_bytes": len(changed)}),
        said("final", f"Done: {path} now says {more} crates instead of {amount}."),
    ]


def calendar(draw: random.Random) -> tuple[list[Any], list[Event]]:
    """Find a free hour, or say what a day holds."""
    tools = [
        schema("list_events", "List the events of a day.", day="string"),
        schema("add_event", "Add an event of one hour.", day="string", hour="integer",
               title="string"),
    ]  # fmt: skip
    day, person = draw.choice(DAYS), draw.choice(PEOPLE)
    hours = sorted(draw.sample(range(9, 17), draw.randint(1, 5)))
    events = [{"hour": hour, "title": f"{draw.choice(WORDS)} review"} for hour in hours]
    looking = [action("list_events", day=day), said("observation", events)]
    if draw.random() < 0.4:
        titles = "; ".join(f"{event['hour']}:00 {event['title']}" for event in events)
        return tools, [
            said("user", f"What do I have on {day}?"),
            *looking,
            said("final", f"On {day} you have: {titles}."),
        ]
    free = next(hour for hour in range(9, 18) if hour not in hours)
    title = f"{draw.choice(['Call', 'Lunch', 'Walk'])} with {person}"
    return tools, [
        said("system", "You keep a calendar. Working hours are 9 to 18."),
        said("user", f"Put a {title.lower()} into the first free hour on {day}."),
        *looking,
        said("thought", f"Taken are {', '.join(map(str, hours))}, so {free}:00 is free."),
        action("add_event", day=day, hour=free, title=title),
        said("observation", f"added {title!r} on {day} at {free}:00"),
        said("final", f"{title} is on {day} at {free}:00."),
    ]


def calculator(draw: random.Random) -> tuple[list[Any], list[Event]]:
    """Work out a bill, a mean or a division by nothing, step by step."""
    tools = [schema("calculate", "Work out one operation.", a="number", op="string", b="number")]
    price, count, guests = draw.randint(3, 80), draw.randint(2, 40), draw.randint(2, 9)
    total, thing = price * count, draw.choice(WORDS)
    if draw.random() < 0.15:
        return tools, [
            said("user", f"Share {total} {thing}s among nobody."),
            action("calculate", a=total, op="/", b=0),
            said("observation", {"error": "division by zero"}),
            said("final", f"{total} cannot be shared among nobody: that would divide by zero."),
        ]
    steps = [
        said("user", f"A {thing} costs {price}. What do {count} cost, and what does each of "
             f"{guests} people pay?"),
        action("calculate", a=price, op="*", b=count),
        said("observation", total),
        action("calculate", a=total, op="/", b=guests),
        said("observation", round(total / guests, 2)),
    ]  # fmt: skip
    if draw.random() < 0.5:
        steps.insert(1, said("thought", "First the whole bill, then the share of each."))
    answer = f"{count} cost {total}, which is {round(total / guests, 2)} for each of {guests}."
    return tools, [*steps, said("final", answer)]


def weather(draw: random.Random) -> tuple[list[Any], list[Event]]:
    """Compare cities by calls in one turn, or answer for one and then for another."""
    tools = [schema("forecast", "Return the weather of a day.", city="string", day="string")]
    cities, day = draw.sample(CITIES, 2), draw.choice(DAYS)
    found = [
        {"city": city, "sky": draw.choice(SKIES), "degrees": draw.randint(-9, 34)}
        for city in cities
    ]
    calls = [action("forecast", city=city, day=day) for city in cities]
    if draw.random() < 0.5:
        for number, call in enumerate(calls):
            call["id"] = f"call-{number}"
        # Answers come as they are ready, not as they were asked for.
        seen = [{**said("observation", one), "id": f"call-{n}"} for n, one in enumerate(found)]
        warm = max(found, key=lambda one: one["degrees"])
        return tools, [
            said("user", f"Is it warmer in {cities[0]} or in {cities[1]} on {day}?"),
            said("thought", "Both forecasts are needed; I ask for them together."),
            *calls,
            *reversed(seen),
            said("final", f"In {warm['city']}: {warm['degrees']} degrees and {warm['sky']}."),
        ]
    return tools, [
        said("user", f"What will {cities[0]} be like on {day}?"),
        calls[0],
        said("observation", found[0]),
        said("final", f"{found[0]['sky'].capitalize()}, {found[0]['degrees']} degrees."),
        said("user", f"And {cities[1]}?"),
        calls[1],
        said("observation", found[1]),
        said("final", f"{found[1]['sky'].capitalize()}, {found[1]['degrees']} degrees there."),
    ]


TASKS: tuple[Callable[[random.Random], tuple[list[Any], list[Event]]], ...] = (
    files,
    calendar,
    calculator,
    weather,
)


def sample() -> bytes:
    """Return the log as compressed JSON lines."""
    lines = []
    for number in range(RUNS):
        task = TASKS[number % len(TASKS)]
        tools, events = task(random.Random(f"agent-log {number}"))
        run = {"id": f"{task.__name__}-{number:03}", "tools": tools, "events": events}
        lines.append(json.dumps(run, separators=(",", ":")) + "\n")
    return gzip.compress("".join(lines).encode(), 9, mtime=0)


if __name__ == "__main__":
    Path(SAMPLE.parent).mkdir(exist_ok=True)
    SAMPLE.write_bytes(sample())
