"""What README and the other pages name exists, and what they show loads."""

import argparse
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from megatron_mode.__main__ import VERBS
from megatron_mode.command_line import CommandParser
from megatron_mode.config import load_config
from megatron_mode.config.describe import walk_fields

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "configs/README.md",
    "CHANGELOG.md",
    *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))),
)
TASKS = ("a schedule shape", "a metric", "an attention core", "a source format", "a verb", "a per-")


@pytest.fixture(params=PAGES)
def name(request):
    return request.param


@pytest.fixture
def page(name):
    return text_of(name)


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks_of(page, languages):
    return re.findall(rf"^```(?:{languages})\n(.*?)^```", page, flags=re.M | re.S)


def commands_of(page):
    """Return the lines of the fenced shell blocks of a page."""
    lines = "\n".join(blocks_of(page, "sh|bash|console")).replace("\\\n", " ").splitlines()
    return [re.split(r"\s#", line)[0].strip() for line in lines if line.split("#")[0].strip()]


def links_of(page):
    return re.findall(r"!?\[[^\]]*\]\((?!https?:|#)([^)#]+)\)", page)


@pytest.fixture
def config_of(tmp_path, page):
    """Load a run file that a page names: of the repository, or as the page writes it."""
    (tmp_path / "run").mkdir()
    for block in blocks_of(page, "yaml"):
        if block.startswith("model:") and "run:" in block:
            (tmp_path / "run/mine.yaml").write_text(block)

    def load(run_file, overrides=()):
        is_own = run_file == "configs/run/mine.yaml"
        return load_config(tmp_path / "run/mine.yaml" if is_own else ROOT / run_file, overrides)

    return load


def test_readme_is_short_and_shows_commands():
    assert len(text_of("README.md").splitlines()) <= 130
    assert len(commands_of(text_of("README.md"))) >= 2


def test_readme_leads_to_every_page():
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= set(
        links_of(text_of("README.md"))
    )


def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), flags=re.M))
    assert set(re.findall(r"`?\bmake ([a-z][\w-]+)`", page)) <= targets
    named = {line.split()[1] for line in commands_of(page) if line.startswith("make ")}
    assert named <= targets


def test_commands_of_verbs_parse(page):
    """Every `megatron-mode VERB ...` that a page shows is a command line that the verb takes."""
    for line in commands_of(page):
        words = shlex.split(line)
        if words[0] != "megatron-mode":
            continue
        assert words[1] in VERBS, line
        parser = CommandParser(prog=f"megatron-mode {words[1]}", allow_abbrev=False)
        import_module(f"megatron_mode.commands.{words[1]}").add_arguments(parser)
        assert isinstance(parser.parse(words[2:]), argparse.Namespace), line


def test_files_exist(name, page):
    """A file of the repository that a page names is there; X, NAME and ... stand for many."""
    path = r"(?:configs|launch|tests|kernels|megatron_mode|benchmarks|docs)/[\w./-]+\.\w+"
    named = {ROOT / found for found in re.findall(rf"(?<![\w/]){path}", page)}
    named |= {(ROOT / name).parent / link for link in links_of(page)}
    missing = [
        str(file)
        for file in named
        if not re.search(r"\b[A-Z]+\.|/X\b|mine\.yaml", str(file)) and not file.exists()
    ]
    assert missing == [] or name == "CHANGELOG.md"


def test_overrides_of_commands_are_accepted(page, config_of):
    """Run files of shown commands load, with the overrides that the command gives."""
    for line in commands_of(page):
        if run_file := re.search(r"(?:--config|order) (configs/\S+\.yaml)", line):
            overrides = re.findall(r"\s([a-z]\w*(?:\.[\w.]+)?=\S+)", line)
            config_of(run_file[1], overrides if "--config" in line else ())


def test_run_files_of_pages_load(page, config_of):
    for block in blocks_of(page, "yaml"):
        if block.startswith("model:") and "run: {dir: runs/mine" in block:
            assert config_of("configs/run/mine.yaml").run.dir == "runs/mine"


def test_configuration_keys_exist(page):
    """`section.key`, in backquotes and with or without a value, is a key or a section."""
    keys = {re.sub(r"\[\]", "", key) for key, _ in walk_fields()}
    known = {".".join(key.split(".")[:depth]) for key in keys for depth in range(1, 6)}
    sections = {key.partition(".")[0] for key in keys}
    named = re.findall(r"`([a-z]\w*(?:\.[a-z]\w*(?:\[\])?)+)(?:[=:][^`]*)?`", page)
    wrong = [
        key
        for found in named
        if (key := found.replace("[]", "")).partition(".")[0] in sections and key not in known
        if not re.search(r"\.(?:idx|py|bin|jsonl?|yaml)$", key)
    ]
    assert wrong == []


def test_measured_figures_have_their_command():
    for table in re.findall(r"^\| what \|.*?\n\n", text_of("docs/measured.md"), re.M | re.S):
        for row in table.strip().splitlines()[2:]:
            command = re.split(r"(?<!\\)\|", row)[2].strip()
            assert "`" in command or command.startswith("the same"), row
            for script in re.findall(r"tests/[\w/]+\.py", command):
                assert (ROOT / script).exists(), row


def test_contributing_shows_the_layers_that_are_checked():
    contracts = tomllib.loads(text_of("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["id"] == "layers")
    shown = text_of("docs/contributing.md").partition("<!-- layers: begin -->\n```text\n")[2]
    assert shown.partition("\n```")[0].splitlines() == layers


def places_of(task):
    """Return the example of a task in contributing.md and the files that it lists, one a bullet."""
    for section in re.split(r"^### ", text_of("docs/contributing.md"), flags=re.M)[1:]:
        if section.startswith(task):
            break
    for part in re.split(r"Example: ", section)[1:]:
        yield (
            re.match(r"`(\w+)`", part)[1],
            re.findall(r"^- \[[^\]]*\]\(\.\./([^)]*)\)", part, re.M),
        )


@pytest.mark.parametrize("task", TASKS)
def test_places_of_a_task_name_its_example(task):
    for example, places in places_of(task):
        assert places, task
        for place in places:
            assert example in text_of(place) or example in place, f"{place} has no {example!r}"


@pytest.mark.parametrize("task", ["a schedule shape", "a metric"])
def test_no_place_of_a_task_is_missing(task, sources):
    """A file that names the example and is not on the list would be found too late."""
    for example, places in places_of(task):
        named = {
            path
            for path, text in sources.items()
            if path.startswith(("megatron_mode/", "kernels/")) and f'"{example}"' in text
        }
        assert named <= set(places), f"add to docs/contributing.md: {named - set(places)}"


def test_the_site_renders(tmp_path):
    pytest.importorskip("mkdocs", reason="`make docs-site` installs mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    home = (tmp_path / "index.html").read_text()
    assert 'href="quickstart.html"' in home
    assert (tmp_path / "repository/megatron_mode/report/example.png").exists()
    assert "docs/" not in re.findall(r'href="([^"]*)"', home)
