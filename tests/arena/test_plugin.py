"""A method in a file of its own, announced by an entry point, runs in a comparison."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TOY = '''
from dataclasses import dataclass
from typing import ClassVar

from moeprune.core.accumulators import Routing
from moeprune.core.budget import lowest, removable
from moeprune.core.method import Method
from moeprune.core.plan import LayerPlan


@dataclass(frozen=True)
class Toy(Method):
    """Drops the experts that are chosen first least often."""

    name: ClassVar[str] = "toy"
    summary: ClassVar[str] = "drop the experts that are chosen first least often"
    source: ClassVar[str] = "nowhere"
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "keep")
    needs: ClassVar[tuple[str, ...]] = ("routing",)
    most: bool = False

    def plan_layer(self, view, context):
        first = view.need().part(Routing).top1_E.double() * (-1 if self.most else 1)
        counts = view.need().part(Routing).count_E.tolist()
        gone = lowest(first.tolist(), counts, removable(context.budget, view.shape), view.shape)
        kept = tuple(e for e in range(view.shape.experts) if e not in gone)
        return LayerPlan(view.shape.layer, view.shape.experts, kept)
'''


def test_a_method_of_somebody_else(tmp_path: Path, english_text: Path) -> None:
    (tmp_path / "toy_method.py").write_text(TOY)
    info = tmp_path / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moeprune.methods]\ntoy = toy_method:Toy\n")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [
            sys.executable, "-m", "moeprune", "compare", "demo", "--methods", "toy,toy:most=true",
            "--ratios", "0.5", "--data", f"english={english_text}", "--sequences", "4",
            "--length", "64", "--heldout", f"english={english_text}", "--windows", "2",
            "--window", "32", "--workers", "1", "--out", str(tmp_path / "run"), "--json",
        ],
        env={**os.environ, "PYTHONPATH": path}, check=False, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["cells"].values()}
    assert [row["status"] for row in rows.values()] == ["done", "done"]
    assert [row["kind"] for row in rows.values()] == ["dropping", "dropping"]
    assert rows["toy"]["kl"] < rows["toy:most=true"]["kl"]
    assert (tmp_path / "run/pareto.svg").is_file()
