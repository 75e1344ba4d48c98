"""What large models take on large machines, computed from constants that were measured here.

    python benchmarks/scale.py measure MODEL [--work DIR]        # constants -> scale_constants.json
    python benchmarks/scale.py validate MODEL [MODEL...]          # measured against predicted
    python benchmarks/scale.py page                               # docs/scale.md from that file

MODEL of ``measure`` has layers of true size (``real_size.py OLMoE-1B-7B out --layers 2``).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import arguments
import scale_model as sim

CONSTANTS = Path(__file__).with_name("scale_constants.json")
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
MODELS = ("Mixtral-8x22B", "DeepSeek-V3", "Kimi-K2")
ASSUMED = {
    "workstation": {
        "nodes": 1, "devices": 1, "cores": 16, "read": 7.0e9, "write": 5.0e9, "shared": None,
        "flops": 165e12, "link": 25e9, "memory": 128 * 2**30, "device_memory": 24e9,
        "what": "16 cores, 128 GiB, one NVMe disk (PCIe 4), one GPU of 24 GB: 165 TFLOP/s bf16, "
        "PCIe 4 x16",
    },
    "8-GPU node": {
        "nodes": 1, "devices": 8, "cores": 96, "read": 25e9, "write": 15e9, "shared": None,
        "flops": 989e12, "link": 50e9, "memory": 2048 * 2**30, "device_memory": 80e9,
        "what": "96 cores, 2 TiB, eight NVMe disks, eight GPUs of 80 GB: 989 TFLOP/s bf16 each, "
        "PCIe 5 x16 each",
    },
    "64-node cluster": {
        "nodes": 64, "devices": 8, "cores": 96, "read": 10e9, "write": 10e9, "shared": 200e9,
        "flops": 989e12, "link": 50e9, "memory": 2048 * 2**30, "device_memory": 80e9,
        "what": "64 of those nodes; shared storage of 200 GB/s in all, 10 GB/s per node",
    },
}  # fmt: skip
"""From data sheets, not measured; decimal bytes per second."""


def machines(found: dict[str, Any]) -> dict[str, sim.Machine]:
    """The assumed machines: sheets for what they are, measured constants for how it is used.

    Of the GPUs' sheet value the walk is taken to attain the part that it attains here of this CPU's
    products. Work of the CPU (conversion, fp8, NMI, checksums) has this machine's speed per core;
    every device has a process, and each of them converts all layers with one core.
    """
    made = {}
    for name, sheet in ASSUMED.items():
        made[name] = sim.Machine(
            name=name, nodes=sheet["nodes"], read=sheet["read"], shared=sheet["shared"],
            write=sheet["write"], devices=sheet["devices"], device_memory=sheet["device_memory"],
            flops=sheet["flops"] * found["attained"], link=sheet["link"], load=found["load"],
            decode=found["decode"], digest=found["sha256"], cores=sheet["cores"],
            nmi=found["nmi_one_core"], memory=sheet["memory"], start=found["start"],
        )  # fmt: skip
    return made


def time_of(seconds: float) -> str:
    """In the unit that one reads."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size_of(count: float) -> str:
    """Decimal bytes."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.{1 if unit == 'TB' else 0}f} {unit}"
    return f"{count:.0f} B" if count else "–"


def flops_of(count: float) -> str:
    """Products and sums."""
    return f"{count / 1e15:.1f} P" if count >= 1e14 else "–"


def table(shapes: sim.Shapes, machine: sim.Machine, work: sim.Work) -> list[str]:
    """One model on one machine."""
    lines = [
        "| stage | read | written | FLOP | time | bound by | memory per node | per device |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for stage in sim.STAGES:
        cost = stage(shapes, machine, work)
        sizes = (size_of(count) for count in (cost.read, cost.written))
        memory = _room(cost.memory, machine.memory)
        device = _room(cost.on_device, machine.device_memory) if cost.on_device else "–"
        time = time_of(cost.seconds)
        row = (cost.stage, *sizes, flops_of(cost.flops), time, cost.bound, memory, device)
        lines.append(_line(row))
    return lines


def _room(needed: float, there: float | None) -> str:
    """Bytes, and whether there are so many."""
    size = f"{needed / 2**30:.1f} GiB"
    return size if there is None or needed <= there else f"{size} (more than there is)"


def constants_table(found: dict[str, Any]) -> list[str]:
    """Measured here beside assumed; what has no data sheet is taken as measured."""
    shown = {
        "read": ("disk, reading", 1e9, "GB/s"),
        "write": ("disk, writing and fsync", 1e9, "GB/s"),
        "flops": ("bf16 products, a device; here all cores", 1e12, "TFLOP/s"),
        "link": ("to the device", 1e9, "GB/s"),
        "shared": ("storage shared by all nodes", 1e9, "GB/s"),
        "devices": ("devices per node", 1, ""),
        "device_memory": ("memory of a device", 2**30, "GiB"),
        "cores": ("cores per node", 1, ""),
        "memory": ("memory per node", 2**30, "GiB"),
        "attained": ("part of these products that the observed walk attains", 1, ""),
        "load": ("conversion of a layer, one core", 1e9, "GB/s"),
        "decode": ("fp8 decoded, one core", 1e9, "G parameters/s"),
        "nmi_one_core": ("NMI, entries of a pair, one core", 1e9, "G/s"),
        "sha256": ("SHA-256, one core", 1e9, "GB/s"),
        "start": ("start of a command", 1, "s"),
        "busy": ("load average before it was measured: other work", 1, ""),
    }
    heads = ("", "measured here", *(f"{name}, assumed" for name in ASSUMED))
    lines = [_line(heads), "|---" * len(heads) + "|"]
    for key, (words, factor, unit) in shown.items():
        cells = [
            "–" if value is None else f"{value / factor:.4g} {unit}".strip()
            for value in (found.get(key), *(sheet.get(key) for sheet in ASSUMED.values()))
        ]
        if key in found and not any(key in sheet for sheet in ASSUMED.values()) and key != "busy":
            cells[1:] = ["as measured"] * len(ASSUMED)
        lines.append(_line((words, *cells)))
    return lines


def _line(cells: Iterable[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def validation_table(rows: list[dict[str, Any]], start: float) -> list[str]:
    """Measured against predicted, with the constant ``start``."""
    heads = ("model", "stage", "measured", "predicted", "predicted / measured", "bound by")
    lines = [_line(heads), "|---" * len(heads) + "|"]
    for row in rows:
        name = f"{row['model']}, {row['layers']} layers"
        ratio = row["predicted"] / row["measured"]
        seconds = (f"{row[key]:.1f} s" for key in ("measured", "predicted"))
        bound = sim.longest(row["parts"], start)
        lines.append(_line((name, row["stage"], *seconds, f"{ratio:.2f}", bound)))
    return lines


def page(data: dict[str, Any]) -> str:
    """docs/scale.md."""
    found, work = data["constants"], sim.Work()
    shapes = {name: sim.shapes_of(name) for name in MODELS}
    text = (Path(__file__).with_name("scale.head.md")).read_text().rstrip().splitlines()
    at = {
        "CONSTANTS": constants_table(found),
        "VALIDATION": validation_table(data.get("validation", []), found["start"]),
        "SHAPES": [
            "| model | parameters | active | layers | experts | checkpoint | largest layer, bf16 "
            "| statistics |",
            "|---|---|---|---|---|---|---|---|",
            *(
                f"| {name} | {s.total / 1e9:.1f} B | {s.active / 1e9:.1f} B | {s.layers} | "
                f"{s.top_k} of {s.experts} | {size_of(s.bytes)} | {size_of(s.largest * 2)} | "
                f"{size_of(s.statistics)} |"
                for name, s in shapes.items()
            ),
        ],
    }
    lines: list[str] = []
    for line in text:
        lines += at.get(line, [line])
    for machine in machines(found).values():
        lines += ["", f"## {machine.name[0].upper()}{machine.name[1:]}", ""]
        lines += [f"{ASSUMED[machine.name]['what']}. All assumed."]
        for name, its in shapes.items():
            lines += ["", f"**{name}**", "", *table(its, machine, work)]
    return "\n".join(lines) + "\n"


def load() -> dict[str, Any]:
    """What was measured so far."""
    data: dict[str, Any] = json.loads(CONSTANTS.read_text()) if CONSTANTS.is_file() else {}
    return data


def save(data: dict[str, Any]) -> None:
    CONSTANTS.write_text(json.dumps(data, indent=1) + "\n")


def main() -> None:
    parser = arguments.parser(__doc__)
    parser.add_argument("what", choices=("measure", "validate", "page"))
    parser.add_argument("models", nargs="*")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    if args.what == "page":
        PAGE.write_text(page(load()))
        return
    if not args.models:
        parser.error("give MODEL")
    import scale_measure as measuring  # noqa: PLC0415  # the page needs none of it

    data = load()
    if args.what == "measure":
        data["constants"] = measuring.constants(Path(args.models[0]), args.work)
        save(data)
        print("\n".join(constants_table(data["constants"])))
        return
    rows = []
    for model in args.models:
        path = model if model == "demo" else Path(model)
        rows += measuring.validate(path, data["constants"], args.work)
    data["validation"] = rows
    save(data)
    print("\n".join(validation_table(rows, data["constants"]["start"])))


if __name__ == "__main__":
    main()
