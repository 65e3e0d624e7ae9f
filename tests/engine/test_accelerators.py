"""Optional packages are found, missing or broken, and the table says which."""

from __future__ import annotations

import importlib

import pytest

from megatron_mode.engine import accelerators
from megatron_mode.engine.accelerators import Accelerator, accelerator_table, probe

STATES = {
    "working": ("ANSWER = 42\n", "found, not used"),
    "unlinked": (
        "raise ImportError('libcudart.so.12: cannot open shared object file')\n",
        "broken (ImportError: libcudart.so.12: cannot open shared object file)",
    ),
    "unlucky": ("1 / 0\n", "broken (ZeroDivisionError: division by zero)"),
    # The package is there: what it needs is not.
    "lonely": ("import no_such_dependency\n", "broken (No module named 'no_such_dependency')"),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return a function that puts a module on sys.path."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str) -> Accelerator:
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return Accelerator(name, name, "what stands in")

    return write


@pytest.mark.parametrize("state", STATES)
def test_the_true_reason_is_told(state, place):
    text, expected = STATES[state]
    assert probe(place(f"fake_accelerator_{state}", text)) == expected


def test_a_missing_package_is_not_installed():
    missing = Accelerator("missing", "no_such_accelerator", "what stands in")
    assert probe(missing) == "not installed"


def test_the_apex_of_the_package_index_is_not_nvidias(place):
    """A module called apex alone proves nothing: NVIDIA's has the extension amp_C."""
    place("apex", "")
    (apex,) = [a for a in accelerators.ACCELERATORS if a.name == "apex"]
    assert apex.module == "amp_C"


def test_the_table_has_a_line_for_each(place, monkeypatch):
    chosen = (
        place("fake_accelerator_there", ""),
        place("fake_accelerator_broken", "raise OSError('no driver')\n"),
        Accelerator("gone", "no_such_accelerator", "plain torch"),
    )
    monkeypatch.setattr(accelerators, "ACCELERATORS", chosen)
    head, *lines = accelerator_table().splitlines()
    assert head.split() == ["accelerator", "state", "used"]
    assert [line.split()[0] for line in lines] == [a.name for a in chosen]
    for line, accelerator in zip(lines, chosen, strict=True):
        assert probe(accelerator) in line
        assert line.endswith(accelerator.instead)


def test_the_table_says_whether_triton_computes_the_loss():
    assert "the fused loss" in accelerator_table("triton")
    assert "the fused loss" not in accelerator_table("chunked")
