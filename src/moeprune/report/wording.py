"""Numbers and lists as a reader wants to see them; whatever is unknown becomes an en dash."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NOTHING = "–"
THIN = "\N{NARROW NO-BREAK SPACE}"

_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None; JSON readers let NaN and Infinity pass."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def significant(value: Any, digits: int = 3) -> str:
    """``digits`` significant digits without exponents between 0.0001 and a million."""
    if isinstance(value, float) and math.isinf(value):
        return "∞" if value > 0 else "−∞"
    known = number(value)
    if known is None:
        return NOTHING
    if known == 0:
        return "0"
    # of the rounded number, because rounding may carry: 9.999 is 10.0, not 10.00
    size = math.floor(math.log10(abs(float(f"{known:.{digits - 1}e}"))))
    if not -5 < size < 6:
        return f"{known:.{digits - 1}e}".replace("-", "−")
    return f"{known:,.{max(0, digits - 1 - size)}f}".replace("-", "−").replace(",", THIN)


def _scaled(value: Any, units: Sequence[tuple[float, str]], unit: str) -> str:
    known = number(value)
    if known is None:
        return NOTHING
    for size, name in units:
        # 999.95 k would be written as 1000 k
        if abs(known) >= 0.9995 * size:
            return f"{significant(known / size)}{THIN}{name}"
    return f"{known:.0f}{THIN}{unit}".rstrip(THIN)


def count(value: Any) -> str:
    """A count of parameters: ``12.7 M``."""
    return _scaled(value, _COUNTS, "")


def size(value: Any) -> str:
    """A count of bytes in decimal units, as shops and disks count them: ``25.4 MB``."""
    return _scaled(value, _SIZES, "B")


def whole(value: Any) -> str:
    """An integer in groups of three digits."""
    known = number(value)
    return NOTHING if known is None else f"{known:,.0f}".replace(",", THIN)


def percent(share: Any, decimals: int = 1) -> str:
    """A share of one as per cent: ``3.1 %``."""
    known = number(share)
    return NOTHING if known is None else f"{100 * known:.{decimals}f}{THIN}%"


def times(ratio: Any) -> str:
    """A factor: ``×1.14``; three digits from ten on."""
    known = number(ratio)
    if known is None:
        return NOTHING
    return f"×{known:.2f}" if known < 9.995 else f"×{significant(known)}"


def seconds(value: Any) -> str:
    """A duration: ``3.3 s``, ``2 min 05 s`` or ``1 h 02 min``."""
    known = number(value)
    if known is None:
        return NOTHING
    if known < 99.95:
        return f"{known:.1f}{THIN}s"
    whole_s = round(known)
    if whole_s < 3600:
        return f"{whole_s // 60}{THIN}min {whole_s % 60:02d}{THIN}s"
    return f"{whole_s // 3600}{THIN}h {whole_s % 3600 // 60:02d}{THIN}min"


def ids(values: Iterable[int]) -> str:
    """Expert ids with runs of three and more folded: ``0–3, 7, 9``."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    parts: list[str] = []
    for run in runs:
        parts += [f"{run[0]}–{run[-1]}"] if len(run) > 2 else [str(value) for value in run]
    return ", ".join(parts) or NOTHING


def listed(words: Sequence[str]) -> str:
    """An enumeration in words: ``a, b and c``."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def plural(amount: int, noun: str) -> str:
    """``1 layer``, ``6 layers``."""
    return f"{whole(amount)} {noun}{'' if amount == 1 else 's'}"


def settings(values: Mapping[str, Any] | None) -> str:
    """Options or a budget on one line: ``ratio=0.5, roles=gate up``."""
    parts = []
    for name, value in (values or {}).items():
        shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        parts.append(f"{name}={'none' if value is None else shown}")
    return ", ".join(parts) or NOTHING
