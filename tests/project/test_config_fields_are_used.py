"""Every option has a user: something reads it, and a preset or a test sets it."""

import re

import yaml

from megatron_mode.config.describe import walk_fields

# Set to null or left out, these mean "taken from elsewhere", and tests set them with the rest.
LEAVES = sorted({key for key, _ in walk_fields()})


def names_set(tree):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key
            yield from names_set(value)
    elif isinstance(tree, list):
        for item in tree:
            yield from names_set(item)


def test_every_field_is_read(sources):
    code = "\n".join(
        text
        for path, text in sources.items()
        if path.startswith(("megatron_mode/", "kernels/", "launch/"))
        and not path.startswith("megatron_mode/config/")
    )
    unread = [key for key in LEAVES if not re.search(rf"\.{key.split('.')[-1]}\b", code)]
    assert unread == []


def test_every_field_is_set_by_a_preset_or_a_test(root, sources):
    in_presets = {
        name
        for path in (root / "configs").glob("*/*.yaml")
        for name in names_set(yaml.safe_load(path.read_text()))
    }
    tests = "\n".join(text for path, text in sources.items() if path.startswith("tests/"))
    unset = []
    for key in LEAVES:
        name = key.split(".")[-1]
        if name not in in_presets and not re.search(rf"\b{name}[\"']?\s*[=:]", tests):
            unset.append(key)
    assert unset == []
