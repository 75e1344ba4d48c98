"""What the scripts of this folder have in common on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Of a script whose docstring is its help, line by line."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def of_model(doc: str | None) -> argparse.ArgumentParser:
    """Of a script that measures a checkpoint several times."""
    made = parser(doc)
    made.add_argument("model", type=Path)
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--json", action="store_true")
    return made
