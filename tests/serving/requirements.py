"""Prints what a wheel needs, from the metadata inside it, except the packages named.

Usage: requirements.py WHEEL EXCEPT [EXCEPT ...]. The torch family is left out: the wheel asks for
builds that are served elsewhere, and the exact version that runs is installed beforehand.
"""

from __future__ import annotations

import re
import sys
import zipfile


def requirements(wheel: str, leave_out: set[str]) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().split("\n\n", 1)[0].splitlines()
    needed = [line.split(":", 1)[1].strip() for line in lines if line.startswith("Requires-Dist:")]
    return [
        line
        for line in needed
        if "extra ==" not in line and re.match(r"[\w.-]+", line)[0].lower() not in leave_out
    ]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1], {name.lower() for name in sys.argv[2:]})))
