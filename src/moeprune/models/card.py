"""The model card: README.md of every checkpoint that is written, in the form of the hub.

It says what the record (moeprune.json) and the plan beside it say, and is made from them alone, so
the same checkpoint has the same card. The part between the marks is what ``moeprune evaluate
--card`` replaces; all else may be edited by hand.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from moeprune.core.method import methods
from moeprune.errors import MoepruneError
from moeprune.models.card_metadata import (
    CARD,
    arxiv_tags,
    hub_id,
    inherited,
    license_of,
    metadata,
)
from moeprune.models.card_text import BEGIN, body, trainings
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.native import GENERATED_MODULE

BASE_CARD = "README.base.md"


def write_card(
    work: Path, base: Checkpoint, record: Mapping[str, Any], plan: Mapping[str, Any]
) -> None:
    """Write README.md beside a checkpoint that is being written.

    A card that is not ours is kept beside it under another name, README.base.md.

    Args:
        work: the directory.
        base: what the checkpoint is made from.
        record: its moeprune.json.
        plan: its moeprune_plan.json.
    """
    before = base.path / CARD
    said, ours = inherited(base.path), _is_ours(before)
    if not ours:
        said.pop("base_model", None)  # what the original was made from is not what this was
        if before.is_file():
            shutil.copyfile(before, work / _free_name(work))
    base_card = next((f.name for f in sorted(work.glob("README.base*.md"))), None)
    known = _method(str(record.get("method")))
    recovered = bool(trainings(record))
    tags = ["moe", "mixture-of-experts", "moeprune", "pruned", str(record.get("method"))]
    tags += ["recovered"] * recovered + arxiv_tags(known["source"])
    code = _own_code(work)
    head = metadata(said, hub_id(base), tags + ["custom_code"] * code, recovered)
    text = body(record, plan, known, head.to_dict(), code, base_card, license_of(base.path))
    (work / CARD).write_text(str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n{text}")), "utf-8")


def _is_ours(file: Path) -> bool:
    try:
        return BEGIN in file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _free_name(work: Path) -> str:
    name, number = BASE_CARD, 2
    while (work / name).exists():
        name, number = f"README.base.{number}.md", number + 1
    return name


def _method(name: str) -> dict[str, str]:
    """Summary and source of a method; empty for one that is not installed here."""
    try:
        found = methods().get(name)
    except MoepruneError:
        found = None
    if found is None:
        return {"summary": "", "source": ""}
    return {"summary": found.summary, "source": found.source}


def _own_code(work: Path) -> bool:
    """Whether it opens with code that travels with it."""
    return (work / f"{GENERATED_MODULE}.py").is_file()
