"""Peak memory of a stage."""

from __future__ import annotations

from moeprune.models.process import peak_memory, reset_peak_memory

__all__ = ["peak_memory", "reset_peak_memory"]
