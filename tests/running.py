"""What running a command takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune.models.data import demo_text, read_documents


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: Any
    out: str
    err: str


Run = Callable[..., Done]


def page(folder: Path, domain: str, characters: int = 24_000) -> Path:
    """The beginning of one domain of the embedded text: tokenising all of it takes seconds."""
    text = ""
    for document in read_documents(demo_text("calibration")[domain]):
        text += document
        if len(text) >= characters:
            break
    path = folder / f"{domain}.txt"
    path.write_text(text[:characters], encoding="utf-8")
    return path
