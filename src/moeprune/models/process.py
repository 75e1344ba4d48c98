"""How much memory this process has."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_IO = Path("/proc/self/io")


def reset_peak_memory() -> None:
    """Start a new measurement, where the system allows it (Linux)."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def peak_memory() -> int | None:
    """Largest resident size in bytes since the last reset; None where it cannot be known.

    Pages of mapped checkpoint files count while they are resident.
    """
    kib = _field(_STATUS, "VmHWM:")
    return None if kib is None else kib * 1024


def resident_memory() -> int | None:
    """Resident size in bytes now; None where it cannot be known."""
    kib = _field(_STATUS, "VmRSS:")
    return None if kib is None else kib * 1024


def bytes_read() -> int | None:
    """Bytes that this process made the disk read so far; None where it cannot be known.

    What the system had in its cache does not count.
    """
    return _field(_IO, "read_bytes:")


def _field(file: Path, name: str) -> int | None:
    try:
        text = file.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return None
