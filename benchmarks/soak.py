"""Plans, applies, verifies and loads over and over in one process, and looks what stays behind.

python benchmarks/soak.py --cycles 100 --json soak.json

Every cycle draws a family (the tiny models of the tests) and a plan: of a method that reads weights
only, with a random budget and seed, or of one of the kinds of edits, with random numbers. A family
that cannot be edited in that way is refused with an error for the user; that is counted apart.
After each cycle no file may be left beside the models, and the memory of the process is measured,
after garbage was collected and free memory was given back. Before the first cycle every family is
opened and every kind tried once: what is imported and compiled stays in memory for good.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import arguments
import torch

import moeprune
from moeprune.core.budget import Budget
from moeprune.core.edits import MaskEdit
from moeprune.core.plan import LayerPlan, Plan
from moeprune.core.shapes import LayerShape
from moeprune.errors import MoepruneError
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.editing import Writing
from moeprune.models.loading import LayeredModel
from moeprune.models.store import write_plan
from moeprune.pipeline import stages

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from edit_kinds import KINDS
from families import moe_model_types, save_tiny
from support import plan_for, some_experts, without

METHODS = ("magnitude", "moeits", "random")
DRAWN = ("dropped", "uneven", "replaced", "masked")
_TOKENS = 16


@dataclass
class Soak:
    """What came of the cycles.

    Attributes:
        cycles: how many there were.
        refused: reasons for the user, by number.
        failed: what went wrong, with the cycle.
        left: files that stayed behind, with the cycle.
        rss: bytes of memory after each cycle.
        done: plans that were carried out, by kind.
        families: that were drawn.
    """

    cycles: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    families: set[str] = field(default_factory=set)

    def growth(self, warm: int = 20) -> float | None:
        """The largest memory from cycle ``warm`` on, over that of cycle ``warm``, less one."""
        return max(self.rss[warm - 1 :]) / self.rss[warm - 1] - 1 if len(self.rss) > warm else None


def memory() -> int:
    """Bytes of this process in memory, without what could be given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def drawn_layer(kind: str, draw: random.Random) -> Callable[[LayerShape], LayerPlan]:
    """A kind of edit with random numbers."""
    same, ratio, seed = draw.random(), draw.uniform(0.1, 0.9), draw.randrange(1000)

    def make(shape: LayerShape) -> LayerPlan:
        size = shape.experts // shape.groups
        least = -(-shape.top_k // shape.groups)
        part = draw.random() if kind == "uneven" else same
        number = min(size, max(1, least, round(part * size)))
        keep = some_experts(shape, number, seed)
        if kind == "masked":
            keep, mask = tuple(range(shape.experts)), MaskEdit(ratio, None, shape.roles)
            return LayerPlan(shape.layer, shape.experts, keep, mask=mask)
        if kind != "replaced":
            return LayerPlan(shape.layer, shape.experts, keep)
        gone = without(shape, keep)
        vectors = torch.full((len(gone), shape.hidden), ratio / 10)
        return LayerPlan(shape.layer, shape.experts, keep, gone, novices_NH=vectors)

    return make


def drawn_plan(kind: str, source: Path, draw: random.Random) -> Plan:
    """A plan of a method, or of a kind of edit."""
    if kind in METHODS:
        budget = Budget(ratio=round(draw.uniform(0.1, 0.7), 2))
        compute = stages.Compute(workers=1)
        return stages.plan(source, kind, budget, compute=compute, seed=draw.randrange(1000))
    checkpoint = Checkpoint.open(source)
    make = drawn_layer(kind, draw) if kind in DRAWN else KINDS[kind]
    shapes = [site.shape for site in LayeredModel(checkpoint).sites.values()]
    return plan_for(checkpoint, [make(shape) for shape in shapes])


def cycle(source: Path, kind: str, place: Path, draw: random.Random) -> None:
    """One plan, carried out, verified and loaded.

    Raises:
        MoepruneError: it cannot be done with this family.
        AssertionError: the result is not in order.
    """
    plan = replace(drawn_plan(kind, source, draw), seed=draw.randrange(1000))
    write_plan(plan, place / "plan.json")
    pad = kind == "uneven" and draw.random() < 0.5
    stages.apply(source, place / "plan.json", place / "out", writing=Writing(pad=pad))
    result = moeprune.verify(place / "out")
    assert result.passed(), [f"{f.rule}: {f.file}: {f.problem}" for f in result.of("error")]
    model = moeprune.load(place / "out", dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.arange(_TOKENS)[None], use_cache=False).logits
    assert logits.shape[:2] == (1, _TOKENS) and bool(torch.isfinite(logits).all())


def soak(
    cycles: int,
    seed: int = 0,
    families: tuple[str, ...] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> Soak:
    """Run the cycles."""
    draw, found = random.Random(seed), Soak()
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="moeprune-soak-") as name:
        root = Path(name)
        (root / "tmp").mkdir()
        tempfile.tempdir = str(root / "tmp")
        try:
            sources = {
                family: save_tiny(family, root / family) for family in families or moe_model_types()
            }
            kinds = (*METHODS, *DRAWN, *KINDS)
            _warm_up(sources, kinds, root)
            tell(f"{len(sources)} families, {memory() >> 20} MiB")
            for number in range(cycles):
                family, kind = draw.choice(sorted(sources)), draw.choice(kinds)
                _turn(found, f"{number + 1}: {kind} of {family}", sources[family], kind, root, draw)
                found.families.add(family)
                tell(f"{number + 1}: {kind} of {family}, {found.rss[-1] >> 20} MiB")
        finally:
            tempfile.tempdir = before
    return found


def _warm_up(sources: dict[str, Path], kinds: tuple[str, ...], root: Path) -> None:
    """Import the classes of every family, and compile what every kind needs (numba: 62 MiB)."""
    for source in sources.values():
        moeprune.load(source, dtype=torch.float32)
    first = sources.get("mixtral", next(iter(sources.values())))
    for kind in kinds:
        _turn(Soak(), f"warming up: {kind}", first, kind, root, random.Random(0))


def _turn(found: Soak, name: str, source: Path, kind: str, root: Path, draw: random.Random) -> None:
    place = root / "place"
    place.mkdir()
    found.cycles += 1
    try:
        cycle(source, kind, place, draw)
        found.done[kind] += 1
    except MoepruneError as error:
        found.refused[f"{kind}: {error.problem.replace(str(root), '')}"] += 1
    except Exception as error:
        found.failed.append(f"{name}: {type(error).__name__}: {error}")
        traceback.print_exc()
    allowed = ("out", "plan.json", "plan.safetensors", "plan.weights")
    left = [path for path in place.iterdir() if path.name not in allowed]
    shutil.rmtree(place)
    found.rss.append(memory())
    left += list((root / "tmp").iterdir())
    found.left += [f"{name}: {path.name}" for path in left]


def record(found: Soak) -> dict[str, Any]:
    """The result as JSON."""
    growth = found.growth()
    return {
        "cycles": found.cycles,
        "families": len(found.families),
        "carried_out": dict(sorted(found.done.items())),
        "refused": dict(sorted(found.refused.items())),
        "failed": found.failed,
        "left_behind": found.left,
        "rss_mib": [value >> 20 for value in found.rss],
        "growth_from_cycle_20": None if growth is None else round(growth, 4),
    }


def main() -> None:
    parser = arguments.parser(__doc__)
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = soak(given.cycles, given.seed, tell=lambda text: print(text, file=sys.stderr))
    result = record(found)
    print(
        json.dumps(
            {**result, "rss_mib": result["rss_mib"][:: max(1, found.cycles // 10)]}, indent=1
        )
    )
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    growth = found.growth() or 0.0
    sys.exit(bool(found.failed or found.left or growth > 0.05))


if __name__ == "__main__":
    main()
