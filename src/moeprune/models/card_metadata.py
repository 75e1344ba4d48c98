"""The metadata block of a model card, with what it takes over from the original's card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from moeprune.models.checkpoint import Checkpoint

CARD = "README.md"
_MOST = 1 << 20
_BLOCK = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")
_TAKEN = ("license", "license_name", "license_link", "language", "pipeline_tag", "base_model")
_LONGEST = 200


def inherited(directory: Path) -> dict[str, Any]:
    """What the card of a checkpoint says that is also true of what is made from it.

    License, languages, task and base model. It is somebody's file: what is not text, or lists of
    text, is left out, and nothing in it is a reason to fail.
    """
    said = _block(directory / CARD)
    found = {key: said[key] for key in _TAKEN if _is_text(said.get(key))}
    if "license" not in found:
        files = sorted(f.name for f in directory.glob("LICEN[CS]E*") if f.is_file())
        if files:
            return found | {
                "license": "other",
                "license_name": "license-of-the-original",
                "license_link": files[0],
            }
    return found


def license_of(directory: Path) -> dict[str, str] | None:
    """Under which licence a checkpoint is, and which file says so; None if none does."""
    said = inherited(directory)
    if "license" not in said:
        return None
    file = said.get("license_link") if said["license"] == "other" else None
    return {"license": str(said.get("license_name", said["license"])), "file": str(file or CARD)}


def hub_id(checkpoint: Checkpoint) -> str | None:
    """The hub id that a checkpoint came from, if it lies in the hub's cache.

    ``_name_or_path`` in config.json is no help: it names what a model was trained from.
    """
    folder = checkpoint.path
    kind, _, name = folder.parents[1].name.partition("--") if len(folder.parts) > 2 else ("",) * 3
    if folder.parent.name != "snapshots" or kind != "models" or "--" not in name:
        return None
    found = name.replace("--", "/", 1)
    try:
        validate_repo_id(found)
    except HFValidationError:
        return None
    return found


def metadata(
    said: Mapping[str, Any],
    base: str | None,
    tags: list[str],
    trained: bool,
) -> ModelCardData:
    """The block: what the original's card said, the original, and what was done to it.

    Args:
        said: see ``inherited``.
        base: the original's hub id. Without one, ``base_model`` is left out: the name of a
            directory would point to somebody else's model.
        tags: of the method.
        trained: whether weights were trained afterwards; only then is it one of the relations that
            the hub knows (a fine-tuned model); pruning alone is none of them.
    """
    values: dict[str, Any] = {key: said[key] for key in _TAKEN if key in said}
    if base is not None:
        values["base_model"] = base
    if trained and "base_model" in values:
        values["base_model_relation"] = "finetune"
    values.setdefault("pipeline_tag", "text-generation")
    return ModelCardData(library_name="transformers", tags=tags, **values)


def arxiv_tags(source: str) -> list[str]:
    """The hub's tags of the papers that a source names."""
    return [f"arxiv:{number}" for number in _ARXIV.findall(source)]


def _block(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as handle:
            text = handle.read(_MOST).decode("utf-8", errors="replace")
        match = _BLOCK.match(text)
        found = yaml.safe_load(match[1]) if match else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_text(value: object) -> bool:
    if isinstance(value, list):
        return 0 < len(value) <= _LONGEST and all(map(_is_line, value))
    return _is_line(value)


def _is_line(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST and value.isprintable()
