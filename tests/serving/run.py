"""Serves pruned checkpoints with vLLM and compares its tokens with those of transformers.

python tests/serving/run.py CHECKPOINTS VLLM_PYTHON PAGE

CHECKPOINTS is the directory that ``prepare.py`` wrote; each checkpoint is loaded unchanged.
Writes PAGE, the tables of what was measured, and exits with 1 if a model does not load, agrees less
than ``compared.LEAST``, or differs where the reference was not undecided.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import over_http
import page
from compared import LEAST, Compared

WITHOUT_PLUGIN = {"VLLM_PLUGINS": "none"}
"""vLLM loads the plugins that are named here, and no other."""

KINDS = ("novices", "uneven", "maps", "answers")
STOCK = ("pruned", "masked", "sparse", "merged", "narrow", "shallow", "padded")
WAYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "compiled": ({"eager": False}, ("demo/novices", "mixtral/maps", "olmoe/uneven")),
    "two tensor parallel ranks": ({"ranks": 2}, ("olmoe/maps", "mixtral/answers", "olmoe/uneven")),
}
"""Ways to serve that differ from the other comparisons', and what is served so."""

LARGE = ("original", "novices", "uneven")

START, EACH = 600, 120
"""Seconds after which a process with vLLM is stopped: for its start, and for each checkpoint."""


def facts_of(checkpoint: Path) -> dict[str, Any]:
    """What ``prepare.py`` wrote beside a checkpoint."""
    found: dict[str, Any] = json.loads(checkpoint.with_suffix(".json").read_text())
    return found


def serve(
    python: Path,
    wanted: Iterable[tuple[Path, str]],
    trust: bool = False,
    environment: Mapping[str, str] = {},
    way: Mapping[str, Any] = {},
) -> list[dict[str, Any]]:
    """What vLLM makes of checkpoints (path, dtype), in one process, one after the other.

    Results that are there already stay: after a failure only the rest is done again.
    """
    jobs = []
    for checkpoint, dtype in wanted:
        facts = facts_of(checkpoint)[dtype]
        plain = f"{checkpoint.name}-{dtype}{'-trusted' * trust}{'-plain' * bool(environment)}"
        other = "".join(f"-{key}-{value}" for key, value in way.items())
        result = checkpoint.parent / f"{plain}{other}.result"
        jobs.append(
            {
                "checkpoint": str(checkpoint),
                "result": str(result),
                "prompts": [one["prompt"] for one in facts],
                "tokens": len(facts[0]["tokens"]),
                "candidates": len(facts[0]["top"][0]),
                "dtype": dtype,
                "trust": trust,
                **way,
            }
        )
    folder = Path(jobs[0]["checkpoint"]).parent.parent
    while missing := [job for job in jobs if not Path(job["result"]).is_file()]:
        (folder / f"jobs-{os.getpid()}.json").write_text(json.dumps(missing))
        work(python, folder, {**os.environ, **environment}, START + EACH * len(missing))
        left = [Path(job["result"]) for job in missing if not Path(job["result"]).is_file()]
        if left:  # the process ended with this one: go on with those behind it
            lost = {"error": f"vLLM ended or hung: see {folder / 'serve.log'}"}
            left[0].write_text(json.dumps(lost))
    return [json.loads(Path(job["result"]).read_text()) for job in jobs]


def work(python: Path, folder: Path, environment: Mapping[str, str], seconds: float) -> None:
    """Let ``serve.py`` do the list of jobs; it is stopped after ``seconds``."""
    script = Path(__file__).with_name("serve.py")
    with (folder / "serve.log").open("a") as output, suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [python, script, folder / f"jobs-{os.getpid()}.json"],
            stdout=output,
            stderr=output,
            check=False,
            env=environment,
            timeout=seconds,
        )


def compare(checkpoint: Path, dtype: str, served: Mapping[str, Any]) -> Compared | str:
    """A served checkpoint against its reference; the error where vLLM does not load it."""
    if "error" in served:
        return shortened(served["error"])
    page.VERSIONS.update(served["versions"])
    total = Compared()
    for expected, found in zip(facts_of(checkpoint)[dtype], served["continuations"], strict=True):
        total.add(expected, found)
    return total


def shortened(error: str) -> str:
    """The line of an error that says something."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    text = next((line for line in lines if "Value error," in line), lines[0])
    return text.partition(" Supported")[0].partition(" [type=")[0][:200]


def wanted_of(directory: Path) -> list[tuple[Path, str]]:
    """All checkpoints that are served with the plugin, and in what they compute."""
    folders = [path for path in directory.iterdir() if path.is_dir() and path.name != "large"]
    return [
        (folder / name, dtype)
        for folder in sorted(folders, key=lambda path: (path.name == "demo", path.name))
        for name in (*STOCK, *KINDS)
        if (folder / name).is_dir()
        for dtype in LEAST
        if dtype in facts_of(folder / name)
    ]


def tables(directory: Path, python: Path) -> tuple[list[list[str]], list[list[str]], list[str]]:
    """Both tables' rows, and what is wrong."""
    rows, own_rows, faults = [], [], []
    wanted = wanted_of(directory)
    for (checkpoint, dtype), served in zip(wanted, serve(python, wanted), strict=True):
        found, where = (
            compare(checkpoint, dtype, served),
            f"{checkpoint.parent.name}/{checkpoint.name}",
        )
        if isinstance(found, str):
            faults.append(f"{where}, {dtype}: vLLM does not load it: {found}")
            continue
        facts = facts_of(checkpoint)
        faults += [f"{where}, {dtype}: {one}" for one in found.faults(dtype)]
        if served["expert_parameters"] != facts["expert_parameters"][1]:
            faults.append(
                f"{where}: the served experts hold {served['expert_parameters']} numbers, the "
                f"files {facts['expert_parameters'][1]}"
            )
        if checkpoint.name in STOCK:
            rows.append(page.stock_cells(where, facts, dtype, found))
        else:
            own_rows.append(page.own_cells(where, facts, dtype, found, served))
        print(where, dtype, f"{found.same} of {found.decisions}", flush=True)
    return rows, own_rows, faults


def ways(directory: Path, python: Path) -> tuple[list[list[str]], list[str]]:
    """Rows of checkpoints that are served in ``WAYS``, and what is wrong."""
    rows, faults = [], []
    for said, (way, names) in WAYS.items():
        wanted = [(directory / name, "float32") for name in names]
        for name, served in zip(names, serve(python, wanted, way=way), strict=True):
            found = compare(directory / name, "float32", served)
            if isinstance(found, str):
                faults.append(f"{name}, {said}: vLLM does not load it: {found}")
                continue
            faults += [f"{name}, {said}: {one}" for one in found.faults("float32")]
            rows.append([said, *page.way_cells(name, found)])
            print(name, said, f"{found.same} of {found.decisions}", flush=True)
    return rows, faults


def memory(folder: Path, python: Path) -> tuple[list[list[str]], list[str]]:
    """Rows of what a process holds after loading each of the large models, and what is wrong."""
    rows, faults, before = [], [], 0
    for name in LARGE:
        (served,) = serve(python, [(folder / name, "bfloat16")])
        if "error" in served:
            faults.append(f"large/{name}: {shortened(served['error'])}")
            continue
        plan = 2 * facts_of(folder / name)["expert_parameters"][0] >> 20
        holds = 2 * served["expert_parameters"] >> 20
        before = before or served["mebibytes"]
        saved = f"{before - served['mebibytes']:,} MiB" if name != "original" else "–"
        rows.append(
            [name, f"{plan:,} MiB", f"{holds:,} MiB", f"{served['mebibytes']:,} MiB", saved]
        )
        if holds != plan:
            faults.append(f"large/{name}: {holds} MiB of experts are served, {plan} are stored")
        print(f"large/{name}: {served['mebibytes']} MiB", flush=True)
    return rows, faults


def over_the_wire(demo: Path, python: Path) -> tuple[list[list[str]], str, list[str]]:
    """Rows for ``vllm serve``, one transcript, and what is wrong."""
    rows, faults, transcript = [], [], ""
    for kind in ("novices", "uneven"):
        facts = facts_of(demo / kind)["float32"]
        expected = [one["tokens"] for one in facts]
        prompts = [one["prompt"] for one in facts]
        found, told = over_http.ask(python, demo / kind, "float32", prompts, len(expected[0]))
        same = sum(a == b for a, b in zip(expected, found, strict=True))
        rows.append([kind, "float32", f"{same} of {len(expected)}"])
        transcript = transcript or told
        if same != len(expected):
            faults.append(f"demo/{kind} over HTTP: {same} of {len(expected)} continuations agree")
        print(f"{kind} over HTTP: {same} of {len(expected)}", flush=True)
    return rows, transcript, faults


def refusals(demo: Path, python: Path) -> tuple[dict[str, str], list[str]]:
    """What happens without the plugin, by checkpoint, and what is wrong with that."""
    told, faults = {}, []
    for trust in (False, True):
        names = ("novices", "uneven") if trust else ("novices", "uneven", "tied")
        wanted = [(demo / name, "float32") for name in names]
        for name, served in zip(names, serve(python, wanted, trust, WITHOUT_PLUGIN), strict=True):
            found = compare(demo / name, "float32", served)
            if isinstance(found, str):
                told[f"{name}, trust_remote_code={trust}"] = f"refused: `{found}`"
                continue
            right = found.agreement >= LEAST["float32"]
            said = "served rightly" if right else "**served wrongly, without an error**"
            told[f"{name}, trust_remote_code={trust}"] = (
                f"{said}: {found.agreement:.1%} of the decisions agree"
            )
            if not right and name != "tied":
                faults.append(f"{name} without the plugin is served wrongly, without an error")
    return told, faults


def main(directory: Path, python: Path, out: Path) -> int:
    begin = time.perf_counter()
    rows, own_rows, faults = tables(directory, python)
    told, wrong = refusals(directory / "demo", python)
    faults += wrong
    http, transcript, wrong = over_the_wire(directory / "demo", python)
    faults += wrong
    way_rows, wrong = ways(directory, python)
    faults += wrong
    held, wrong = memory(directory / "large", python)
    faults += wrong
    text = page.page(
        rows,
        own_rows,
        way_rows,
        http,
        transcript,
        told,
        held,
        directory,
        time.perf_counter() - begin,
    )
    out.write_text(text, encoding="utf-8") if not faults else None
    for fault in faults:
        print(f"FAILED: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
