"""Draws the BLiMP sample of the package: the same number of pairs from every paradigm.

python benchmarks/blimp_sample.py blimp.jsonl

FILE is BLiMP as JSONL (sentence_good, sentence_bad, linguistics_term, UID), all of it or a part.
"""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import arguments

OUT = Path(__file__).parent.parent / "src/moeprune/assets/blimp/sample.jsonl.gz"
PER_PARADIGM = 10
COLUMNS = ("sentence_good", "sentence_bad", "linguistics_term", "UID")


def main(file: Path) -> None:
    by_paradigm: dict[str, list[dict[str, str]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_paradigm.setdefault(row["UID"], []).append({name: row[name] for name in COLUMNS})
    lines = []
    for name in sorted(by_paradigm):
        rows = by_paradigm[name]
        drawn = random.Random(f"0:{name}").sample(range(len(rows)), PER_PARADIGM)
        lines += [json.dumps(rows[i], ensure_ascii=False) for i in sorted(drawn)]
    OUT.write_bytes(gzip.compress("\n".join([*lines, ""]).encode(), 9, mtime=0))
    print(f"{len(lines)} pairs of {len(by_paradigm)} paradigms, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    parser = arguments.parser(__doc__)
    parser.add_argument("file", type=Path)
    main(parser.parse_args().file)
