"""Rewrites the table of rules at the end of docs/verify.md.

python benchmarks/verify_rules.py
"""

from __future__ import annotations

from pathlib import Path

import arguments

from moeprune.verification.run import rules_table

PAGE = Path(__file__).parent.parent / "docs" / "verify.md"


def main() -> None:
    arguments.parser(__doc__).parse_args()
    text, _, _ = PAGE.read_text(encoding="utf-8").partition("| rule |")
    PAGE.write_text(text + rules_table(), encoding="utf-8")


if __name__ == "__main__":
    main()
