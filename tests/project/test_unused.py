"""Every public function, class and method of the product has a user in the product."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator

PRODUCT = ("megatron_mode/", "kernels/", "launch/")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
# path::name of what only a library, a page or a later verb calls, and who does.
ALLOWED = {
    "megatron_mode/checkpoint/writer.py::commit": "DeepSpeed",
    "megatron_mode/checkpoint/writer.py::create": "DeepSpeed",
    "megatron_mode/checkpoint/writer.py::preserves_storage_sharing": "DeepSpeed",
    "megatron_mode/config/yaml_text.py::ignore_aliases": "PyYAML",
    "megatron_mode/config/yaml_text.py::fetch_tag": "PyYAML",
    "megatron_mode/cost/ranks.py::checkpoint_files": "the verb of plans, to come",
    "megatron_mode/cost/ranks.py::plan_rank": "the verb of plans, to come",
    "megatron_mode/engine/pipeline.py::get_tied_weights_and_groups": "DeepSpeed",
    "megatron_mode/engine/build.py::rehearse": "the verb of plans, to come",
    "megatron_mode/report/svg.py::ticks": "templates/figure.html",
}


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
    defined = {f"{path}::{node.name}" for path in product for node in definitions(product[path])}
    used = (ALLOWED.keys() & defined) - unused
    assert sorted(used) == [], "it has a user: take it off the list"


def test_only_a_use_outside_of_its_own_body_counts():
    text = "def used(): ...\ndef alone(): alone()\nclass Box:\n  def open(self): used()\n"
    assert find_unused({"a.py": ast.parse(text), "b.py": ast.parse("from a import alone")}) == {
        "a.py::alone",
        "a.py::Box",
        "a.py::open",
    }
