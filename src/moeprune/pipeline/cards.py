"""Writes what was measured into a checkpoint's model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from moeprune.errors import OutputError
from moeprune.files import write_together
from moeprune.models.card_metadata import CARD
from moeprune.models.card_text import BEGIN, END
from moeprune.pipeline.inputs import Source
from moeprune.report.card import measured_text

_HINT = "write the checkpoint again with moeprune apply or prune: that writes a card"


def find_card(source: Source) -> Path:
    """The card of a checkpoint of ours, into which measurements can be written.

    Raises:
        OutputError: there is none, or the marks around its measured part are gone.
    """
    file = Path(source) / CARD
    if not file.is_file():
        raise OutputError(f"there is no card: {file}", _HINT)
    text = file.read_text(encoding="utf-8", errors="replace")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise OutputError(
            f"{file} has no measured part between {BEGIN} and {END}",
            "put these two lines where it is to stand",
        )
    return file


def write_measured(source: Source, result: Mapping[str, Any]) -> Path:
    """Replace the measured part of a card; all else in it stays as it is, byte for byte.

    The file appears whole or stays as it was; the same evaluation gives the same bytes.

    Args:
        source: the checkpoint's directory.
        result: ``moeprune.evaluation/1``, or the parts of it that are known.

    Raises:
        OutputError: see ``find_card``; or it cannot be written, or is no card any more.
    """
    file = find_card(source)
    text = file.read_bytes().decode("utf-8", errors="surrogateescape")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    made = f"{before}{BEGIN}\n{measured_text(result)}\n{END}{after}"
    try:
        ModelCard(made.encode("utf-8", errors="replace").decode())
    except Exception as error:  # whatever a block that was edited by hand makes of YAML
        raise OutputError(f"the metadata block of {file} is not valid YAML", "mend it") from error
    mode = file.stat().st_mode
    write_together({file: made.encode("utf-8", errors="surrogateescape")}, force=True)
    file.chmod(mode)
    return file
