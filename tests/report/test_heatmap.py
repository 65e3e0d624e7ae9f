from __future__ import annotations

import io
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mode.report.heatmap import (
    LEVELS,
    TEXT_COLOUR,
    ansi_legend,
    ansi_token,
    level_of,
    rgb,
    wants_colour,
)

PROBABILITIES = [level / (LEVELS - 1) for level in range(LEVELS)]


def luminance(colour):
    """Return the relative luminance of WCAG 2.1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in
              (channel / 255 for channel in colour)]  # fmt: skip
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_readable_on_every_level(theme):
    for probability in PROBABILITIES:
        values = sorted((luminance(rgb(probability, theme)), luminance(TEXT_COLOUR[theme])))
        assert (values[1] + 0.05) / (values[0] + 0.05) >= 4.5  # WCAG AA


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colour_goes_from_blue_to_orange_without_turning_back(theme):
    warmth = [rgb(p, theme)[0] - rgb(p, theme)[2] for p in PROBABILITIES]
    assert warmth == sorted(warmth)
    assert warmth[0] < -50
    assert abs(warmth[LEVELS // 2]) <= 2
    assert warmth[-1] > 50
    assert len({rgb(p, theme) for p in PROBABILITIES}) == LEVELS


def test_levels_clamp_and_take_nan_as_undecided():
    assert [level_of(p) for p in (-1.0, 0.0, 0.5, 1.0, 2.0, math.nan)] == [0, 0, 20, 40, 40, 20]


@given(st.text(max_size=30), st.floats(0, 1))
def test_without_the_colours_the_text_is_left(text, probability):
    shown = ansi_token(text, probability)
    bare = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert "\x1b" not in bare
    assert bare.count("\n") == text.count("\n")
    if text.isprintable():
        assert bare == text
    assert all(not line or line.endswith("\x1b[0m") for line in shown.split("\n"))


def test_plain_style_names_the_probability():
    assert ansi_token(" cat", 0.934, colour=False) == " cat[0.93]"
    assert ansi_token("\n", 0.5, colour=False) == "[0.50]\n"
    assert "\x1b" not in ansi_token("\x1b[2J", 0.1, colour=False)
    assert "\x1b" not in ansi_legend(colour=False)
    assert "Mode 2" in ansi_legend()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colour_needs_a_terminal_and_no_objection():
    assert wants_colour(Terminal(), {"TERM": "xterm"})
    assert wants_colour(Terminal(), {"NO_COLOR": ""})
    assert not wants_colour(Terminal(), {"NO_COLOR": "1"})
    assert not wants_colour(Terminal(), {"TERM": "dumb"})
    assert not wants_colour(io.StringIO(), {})
