"""What README and the other pages name exists."""

import re

import pytest

from megatron_mode.__main__ import VERBS

PAGES = ("README.md", "configs/README.md", "CHANGELOG.md")


@pytest.fixture(params=PAGES)
def page(request, root):
    return (root / request.param).read_text(encoding="utf-8")


def commands_of(page):
    """Return the lines of the fenced shell blocks of a page."""
    blocks = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", page, flags=re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.partition("#")[0].strip()]


def test_readme_shows_commands(root):
    assert len(commands_of((root / "README.md").read_text(encoding="utf-8"))) >= 2


def test_make_targets_exist(page, root):
    targets = set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"`?\bmake ([a-z][\w-]+)`", page)) <= targets
    named = {line.split()[1] for line in commands_of(page) if line.startswith("make ")}
    assert named <= targets


def test_verbs_exist(page):
    named = {
        match[1] for line in commands_of(page) if (match := re.match(r"megatron-mode (\w+)", line))
    }
    assert named <= set(VERBS)


def test_files_exist(page, root):
    """A file of the repository that a page names is there; X, NAME and ... stand for many."""
    path = r"(?:configs|launch|tests|kernels|megatron_mode|benchmarks|docs)/[\w./-]+\.\w+"
    named = set(re.findall(rf"(?<![\w/]){path}", page))
    named |= set(re.findall(r"!?\[[^\]]*\]\((?!https?:|#)([^)#]+)\)", page))
    missing = [
        name
        for name in named
        if not re.search(r"\b[A-Z]+\.|/X\b", name) and not (root / name).exists()
    ]
    assert missing == []


def test_keys_of_commands_are_accepted(page, root):
    """Overrides in shown commands load with the run file that the command names."""
    from megatron_mode.config import load_config

    for line in commands_of(page):
        if run_file := re.search(r"--config (\S+\.yaml)", line):
            load_config(root / run_file[1], re.findall(r"\s([a-z]\w*\.[\w.]+=\S+)", line))
