"""Sizes of files and functions, and what may not stand in the tree."""

import ast
import re
import subprocess

FILE_LINES, FUNCTION_LINES, KERNEL_LINES, PARAMETERS, TYPE_IGNORES = 300, 50, 120, 6, 10
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
VAGUE_NAMES = {"utils", "helpers", "common", "manager"}


def is_kernel(function):
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def functions_of(trees):
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, FUNCTIONS):
                yield path, node


def test_files_are_short(sources):
    lengths = {path: len(text.splitlines()) for path, text in sources.items()}
    assert {p: n for p, n in lengths.items() if n > FILE_LINES} == {}


def test_functions_are_short(trees):
    long = {}
    for path, function in functions_of(trees):
        lines = function.end_lineno - function.lineno + 1
        if lines > (KERNEL_LINES if is_kernel(function) else FUNCTION_LINES):
            long[f"{path}:{function.name}"] = lines
    assert long == {}


def test_functions_take_few_parameters(trees):
    many = {}
    for path, function in functions_of(trees):
        names = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
        # pytest hands fixtures to tests as parameters, Triton its pointers and sizes to kernels,
        # and autograd functions are called by position only.
        by_position = is_kernel(function) or "ctx" in names[:1]
        if path.startswith("tests/") or by_position:
            continue
        count = len([name for name in names if name not in ("self", "cls")])
        if count > PARAMETERS:
            many[f"{path}:{function.name}"] = count
    assert many == {}


def test_modules_have_telling_names(sources):
    words = {part.removesuffix(".py") for path in sources for part in path.split("/")}
    assert words & VAGUE_NAMES == set()


def test_type_ignores_are_few_and_give_their_reason(sources):
    mark = "type: " + "ignore"
    lines = [
        f"{path}: {line.strip()}"
        for path, text in sources.items()
        for line in text.splitlines()
        if re.search(rf"#\s*{mark}", line)
    ]
    assert len(lines) <= TYPE_IGNORES, lines
    assert [line for line in lines if not re.search(rf"{mark}\[[\w, -]+\]\s+#\s*\w", line)] == []


def test_comments_hold_no_bare_todo(sources):
    todo = re.compile(r"#.*\b(TO" + r"DO|FIX" + r"ME)\b(?!.*#\d+)")
    assert [path for path, text in sources.items() if todo.search(text)] == []


def test_no_path_of_one_machine_stands_in_the_tree(root):
    """A path below somebody's home or workspace works on that machine only."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    path = re.compile(r"(?<![\w.$~*}\])>-])/(root|home|work|mnt|farm|Users)/\w")
    found = []
    for name in filter(None, tracked):
        file = root / name
        if file.is_symlink() or not file.is_file() or file.suffix in (".gz", ".png", ".model"):
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        found += [f"{name}: {match[0]}" for match in path.finditer(text)]
    assert found == []


def test_functions_of_model_and_mix_know_no_process_groups(sources):
    """Only layers derived from megatron-core's, which hold their group, communicate."""
    derived = "megatron_mode/model/sequence_parallel.py"
    single_device = ("megatron_mode/mix/", "megatron_mode/model/", "kernels/")
    word = re.compile(r"torch\.distributed|\bdist\.|process_group|get_rank\(|deepspeed")
    assert [
        path
        for path, text in sources.items()
        if path.startswith(single_device) and path != derived and word.search(text)
    ] == []
