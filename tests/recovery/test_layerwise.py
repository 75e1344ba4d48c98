"""recover() layer by layer: what it changes, keeps, resumes and shares among processes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from families import save_tiny
from moeprune import load, recover, training, verify
from moeprune.cli.app import app
from moeprune.errors import MoepruneError, OutputError
from moeprune.models.checkpoint import Checkpoint
from moeprune.pipeline.inputs import Text
from moeprune.recovery.layerwise import state
from recovering import prune, with_tokenizer
from support import tensor_digests, tree

QUICK: dict[str, Any] = {
    "layerwise": True, "steps": 8, "batch": 8, "learning_rate": 3e-3, "holdout": 0.2,
}  # fmt: skip


def quick(how: str = "expert-kd", **options: Any) -> Any:
    return training(how, None, {**QUICK, **options})


def log(out: Path) -> list[dict[str, Any]]:
    lines = (out / "moeprune_recovery.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def changed(before: Path, after: Path) -> set[str]:
    then, now = tensor_digests(before), tensor_digests(after)
    assert then.keys() == now.keys()
    return {key for key in now if now[key] != then[key]}


@pytest.mark.parametrize("target", ["student-inputs", "dense-inputs", "dense-outputs"])
def test_errors_fall_and_zeros_stay(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path, target: str
) -> None:
    out = tmp_path / "healed"
    made = recover(students["masked"], teacher, out, quick(target=target), text)
    assert len(made.layers) == 2
    assert all(layer["after"] < layer["before"] for layer in made.layers)
    assert made.held is not None and made.held[1] < made.held[0]
    before, after = Checkpoint.open(students["masked"]), Checkpoint.open(out)
    kept = 0
    for key in changed(students["masked"], out):
        zero = before.read(key) == 0
        assert ".experts." in key or key.endswith("mlp.gate.weight")
        assert bool((after.read(key)[zero] == 0).all())
        kept += int(zero.sum()) if ".experts." in key else 0
    assert made.zeros == kept > 0
    assert {entry["layer"] for entry in log(out)} == {0, 1}
    told = [entry for entry in log(out) if entry.get("done")]
    assert [entry["after"] for entry in told] == [layer["after"] for layer in made.layers]
    assert not (tmp_path / "healed.recovery").exists()


@pytest.mark.parametrize("kind", ["dropped", "uneven", "novices", "merged"])
def test_every_kind_of_student_opens_as_before(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "healed"
    made = recover(students[kind], teacher, out, quick(), text)
    groups = {"experts", "routers"} | ({"novices"} if kind == "novices" else set())
    assert set(made.gradients) == groups
    assert all(made.changed[group][0] for group in groups)
    assert made.changed["frozen"][0] == 0 if "frozen" in made.changed else True
    assert type(load(out)).__name__ == type(load(students[kind])).__name__
    assert not verify(out).findings
    [told] = json.loads((out / "moeprune.json").read_text())["recovered"]
    assert told["options"]["layerwise"] and len(told["layers"]) == 2


QUICKLY = ["gpt_oss"]
SLOWLY = ["deepseek_v4", "deepseek_v3", "llama4_text", "zaya", "granitemoe", "dbrx", "jamba"]
SLOWLY += ["longcat_flash"]


@pytest.mark.parametrize(
    "family", [*QUICKLY, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOWLY)]
)
def test_families(text: Text, tmp_path: Path, family: str) -> None:
    """Fused and transposed matrices, biases, shared experts, groups, more than one input."""
    big = with_tokenizer(save_tiny(family, tmp_path / "big", vocab_size=6144))
    student = prune(big, "masked", tmp_path / "student")
    before = tree(student)
    made = recover(student, big, tmp_path / "healed", quick(learning_rate=1e-3), text)
    assert made.held is not None and made.held[1] < made.held[0]
    assert not [f for f in verify(tmp_path / "healed").findings if f.severity == "error"]
    assert tree(student) == before


def test_a_block_that_is_the_layer_itself_is_refused(text: Text, tmp_path: Path) -> None:
    big = with_tokenizer(
        save_tiny("gemma4_text", tmp_path / "big", vocab_size=6144, vocab_size_per_layer_input=6144)
    )
    student = prune(big, "masked", tmp_path / "student")
    with pytest.raises(MoepruneError, match="without a block of its own"):
        recover(student, big, tmp_path / "healed", quick(), text)
    assert not (tmp_path / "healed.recovery").exists()


@pytest.mark.parametrize("options", [{}, {"objective": "router"}])
def test_router_kd_moves_routers_alone(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path, options: Any
) -> None:
    out = tmp_path / "healed"
    made = recover(students["dropped"], teacher, out, quick("router-kd", **options), text)
    moved = changed(students["dropped"], out)
    assert moved and all(key.endswith("mlp.gate.weight") for key in moved)
    assert made.held is not None and made.held[1] < made.held[0]


def test_on_the_same_inputs_a_sliced_router_has_nothing_to_learn(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path
) -> None:
    chosen = quick("router-kd", objective="router", target="student-inputs")
    made = recover(students["dropped"], teacher, tmp_path / "x", chosen, text)
    assert {layer["ended"] for layer in made.layers} == {"nothing was lost"}
    assert tensor_digests(tmp_path / "x") == tensor_digests(students["dropped"])


def test_a_layer_that_does_not_gain_keeps_its_weights(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path
) -> None:
    chosen = quick(learning_rate=9.0, patience=1)
    made = recover(students["dropped"], teacher, tmp_path / "x", chosen, text)
    assert {layer["best_step"] for layer in made.layers} == {0}
    assert made.ended == "0 of 2 layers are better"
    assert tensor_digests(tmp_path / "x") == tensor_digests(students["dropped"])


RUN = """
import os, signal, sys
from moeprune import training, recover
from moeprune.pipeline.inputs import Text
import torch
torch.set_num_threads(1)
student, teacher, out, text = sys.argv[1:]
def listen(status):
    if status.step == 10:
        os.kill(os.getpid(), signal.SIGKILL)
recover(student, teacher, out, training("expert-kd", None, {options}), Text((text,), 40, 32),
        listen=listen)
"""


@pytest.mark.parametrize(
    "target", ["student-inputs", pytest.param("dense-outputs", marks=pytest.mark.slow)]
)
def test_killed_and_resumed_at_the_layer_where_it_was_cut(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path, target: str
) -> None:
    chosen, [page] = quick(target=target), text.sources
    recover(students["masked"], teacher, tmp_path / "whole", chosen, text)
    cut = tmp_path / "cut"
    code = RUN.replace("{options}", repr({**QUICK, "target": target}))
    run = [sys.executable, "-c", code, *map(str, (students["masked"], teacher, cut, page))]
    done = subprocess.run(run, env=dict(os.environ), check=False)
    assert done.returncode == -signal.SIGKILL
    assert not cut.exists()
    assert (tmp_path / "cut.recovery" / "layer-00000" / "manifest.json").is_file()
    assert (tmp_path / "cut.recovery" / "log.jsonl").is_file()
    with pytest.raises(MoepruneError, match="cut after 1 layer:"):
        recover(students["masked"], teacher, cut, chosen, text)
    with pytest.raises(MoepruneError, match="another steps"):
        recover(students["masked"], teacher, cut, quick(target=target, steps=9), text, resume=True)
    for more, problem in ({}, "was cut after"), ({"resume": True}, "another layerwise"):
        with pytest.raises(MoepruneError, match=problem):
            recover(students["masked"], teacher, cut, "expert-kd", text, **more)
    with pytest.raises(MoepruneError, match="another student"):
        recover(students["dropped"], teacher, cut, chosen, text, resume=True)
    steps: list[int] = []
    made = recover(
        students["masked"], teacher, cut, chosen, text, resume=True,
        listen=lambda status: steps.append(status.step),
    )  # fmt: skip
    assert min(steps) > QUICK["steps"], "the first layer was not trained again"
    assert len(made.layers) == 2
    assert tensor_digests(cut) == tensor_digests(tmp_path / "whole")
    assert log(cut) == log(tmp_path / "whole")


def test_processes_share_layers_and_give_the_same_bytes(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path
) -> None:
    chosen = quick(target="dense-inputs")
    recover(students["masked"], teacher, tmp_path / "one", chosen, text)
    steps: list[int] = []
    recover(
        students["masked"], teacher, tmp_path / "two", chosen, text, processes=2,
        listen=lambda status: steps.append(status.step),
    )  # fmt: skip
    assert tensor_digests(tmp_path / "one") == tensor_digests(tmp_path / "two")
    assert log(tmp_path / "one") == log(tmp_path / "two")
    assert max(steps) == 16


@pytest.mark.slow
def test_an_error_in_a_process_is_the_commands(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path
) -> None:
    chosen = quick(target="dense-inputs", train=("experts",), learning_rate=9.0, weight_decay=9.0)
    with pytest.raises(MoepruneError, match="not finite in layer"):
        recover(students["dropped"], teacher, tmp_path / "x", chosen, text, processes=2)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("target", ["student-inputs", "dense-outputs"])
def test_bfloat16(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path, target: str
) -> None:
    chosen = quick(dtype="bfloat16", target=target)
    made = recover(students["masked"], teacher, tmp_path / "x", chosen, text)
    assert made.held is not None and made.held[1] < made.held[0]


def test_without_held_out_text_the_last_weights_are_written(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path
) -> None:
    made = recover(students["dropped"], teacher, tmp_path / "x", quick(holdout=0.0), text)
    assert made.held is None
    assert {layer["best_step"] for layer in made.layers} == {QUICK["steps"]}
    assert changed(students["dropped"], tmp_path / "x")


def test_layers_of_nobody_knows_which_run_are_not_taken(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path
) -> None:
    """A state that was lost, and a layer that was cut while it was deleted."""
    student, chosen, out = students["masked"], quick(steps=2), tmp_path / "cut"
    recover(student, teacher, tmp_path / "whole", chosen, text)

    def cut(status: Any) -> None:
        if status.step == 3:
            raise KeyboardInterrupt

    def run(**more: Any) -> None:
        recover(student, teacher, out, quick(steps=2, **more), text, force=True, listen=cut)

    kept = tmp_path / "cut.recovery"
    with pytest.raises(KeyboardInterrupt):
        run(seed=5)
    shutil.rmtree(kept / "state")
    recover(student, teacher, out, chosen, text, resume=True)
    assert tensor_digests(out) == tensor_digests(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run()
    for file in (kept / "layer-00000").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(MoepruneError, match="layer-00000 is damaged"):
        recover(student, teacher, out, chosen, text, resume=True, force=True)
    assert tensor_digests(out) == tensor_digests(tmp_path / "whole")


def test_a_full_disk_costs_a_layer_and_no_more(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    student, chosen, left = students["masked"], quick(steps=2), [1]
    real = state.write_shards

    def write(work: Path, pieces: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            return real(work, pieces)
        (work / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    recover(student, teacher, tmp_path / "whole", chosen, text)
    with monkeypatch.context() as patch:
        patch.setattr(state, "write_shards", write)
        with pytest.raises(OutputError, match=r"disk full.*the state of 1 layer is kept"):
            recover(student, teacher, tmp_path / "cut", chosen, text)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "cut.recovery"}
    recover(student, teacher, tmp_path / "cut", chosen, text, resume=True)
    assert tensor_digests(tmp_path / "cut") == tensor_digests(tmp_path / "whole")


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("expert-kd", {"target": "dense-inputs"}, "layer by layer"),
    ("expert-kd", {"objective": "router"}, "layer by layer"),
    ("expert-kd", {"layerwise": True, "target": "stream"}, "the whole model at once"),
    ("expert-kd", {"layerwise": True, "kl_weight": 2.0}, "--kl-weight is for"),
    ("expert-kd", {"layerwise": True, "objective": "router"}, "cannot train experts"),
    ("expert-kd", {"layerwise": True, "train": ("rest",)}, "cannot train rest"),
    ("lora", {"layerwise": True}, "no form layer by layer"),
]


@pytest.mark.parametrize("how, options, problem", WRONG)
def test_options_of_the_other_form(how: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(MoepruneError, match=problem) as caught:
        training(how, None, options)
    assert caught.value.hint


def test_what_cannot_be_shared_or_taught(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path
) -> None:
    student, out = students["dropped"], tmp_path / "out"
    with pytest.raises(MoepruneError, match="needs those before it"):
        recover(student, teacher, out, quick(), text, processes=2)
    with pytest.raises(MoepruneError, match="--processes is for"):
        recover(student, teacher, out, "expert-kd", text, processes=2)
    with pytest.raises(MoepruneError, match="at least 1"):
        recover(student, teacher, out, quick(target="dense-inputs"), text, processes=0)
    with pytest.raises(MoepruneError, match="learns from a teacher"):
        recover(student, None, out, quick(), text)
    with pytest.raises(MoepruneError, match="no novices"):
        recover(student, teacher, out, quick(train=("novices",)), text)
    assert list(tmp_path.iterdir()) == []


def test_the_command(students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path) -> None:
    out = tmp_path / "healed"
    arguments = ["recover", students["masked"], "--teacher", teacher, "--layerwise", "--json"]
    arguments += ["--data", text.sources[0], "--sequences", 40, "--length", 32, "--out", out]
    found = CliRunner().invoke(app, [*map(str, arguments), "--steps", "2", "--batch", "4"])
    assert found.exit_code == 0, found.output
    assert len(json.loads(found.stdout)["layers"]) == 2
    assert torch.isfinite(load(out).lm_head.weight).all()


@pytest.mark.slow
def test_launched_processes_share_layers_too(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", "-m", "moeprune", "recover", str(students["masked"])]
    command += ["--teacher", str(teacher), "--layerwise", "--target", "dense-inputs"]
    command += [
        "--steps",
        "8",
        "--batch",
        "8",
        "--learning-rate",
        "3e-3",
        "--holdout",
        "0.2",
        "--sequences",
        "40",
    ]
    command += ["--length", "32", "--data", text.sources[0], "--out", str(tmp_path / "two")]
    subprocess.run(command, env=dict(os.environ), check=True, capture_output=True)
    chosen = quick(target="dense-inputs")
    recover(students["masked"], teacher, tmp_path / "one", chosen, text)
    assert tensor_digests(tmp_path / "one") == tensor_digests(tmp_path / "two")
