from __future__ import annotations

import contextlib
import json
import math
import random
import re
import time
from html.parser import HTMLParser

import pytest

from megatron_mode.__main__ import run_verb
from megatron_mode.command_line import exit_status
from megatron_mode.errors import ConfigError
from megatron_mode.report import page as report_page
from megatron_mode.report.run_folder import read_runs


def build_page(run_dirs):
    return report_page.build_page(read_runs(run_dirs))


VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Check that tags balance; keep the text, the token titles and the curves by figure."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.titles, self.curves, self.figure = [], [], [], {}, ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "span" and "title" in attributes:
            self.titles.append(attributes["title"])
        if tag == "polyline":
            points = [tuple(map(float, p.split(","))) for p in attributes["points"].split()]
            self.curves.setdefault(self.figure, []).append(points)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h3":
            self.figure = data
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self):
        return " ".join("".join(self.text).split())


def test_the_page_fetches_and_runs_nothing(make_run):
    page = build_page([make_run("real")])
    assert not re.search(r"<script|<link|<img|@import|url\(|https?://|\son\w+=", page)


def test_head_figures_and_tables_show_the_run(make_run):
    words = Page(build_page([make_run("real")])).words
    for shown in ("3.571", "unigram entropy 6.134", "0.9714", "0.9986", "0.9853", "10,987",
                  "at most 0.938 rows off", "assistant-held-out", "16,384",
                  "2 CPU cores"):  # fmt: skip
        assert shown in words, shown
    assert "AUROC documents" not in words.split("Held out, by source")[1]  # null for every source


def test_curves_are_drawn_where_the_numbers_are(make_run):
    run = make_run("real", steps=100)
    (curve,) = Page(build_page([run])).curves["Throughput"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    values = [line["tokens_per_second"] for line in lines]
    assert len(curve) == 100
    # Pixels are affine in the value: two points fix the map, all the others must lie on it.
    low, high = values.index(min(values)), values.index(max(values))
    scale = (curve[high][1] - curve[low][1]) / (values[high] - values[low])
    assert scale < 0
    for (_, y), value in zip(curve, values, strict=True):
        assert y == pytest.approx(curve[low][1] + scale * (value - values[low]), abs=0.11)
    xs = [x for x, _ in curve]
    assert xs == sorted(xs)


def test_heat_map_keeps_text_newlines_and_markup(make_run):
    page = build_page([make_run("real")])
    parsed = Page(page)
    text = "".join(parsed.text)
    assert "<b>laughed</b> & wrote" in text
    assert "for longer? \n\nKeep it" in text or "for longer?\n\nKeep it" in text
    assert "<b>laughed" not in page
    assert len(parsed.titles) == sum(
        len(passage["tokens"])
        for passage in json.loads((make_run("again") / "heatmap.json").read_text())["passages"]
    )
    assert all(re.search(r"p [01]\.\d{3}", title) for title in parsed.titles)
    assert 'class="p16 k"' in page  # <|doc|> at p = 0.4, marked as a control piece


def test_hostile_text_stays_text(make_run):
    run = make_run("real")
    token = {"text": '"><script>x\x1b', "probability": None, "control": False}
    passage = {"title": "<i>", "source": "&s", "kind": "prose", "tokens": [token]}
    (run / "heatmap.json").write_text(json.dumps({"passages": [passage]}))
    page = build_page([run])
    parsed = Page(page)
    assert "<script" not in page
    assert "\x1b" not in page
    assert parsed.titles == ['"><script>x\u241b']


def test_ten_thousand_steps_are_thinned_and_quick(make_run):
    run = make_run("long", steps=10_000)
    begin = time.process_time()  # a busy machine is not our fault
    page = build_page([run])
    assert time.process_time() - begin < 3
    assert len(page) < 300_000
    for curves in Page(page).curves.values():
        assert max(map(len, curves)) <= 160


def test_several_runs_share_the_charts(make_run):
    runs = [make_run("first"), make_run("second", seed=1, level=0.5)]
    alone, both = Page(build_page(runs[:1])), Page(build_page(runs))
    for title, curves in alone.curves.items():
        # The unigram entropy of both runs is the same number and drawn once.
        shared = 1 if title == "LM loss by mode" else 0
        assert len(both.curves[title]) == 2 * len(curves) - shared, title
    assert "4.071" in both.words


def test_runs_of_one_folder_name_are_told_apart(make_run):
    """Each has the shortest end of its path that no other run has."""
    runs = [make_run(name, steps=3) for name in ("a/old/tiny", "b/old/tiny", "b/new/tiny", "big")]
    words = Page(build_page(runs)).words
    for name in ("a/old/tiny", "b/old/tiny", "new/tiny", "big"):
        assert f"run folder {name};" in words
    assert "run folder tiny;" in Page(build_page(runs[:1])).words


def test_missing_and_damaged_pieces_are_left_out_and_named(make_run):
    run = make_run("bare", steps=3)
    for name in ("heatmap.json", "environment.json", "config.yaml"):
        (run / name).unlink()
    (run / "summary.json").write_text('{"valid_lm_loss": 3.')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tok')
    words = Page(build_page([run])).words
    assert "no heatmap.json: the heat map is left out" in words
    assert "summary.json cannot be read" in words
    assert "3 steps" in words


WRONG = (None, 5, -1, math.inf, math.nan, 10**400, True, "x", "", [], {}, [1], {"a": 1}, [[]])
FILES = ("summary.json", "heatmap.json", "environment.json", "metrics.jsonl")


def places(value, place=()):
    """List the paths of all values inside a JSON value, its own among them."""
    yield place
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*place, key))


def spoil(draw, text):
    """Put a value of another type at some place of a JSON text, or take the place out."""
    value, wrong = json.loads(text), draw.choice(WRONG)
    *path, last = draw.choice([place for place in places({"": value}) if place])
    holder = {"": value}
    inner = holder
    for key in path:
        inner = inner[key]
    if draw.random() < 0.2 and last != "":
        del inner[last]
    else:
        inner[last] = wrong
    return json.dumps(holder[""])


def test_values_of_other_types_are_left_out_or_refused(make_run):
    """Whatever stands where, there is a page or a sentence."""
    run, draw = make_run("odd", steps=3), random.Random(7)
    texts = {name: (run / name).read_text() for name in FILES}
    pages = 0
    for _ in range(300):
        name = draw.choice(FILES)
        if name == "metrics.jsonl":
            lines = texts[name].splitlines()
            at = draw.randrange(len(lines))
            lines[at] = spoil(draw, lines[at])
            (run / name).write_text("\n".join(lines))
        else:
            (run / name).write_text(spoil(draw, texts[name]))
        with contextlib.suppress(ConfigError):  # no line of metrics is left
            pages += "<html" in build_page([run])
        (run / name).write_text(texts[name])
    assert pages > 290


def test_held_out_curves_end_in_the_final_evaluation(make_run):
    run = make_run("real", steps=20)
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    del lines[-1]["valid_mode_auroc"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "held out, plain 0.9714" in Page(build_page([run])).words
    summary["tokens_seen"] = lines[-2]["tokens_seen"]
    (run / "summary.json").write_text(json.dumps(summary))
    assert "before the run continued" in Page(build_page([run])).words


def test_sources_without_rows_and_position_zero_have_no_curve(make_run):
    run = make_run("real", steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tokens_seen": 99999, "rows_by_source": {"web": 0}}\n')
    summary = json.loads((run / "summary.json").read_text())
    summary["auroc_by_position"] = {"plain": {"0": 0.5, "1": 0.75}}
    (run / "summary.json").write_text(json.dumps(summary))
    words = Page(build_page([run])).words
    assert "Share of rows by source" not in words
    assert "held out, plain 0.75" in words


def test_a_single_step_and_absent_classes_still_make_a_page(tmp_path):
    line = {"step": 1, "tokens_seen": 64, "lm_loss_mode1": 7.5, "lm_loss_mode2": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    page = Page(build_page([tmp_path]))
    assert "train, Mode 1 7.5" in page.words
    assert "Mode 2 7" not in page.words


def test_verb_writes_the_page_beside_the_run(make_run, capsys):
    run = make_run("real")
    assert run_verb(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert run_verb(["report", str(run), str(run), "--out", str(run / "two.html"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["report"] == str(run / "two.html")
    assert printed["runs"][0]["Held-out LM loss, nats/token"] == "3.571"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], "'nowhere' is not a folder"),
        (["empty"], "no metrics.jsonl"),
        (["torn"], "no step in metrics.jsonl"),
        (["good", "good"], "--out"),
        (["good", "--out", "nowhere/page.html"], "nowhere/page.html"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, named, make_run, tmp_path, monkeypatch, capsys):
    make_run("good", steps=2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "metrics.jsonl").write_text('{"step"')
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert exit_status(lambda: run_verb(["report", *arguments])) == 2
    message = capsys.readouterr().err.strip()
    assert named in message
    assert "\n" not in message
    assert sorted(tmp_path.rglob("*")) == before
