"""Optional packages are found, missing or broken; one place chooses, and the table says what."""

from __future__ import annotations

import importlib
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_mode.config import load_config
from megatron_mode.config.presets import find_configs
from megatron_mode.engine import accelerators
from megatron_mode.engine.accelerators import (
    Accelerator,
    Implementations,
    accelerator_table,
    choose_implementations,
    probe,
)
from megatron_mode.errors import ConfigError

STATES = {
    "working": ("ANSWER = 42\n", "found"),
    "unlinked": (
        "raise ImportError('libcudart.so.12: cannot open shared object file')\n",
        "broken (ImportError: libcudart.so.12: cannot open shared object file)",
    ),
    "unlucky": ("1 / 0\n", "broken (ZeroDivisionError: division by zero)"),
    # The package is there: what it needs is not.
    "lonely": ("import no_such_dependency\n", "broken (No module named 'no_such_dependency')"),
}
PLAIN = Implementations("dense", "torch", "torch", "chunked")
# Each optional package: the key and value that ask for it, the module that is looked for.
ASKED = [
    ("attention", "flash", "flash_attn"),
    ("norm", "transformer_engine", "transformer_engine"),
    ("adamw", "apex", "amp_C"),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return a function that puts a module on sys.path; what it put there goes with the test."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(name: str, text: str) -> Accelerator:
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        importlib.invalidate_caches()
        return Accelerator(name, name, "adamw", name)

    yield write
    for module in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[module], "__file__", "")):
            del sys.modules[module]


def tiny(*overrides: str):
    return load_config(find_configs() / "run" / "tiny.yaml", list(overrides))


@pytest.mark.parametrize("state", STATES)
def test_the_true_reason_is_told(state, place):
    text, expected = STATES[state]
    assert probe(place(f"fake_accelerator_{state}", text).module) == expected


def test_a_missing_package_is_not_installed():
    for module in ("no_such_accelerator", "no_such_accelerator.pytorch"):
        assert probe(module) == "not installed"


def test_a_package_without_its_part_for_torch_is_broken(place):
    place("fake_accelerator_partial.jax", "")
    assert (
        probe("fake_accelerator_partial.pytorch")
        == "broken (No module named 'fake_accelerator_partial.pytorch')"
    )


def test_the_apex_of_the_package_index_is_not_nvidias(place):
    """A module called apex alone proves nothing: NVIDIA's has the extension amp_C."""
    place("apex", "")
    (apex,) = [a for a in accelerators.ACCELERATORS if a.name == "apex"]
    assert probe(apex.module) == "not installed"


@pytest.mark.parametrize(
    ("device_type", "overrides", "expected"),
    [
        ("cpu", (), "dense"),
        ("cuda", (), "flex"),
        ("cuda", ("model.attention_heads=16", "model.kv_heads=16"), "dense"),  # heads of 8
        ("cuda", ("accelerators.attention=dense",), "dense"),
        ("cuda", ("accelerators.attention=flex",), "flex"),
    ],
)
def test_what_torch_computes_is_chosen_by_the_device(device_type, overrides, expected):
    chosen = choose_implementations(tiny(*overrides), device_type, bf16=True)
    assert chosen == Implementations(expected, "torch", "torch")


def test_auto_does_not_depend_on_what_is_installed(place):
    """Two machines of a run may differ in it."""
    for _, _, module in ASKED:
        place(f"{module}.__init__", "")
    assert choose_implementations(tiny(), "cuda", bf16=True).attention == "flex"
    assert choose_implementations(tiny(), "cuda", bf16=True)[1:3] == ("torch", "torch")


@pytest.mark.parametrize(("key", "value", "module"), ASKED)
def test_a_package_that_is_asked_for_is_taken(key, value, module, place):
    place("transformer_engine.pytorch", "")
    place(f"{module}.__init__", "")
    config = tiny(f"accelerators.{key}={value}")
    chosen = choose_implementations(config, "cuda", bf16=True)
    assert getattr(chosen, key) == value


@pytest.mark.parametrize(("key", "value", "module"), ASKED)
@pytest.mark.parametrize("state", ["absent", "unlinked", "on a CPU"])
def test_a_package_that_cannot_run_is_refused_with_the_reason(key, value, module, state, place):
    reason = {"absent": "not installed", "on a CPU": "this run is on cpu"}.get(state)
    if reason is None:
        text, reason = STATES[state]
        place(f"{module}.__init__", text)
    elif state == "on a CPU":
        place("transformer_engine.pytorch", "")
        place(f"{module}.__init__", "")
    device_type = "cpu" if state == "on a CPU" else "cuda"
    with pytest.raises(ConfigError) as caught:
        choose_implementations(tiny(f"accelerators.{key}={value}"), device_type, bf16=True)
    assert str(caught.value).startswith(f"accelerators.{key} is '{value}', which ")
    assert reason in str(caught.value)
    assert str(caught.value).endswith(f"set accelerators.{key}=auto")


@pytest.mark.parametrize(
    ("overrides", "device_type", "bf16", "reason"),
    [
        (("attention=flex",), "cpu", False, "runs on a GPU with heads of at least 16"),
        (("attention=flash",), "cuda", False, "runs in bf16 with heads of"),
    ],
)
def test_an_attention_that_cannot_run_is_refused(overrides, device_type, bf16, reason, place):
    place("flash_attn.__init__", "")
    config = tiny(*(f"accelerators.{override}" for override in overrides))
    with pytest.raises(ConfigError, match=re.escape(reason)):
        choose_implementations(config, device_type, bf16=bf16)


def test_the_table_has_a_line_for_each(place, monkeypatch):
    packages = (
        place("fake_accelerator_there", ""),
        place("fake_accelerator_broken", "raise OSError('no driver')\n"),
        Accelerator("gone", "no_such_accelerator", "norm", "gone"),
    )
    monkeypatch.setattr(accelerators, "ACCELERATORS", packages)
    head, *lines = accelerator_table(PLAIN).splitlines()
    assert head.split() == ["accelerator", "state", "used"]
    assert [line.split()[0] for line in lines] == [a.name for a in packages]
    assert "found, not used" in lines[0]
    assert "broken (OSError: no driver)" in lines[1]
    assert "not installed" in lines[2]
    assert [line.split()[-2:] for line in lines] == [
        ["torch", "AdamW"], ["torch", "AdamW"], ["torch", "RMSNorm"],
    ]  # fmt: skip
    taken = PLAIN._replace(adamw="fake_accelerator_there")
    assert "not used" not in accelerator_table(taken).splitlines()[1]


def test_the_table_says_who_computes_attention_and_loss():
    table = accelerator_table(PLAIN._replace(attention="flex", loss="triton"))
    assert "flex attention" in table
    assert "triton loss" in table
    assert "dense attention" in accelerator_table(PLAIN)


def test_the_norm_of_transformer_engine_comes_through_megatron_core(monkeypatch):
    """megatron-core hands width, epsilon and dtype on; a stand-in notes them."""
    from megatron.core.extensions import transformer_engine as extension

    from megatron_mode.model.elementwise import norm_class

    class Noted(torch.nn.Module):
        def __init__(self, **given):
            super().__init__()
            self.given = given

    monkeypatch.setattr(extension, "HAVE_TE", True)
    monkeypatch.setattr(extension, "te", SimpleNamespace(pytorch=SimpleNamespace(RMSNorm=Noted)))
    monkeypatch.setattr(
        extension, "_get_extra_te_kwargs", lambda c: {"params_dtype": c.params_dtype}
    )
    config = SimpleNamespace(
        normalization="RMSNorm",
        sequence_parallel=False,
        layernorm_zero_centered_gamma=False,
        params_dtype=torch.bfloat16,
    )
    built = norm_class("transformer_engine")(config, 48, eps=1e-6)
    assert built.given == {
        "hidden_size": 48,
        "eps": 1e-6,
        "sequence_parallel": False,
        "zero_centered_gamma": False,
        "params_dtype": torch.bfloat16,
    }
