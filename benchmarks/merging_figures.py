"""What merging costs on the embedded model: KL against the original, beside plain dropping.

Prints the table of docs/methods.md. Calibration as in the demo (ream walks 40 sequences of text
itself); 20 held-out windows of 256 tokens, spread over all domains.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from moeprune import load
from moeprune.core.budget import Budget
from moeprune.core.method import make_method
from moeprune.models.checkpoint import DEMO, Checkpoint
from moeprune.pipeline import stages
from moeprune.pipeline.inputs import Compute, Text, read_heldout

CELLS = [
    *(f"{name}@{ratio}" for ratio in (0.25, 0.5) for name in
      ("frequency", "m-smoe", "hc-smoe", "ream", "dern")),
    "m-smoe@0.5:router=original",
    "hc-smoe@0.5:router=original",
    "m-smoe@0.5:router=mean",
    "hc-smoe@0.5:align=weights",
    "ream@0.5:propagate=dense",
    "ream@0.5:grouping=nearest",
    "dern@0.5:router=add",
    "dern@0.5:threshold=0.3",
    "dern@0.5:threshold=1",
]  # fmt: skip
COMPUTE = Compute(dtype="float32")


def log_probabilities(model: Path, ids_NL: Tensor) -> Tensor:
    network = load(model, dtype=torch.float32).eval()
    with torch.no_grad():
        found = [network(i, use_cache=False).logits.log_softmax(-1) for i in ids_NL.split(4)]
    return torch.cat(found)


def main(cells: list[str]) -> None:
    demo = Checkpoint.open(DEMO)
    windows = read_heldout(demo, Text(sequences=32, length=256))
    ids_NL = torch.cat([torch.as_tensor(window.ids_NL) for window in windows])[::16][:20]
    teacher = log_probabilities(demo.path, ids_NL)
    print("| method | bytes | KL | agreement |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        stages.calibrate(
            DEMO, work / "statistics", Text(sequences=120, length=512), compute=COMPUTE
        )
        for cell in cells:
            name, _, rest = cell.partition("@")
            ratio, _, given = rest.partition(":")
            options = dict(item.split("=") for item in given.split(",") if item)
            walks = make_method(name, options).sequential
            plan = stages.plan(
                DEMO,
                name,
                Budget(ratio=float(ratio)),
                None if walks else work / "statistics",
                text=Text(sequences=40, length=512) if walks else None,
                options=options,
                compute=COMPUTE,
            )
            sizes = stages.apply(DEMO, plan, work / "smaller", force=True)
            student = log_probabilities(work / "smaller", ids_NL)
            kl = float((teacher.exp() * (teacher - student)).sum()) / ids_NL.numel()
            same = float((student.argmax(-1) == teacher.argmax(-1)).float().mean())
            label = f"`{name}`, {float(ratio):.0%}" + (f", `{given}`" if given else "")
            print(f"| {label} | {sizes.bytes[1] / sizes.bytes[0]:.0%} | {kl:.4f} | {same:.1%} |")


if __name__ == "__main__":
    main(sys.argv[1:] or CELLS)
