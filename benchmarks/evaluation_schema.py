"""Writes docs/evaluation.schema.json: what ``moeprune evaluate --json`` prints.

python benchmarks/evaluation_schema.py

A new optional key changes the file and not the version. A key that goes, that means something else
or may hold something else needs the next version in moeprune.evaluation.schema.
"""

from __future__ import annotations

from pathlib import Path

import arguments

from moeprune.evaluation.schema import json_schema
from moeprune.files import json_bytes

FILE = Path(__file__).parent.parent / "docs" / "evaluation.schema.json"

if __name__ == "__main__":
    arguments.parser(__doc__).parse_args()
    FILE.write_bytes(json_bytes(json_schema()))
