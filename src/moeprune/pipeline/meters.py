"""What the machine tells of itself: processor, threads, memory in use, energy."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from moeprune.evaluation.speed import Meter
from moeprune.pipeline.measure import peak_memory, reset_peak_memory

POWERCAP = Path("/sys/class/powercap")
_CPU = Path("/proc/cpuinfo")


def machine(device: torch.device) -> dict[str, Any]:
    """Device, its name, cores, threads and system."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": str(device),
        "name": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }


def _processor() -> str:
    with suppress(OSError):
        for line in _CPU.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


class Rapl:
    """The energy counters of processors (Intel and AMD), where the system lets us read them.

    Args:
        root: the directory of the power capping interface of Linux.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones: dict[Path, int] = {}
        for zone in sorted(root.glob("intel-rapl:*")):
            if zone.name.count(":") != 1:
                continue  # a part of a package, counted there
            with suppress(OSError, ValueError):
                name = (zone / "name").read_text().strip()
                if name.startswith("package"):
                    int((zone / "energy_uj").read_text())
                    self._zones[zone] = int((zone / "max_energy_range_uj").read_text())

    @property
    def known(self) -> bool:
        """Whether the machine tells its energy."""
        return bool(self._zones)

    def read(self) -> dict[Path, int]:
        """Microjoules by package since an unknown beginning."""
        found = {}
        with suppress(OSError, ValueError):
            for zone in self._zones:
                found[zone] = int((zone / "energy_uj").read_text())
            return found
        return {}

    def joules(self, before: Mapping[Path, int]) -> float | None:
        """Energy since ``before``; counters begin again at their range. None if it is unknown."""
        now = self.read()
        if not now or set(now) != set(before):
            return None
        used = [(now[zone] - before[zone]) % (self._zones[zone] + 1) for zone in now]
        return sum(used) / 1e6


def meter(device: torch.device, rapl: Rapl) -> Meter:
    """Of memory, on the device, and of energy."""
    before: dict[str, Any] = {}
    resident: Callable[[], int | None] = peak_memory
    if device.type == "cuda":

        def resident() -> int | None:
            return int(torch.cuda.max_memory_allocated(device))

    def begin() -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _give_back()
            reset_peak_memory()
        before["memory"], before["energy"] = resident(), rapl.read()

    def end() -> tuple[int | None, float | None]:
        joules, peak = rapl.joules(before["energy"]), resident()
        known = peak is not None and before["memory"] is not None
        return (peak - before["memory"] if known else None), joules

    return Meter(begin, end)


def _give_back() -> None:
    """Have the C library return what was freed, so that it does not hide what is needed next."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
