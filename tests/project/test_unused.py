"""Every public function, class and method of the product has a user in the product."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator

PRODUCT = ("megatron_mode/", "kernels/", "launch/")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
# Names that only a library calls, or people in a shell: path::name, and who does.
ALLOWED: dict[str, str] = {}


def definitions(tree: ast.Module) -> Iterator[Definition]:
    """Yield the public functions and classes of a module and the methods of its classes."""
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node
        if isinstance(node, ast.ClassDef):
            yield from (
                part
                for part in node.body
                if isinstance(part, Definition) and not part.name.startswith("_")
            )


def names(tree: ast.AST) -> Counter[str]:
    """Count the names and attributes that code reads; an import alone is no use."""
    read: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            read[node.id] += 1
        elif isinstance(node, ast.Attribute):
            read[node.attr] += 1
    return read


def find_unused(trees: dict[str, ast.Module]) -> set[str]:
    """Return path::name of each definition that nothing names outside of its own body."""
    read = sum((names(tree) for tree in trees.values()), Counter[str]())
    return {
        f"{path}::{node.name}"
        for path, tree in trees.items()
        for node in definitions(tree)
        if read[node.name] <= names(node)[node.name]
    }


def test_everything_public_has_a_user(trees):
    product = {path: tree for path, tree in trees.items() if path.startswith(PRODUCT)}
    unused = find_unused(product)
    assert sorted(unused - ALLOWED.keys()) == [], "delete it, or allow it with a reason"
    assert sorted(ALLOWED.keys() - unused) == [], "has a user now: take it off the list"


def test_only_a_use_outside_of_its_own_body_counts():
    text = "def used(): ...\ndef alone(): alone()\nclass Box:\n  def open(self): used()\n"
    assert find_unused({"a.py": ast.parse(text), "b.py": ast.parse("from a import alone")}) == {
        "a.py::alone",
        "a.py::Box",
        "a.py::open",
    }
