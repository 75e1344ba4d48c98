"""recover(), from disk to disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moeprune import load, recover, training, verify
from moeprune.errors import MoepruneError
from moeprune.models.checkpoint import Checkpoint
from moeprune.pipeline.inputs import Text
from moeprune.recovery.training import GROUPS
from support import tensor_digests, tree

QUICK: dict[str, Any] = {
    "steps": 4, "batch": 4, "learning_rate": 3e-3, "evaluate_every": 2, "save_every": 1,
    "patience": 0, "holdout": 0.1,
}  # fmt: skip


PAPER = {"ce_weight": 1.0, "kl_weight": 0.0}
"""The loss of arXiv 2410.12013: next-token cross-entropy beside the experts' differences."""


def quick(how: str, **options: Any) -> Any:
    return training(how, None, {**QUICK, **options})


def log(out: Path) -> list[dict[str, Any]]:
    lines = (out / "moeprune_recovery.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["step"]]


def zeros(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(directory)
    return {key: checkpoint.read(key) == 0 for key in checkpoint.tensors if ".experts." in key}


@pytest.mark.parametrize("target", ["local", "stream"])
def test_expert_kd_begins_with_equal_terms_and_keeps_zeros(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path, target: str
) -> None:
    out = tmp_path / "healed"
    made = recover(
        students["masked"], teacher, out, quick("expert-kd", target=target, **PAPER), text
    )
    first = log(out)[0]
    assert first["lambda"] * first["experts"] == pytest.approx(first["ce"], rel=1e-6)
    assert all(entry["lambda"] == first["lambda"] for entry in log(out))
    before, after = zeros(students["masked"]), zeros(out)
    assert all(bool(after[key][zero].all()) for key, zero in before.items())
    assert made.zeros == sum(int(zero.sum()) for zero in before.values()) > 0
    now, then = tensor_digests(out), tensor_digests(students["masked"])
    changed = {key for key in now if now[key] != then[key]}
    assert now.keys() == then.keys()
    assert changed == {key for key in now if ".experts." in key}
    assert made.changed["experts"] == (len(changed), len(changed))
    assert made.changed["frozen"][0] == 0
    assert set(made.gradients) == {"experts"}


def test_lambda_anew_at_every_step(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path
) -> None:
    recover(
        students["masked"], teacher, tmp_path / "x", quick("expert-kd", rescale=True, **PAPER), text
    )
    entries = log(tmp_path / "x")
    for entry in entries:
        assert entry["lambda"] * entry["experts"] == pytest.approx(entry["ce"], rel=1e-6)
    assert len({entry["lambda"] for entry in entries}) == len(entries)


@pytest.mark.parametrize("kind", ["masked", "dropped", "uneven", "novices", "merged"])
def test_what_is_recovered_opens_as_before_and_passes_verify(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "healed"
    groups = ("experts", "routers", "novices") if kind == "novices" else ("experts", "routers")
    made = recover(students[kind], teacher, out, quick("logit-kd", train=groups), text)
    assert set(made.gradients) == set(groups)
    assert all(made.changed[group][0] for group in groups)
    assert type(load(out)).__name__ == type(load(students[kind])).__name__
    assert not verify(out).findings
    files = {path.name for path in students[kind].iterdir() if path.suffix != ".safetensors"}
    ours = {path.name for path in out.iterdir() if path.suffix != ".safetensors"}
    assert ours - files == {"moeprune_recovery.jsonl"}
    assert files - ours <= {"model.safetensors.index.json"}
    assert (out / "config.json").read_bytes() == (students[kind] / "config.json").read_bytes()
    [told] = json.loads((out / "moeprune.json").read_text())["recovered"]
    assert told["how"] == "logit-kd"
    assert told["teacher_fingerprint"] == Checkpoint.open(teacher).fingerprint
    assert told["held"][1] <= told["held"][0]
    assert not (tmp_path / "healed.recovery").exists()


def test_router_kd_moves_routers_alone(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path
) -> None:
    out = tmp_path / "healed"
    made = recover(students["dropped"], teacher, out, quick("router-kd", batch=16), text)
    now, then = tensor_digests(out), tensor_digests(students["dropped"])
    changed = {key for key in now if now[key] != then[key]}
    assert changed == {key for key in now if key.endswith("mlp.gate.weight")}
    assert made.held is not None and made.held[1] < made.held[0]
    assert [entry["loss"] for entry in log(out)] == [entry["kl"] for entry in log(out)]


def test_steps_follow_each_other(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    recover(students["masked"], teacher, first, quick("expert-kd"), text)
    recover(first, teacher, second, quick("full", train=GROUPS), text)
    record = json.loads((second / "moeprune.json").read_text())
    assert [step["how"] for step in record["recovered"]] == ["expert-kd", "full"]
    before, after = zeros(students["masked"]), zeros(second)
    assert all(bool(after[key][zero].all()) for key, zero in before.items())


def test_a_run_that_gains_nothing_changes_nothing(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path
) -> None:
    chosen = quick("full", learning_rate=3.0, patience=1, steps=8, evaluate_every=1)
    made = recover(students["dropped"], teacher, tmp_path / "x", chosen, text)
    assert (made.best_step, made.steps) == (0, 1)
    assert "no improvement" in made.ended
    assert tensor_digests(tmp_path / "x") == tensor_digests(students["dropped"])


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"gradient_checkpointing": True}])
def test_the_same_loss_in_less_memory(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path, options: Any
) -> None:
    recover(students["dropped"], teacher, tmp_path / "a", quick("logit-kd"), text)
    recover(students["dropped"], teacher, tmp_path / "b", quick("logit-kd", **options), text)
    losses = [[entry["loss"] for entry in log(tmp_path / name)] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)


def test_checkpointing_and_expert_kd(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path
) -> None:
    recover(students["masked"], teacher, tmp_path / "a", quick("expert-kd"), text)
    chosen = quick("expert-kd", gradient_checkpointing=True)
    recover(students["masked"], teacher, tmp_path / "b", chosen, text)
    assert tensor_digests(tmp_path / "a") == tensor_digests(tmp_path / "b")


@pytest.mark.parametrize("how", ["expert-kd", "router-kd", "logit-kd"])
def test_bfloat16(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path, how: str
) -> None:
    recover(students["masked"], teacher, tmp_path / "x", quick(how, dtype="bfloat16"), text)
    assert not verify(tmp_path / "x").findings


RUN = """
import os, signal, sys
from pathlib import Path
from moeprune import training, recover
from moeprune.pipeline.inputs import Text
import torch
torch.set_num_threads(1)
student, teacher, out, text, when, resume = sys.argv[1:]
def listen(status):
    if status.step == int(when):
        os.kill(os.getpid(), signal.SIGKILL)
chosen = training("expert-kd", None, {options})
text = Text((text,), 40, 32)
recover(student, teacher, out, chosen, text, resume=bool(int(resume)), listen=listen)
"""


def start(*args: object, options: Any) -> int:
    code = RUN.replace("{options}", repr(options))
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], env=dict(os.environ), check=False,
        stderr=subprocess.DEVNULL,
    ).returncode  # fmt: skip


def test_killed_and_resumed_is_as_if_it_had_not_been(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path
) -> None:
    options = {**QUICK, "steps": 6, "save_every": 2, "train": ("experts", "routers"), "warmup": 0.5}
    chosen, [page] = training("expert-kd", None, options), text.sources
    recover(students["masked"], teacher, tmp_path / "whole", chosen, text)
    cut = tmp_path / "cut"
    common = (students["masked"], teacher, cut, page)
    assert start(*common, 3, 0, options=options) == -signal.SIGKILL
    assert not cut.exists()
    with pytest.raises(MoepruneError, match="cut after step 2"):
        recover(students["masked"], teacher, cut, chosen, text)
    with pytest.raises(MoepruneError, match="another steps"):
        other = training("expert-kd", None, {**options, "steps": 7})
        recover(students["masked"], teacher, cut, other, text, resume=True)
    assert start(*common, 5, 1, options=options) == -signal.SIGKILL
    recover(students["masked"], teacher, cut, chosen, text, resume=True)
    assert tensor_digests(cut) == tensor_digests(tmp_path / "whole")
    assert log(cut) == log(tmp_path / "whole")


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path
) -> None:
    out = tmp_path / "x"
    chosen = quick("full", learning_rate=9.0, clip=0.0, steps=50, evaluate_every=50, weight_decay=9)
    before = tree(students["dropped"])
    with pytest.raises(MoepruneError, match="not finite at step"):
        recover(students["dropped"], teacher, out, chosen, text)
    assert not out.exists()
    state = json.loads((tmp_path / "x.recovery" / "state" / "manifest.json").read_text())
    assert state["progress"]["step"] > 0
    saved = load_file(tmp_path / "x.recovery" / "state" / "values.safetensors")
    assert all(bool(value.isfinite().all()) for value in saved.values())
    assert tree(students["dropped"]) == before
