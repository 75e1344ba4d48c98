"""The report's colours: a palette for text and a ramp for heat maps, each for light and dark.

The ramp runs through OKLCH (Björn Ottosson, "A perceptual color space for image processing"),
where equal steps of lightness look equal, so that a shade can be read as a magnitude; the hue
turns a little on the way, which makes neighbouring shades easier to tell apart.
"""

from __future__ import annotations

import math
from typing import NamedTuple

STEPS = 16
"""Number of shades of a ramp."""

SIDES = 4
"""Shades on either side of the middle of the diverging ramp."""

LIGHT = {
    "page": "#fcfcfb",
    "panel": "#f3f4f4",
    "text": "#1b1f24",
    "muted": "#565d66",
    "line": "#d9dcdf",
    "accent": "#1d5b8c",
    "alert": "#8a3b00",
    "alert-page": "#fdf1e3",
}
"""Colours of a page on white, by their name in the style sheet."""

DARK = {
    "page": "#14171a",
    "panel": "#1d2125",
    "text": "#e6e8ea",
    "muted": "#a0a8b0",
    "line": "#353b41",
    "accent": "#84bdee",
    "alert": "#f4b06a",
    "alert-page": "#33240f",
}
"""The same names on black."""


class _End(NamedTuple):
    lightness: float
    chroma: float
    hue: float


# low values lie close to the page, high values stand out from it, in both modes
_LIGHT_RAMP = (_End(0.955, 0.022, 190.0), _End(0.33, 0.115, 268.0))
_DARK_RAMP = (_End(0.265, 0.035, 265.0), _End(0.93, 0.085, 165.0))


def ramp(dark: bool = False) -> tuple[str, ...]:
    """``STEPS`` colours from low to high, evenly spaced in perceived lightness."""
    low, high = _DARK_RAMP if dark else _LIGHT_RAMP
    colours = []
    for step in range(STEPS):
        t = step / (STEPS - 1)
        # the arch keeps the middle of the ramp from greying out
        arch = 0.035 * math.sin(math.pi * t)
        colours.append(
            _oklch(
                low.lightness + t * (high.lightness - low.lightness),
                low.chroma + t * (high.chroma - low.chroma) + arch,
                low.hue + t * (high.hue - low.hue),
            )
        )
    return tuple(colours)


def diverging(dark: bool = False) -> tuple[str, ...]:
    """``2 SIDES + 1`` colours from blue (less) over grey (as much) to orange (more).

    Blue and orange are told apart with every common kind of colour blindness, and lightness falls
    on both sides alike, so that grey paper shows at least how far from the middle a value is.
    """
    middle, end = (0.30, 0.82) if dark else (0.955, 0.48)
    colours = []
    for step in range(-SIDES, SIDES + 1):
        t = abs(step) / SIDES
        lightness = middle + t * (end - middle)
        colours.append(_oklch(lightness, 0.012 + 0.12 * t, 250.0 if step < 0 else 55.0))
    return tuple(colours)


def shade(value: float | None, low: float, high: float) -> int | None:
    """The step of the ramp for a value between ``low`` and ``high``; None for an unknown value."""
    if value is None or not math.isfinite(value):
        return None
    if not low < high:
        return STEPS // 2
    t = min(1.0, max(0.0, (value - low) / (high - low)))
    return min(STEPS - 1, int(t * STEPS))


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb`` (WCAG 2.2)."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2)."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def ink(colour: str) -> str:
    """Black or white, whichever is easier to see on the colour."""
    return max(("#000000", "#ffffff"), key=lambda candidate: contrast(candidate, colour))


def variables(dark: bool = False) -> dict[str, str]:
    """The style sheet's custom properties, by name without the leading dashes."""
    found = dict(DARK if dark else LIGHT)
    for step, colour in enumerate(ramp(dark)):
        found[f"c{step}"] = colour
        found[f"i{step}"] = ink(colour)
    for step, colour in enumerate(diverging(dark)):
        found[f"v{step}"] = colour
        found[f"j{step}"] = ink(colour)
    return found


def _oklch(lightness: float, chroma: float, hue: float) -> str:
    """``#rrggbb`` of an OKLCH colour, with the chroma lowered until sRGB can show it."""
    while True:
        linear = _linear_rgb(lightness, chroma, hue)
        if chroma <= 0 or all(-1e-4 <= c <= 1.0001 for c in linear):
            break
        chroma -= 0.004
    encoded = []
    for value in linear:
        c = min(1.0, max(0.0, value))
        encoded.append(12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055)
    return "#" + "".join(f"{round(255 * c):02x}" for c in encoded)


def _linear_rgb(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
    a = chroma * math.cos(math.radians(hue))
    b = chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
