"""Colour tokens by mode probability, alike on the page and in a terminal.

Blue is Mode 1, orange Mode 2, grey undecided: hues that most colour-blind readers can
distinguish. Between the three anchors colours are linear in OKLab (Ottosson, 2020), where
equal steps look equal; both ends are equally light, so neither mode looks weightier than the other.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Literal, TextIO

Rgb = tuple[int, int, int]
Theme = Literal["light", "dark"]

LEVELS = 41  # steps of 2.5 %: the eye cannot distinguish finer ones
# Lightness, a (green to red) and b (blue to yellow) at p = 0, 0.5 and 1, and the text's colour.
_ANCHORS: dict[Theme, tuple[tuple[float, float, float], ...]] = {
    "light": ((0.80, -0.045, -0.100), (0.96, 0.0, 0.0), (0.80, 0.070, 0.115)),
    "dark": ((0.46, -0.030, -0.115), (0.27, 0.0, 0.0), (0.46, 0.080, 0.090)),
}
_PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
_PICTURES |= dict.fromkeys(range(0x7F, 0xA0), "\N{REPLACEMENT CHARACTER}")
TEXT_COLOUR: dict[Theme, Rgb] = {"light": (20, 22, 26), "dark": (240, 241, 243)}


def level_of(probability: float) -> int:
    """Return the nearest level, 0 for Mode 1 to LEVELS - 1 for Mode 2; NaN gives the middle."""
    if math.isnan(probability):
        return LEVELS // 2
    return round(min(max(probability, 0.0), 1.0) * (LEVELS - 1))


def rgb(probability: float, theme: Theme = "light") -> Rgb:
    """Return the background of a token of this mode probability, three bytes sRGB."""
    position = 2 * level_of(probability) / (LEVELS - 1)
    below = min(int(position), 1)
    low, high = _ANCHORS[theme][below], _ANCHORS[theme][below + 1]
    lightness, a, b = (x + (position - below) * (y - x) for x, y in zip(low, high, strict=True))
    return _oklab_to_srgb(lightness, a, b)


def ansi_token(text: str, probability: float, *, colour: bool = True) -> str:
    """Return a token for a terminal: on a 24-bit background, or as `text[0.93]` without colour.

    Line breaks stay outside the colour, which would otherwise run to the terminal's edge, and
    other control characters are shown as pictures, so that text cannot steer the terminal.
    """
    lines = printable(text).split("\n")
    if not colour:
        # The number stands before trailing line breaks, so that it stays on its token's line.
        text = "\n".join(lines)
        body = text.rstrip("\n")
        return f"{body}[{probability:.2f}]{text[len(body) :]}"
    back = ";".join(map(str, rgb(probability)))
    front = ";".join(map(str, TEXT_COLOUR["light"]))
    start, end = f"\x1b[48;2;{back}m\x1b[38;2;{front}m", "\x1b[0m"
    return "\n".join(f"{start}{line}{end}" if line else "" for line in lines)


def ansi_legend(*, colour: bool = True) -> str:
    """Return one line that explains the colours, or the bracketed numbers without colour."""
    if not colour:
        return "token[p]: p is the probability of Mode 2"
    cells = "".join(ansi_token(" ", step / 20) for step in range(21))
    return f"Mode 1 {cells} Mode 2"


def wants_colour(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Tell whether to colour: on a terminal, unless NO_COLOR (no-color.org) is set to something."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def print_tokens(tokens: Iterable[tuple[str, float]], *, legend: bool = False) -> None:
    """Print tokens with their probabilities, coloured if the terminal wants it."""
    colour = wants_colour(sys.stdout, os.environ)
    if legend:
        print(ansi_legend(colour=colour))
    print("".join(ansi_token(text, probability, colour=colour) for text, probability in tokens))


def printable(text: str) -> str:
    """Replace control characters other than newline and tab by visible ones."""
    return text.translate(_PICTURES)


def _oklab_to_srgb(lightness: float, a: float, b: float) -> Rgb:
    """Convert with the matrices of Ottosson (2020), "A perceptual color space"."""
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    red = 4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short
    green = -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short
    blue = -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short
    return _gamma(red), _gamma(green), _gamma(blue)


def _gamma(linear: float) -> int:
    linear = min(max(linear, 0.0), 1.0)
    curved = 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055
    return round(255 * curved)
