"""Commands on an fp8 model: the same text, statistics and decisions as on its unquantised twin."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import quantise
from families import save_tiny
from moeprune import Budget, Compute, Text, Writing, apply, calibrate, evaluate, load, plan, prune
from moeprune.models.checkpoint import Checkpoint, demo_path
from running import Done, Run
from support import tensor_digests, tree

COMPUTE = Compute(dtype="float32", workers=1)
CHANGING = {
    "mone": (["--ratio", "0.25"], "replaces experts by constants"),
    "moe-pruner": (["--ratio", "0.5"], "zeroes weights"),
}


def as_json(done: Done) -> Any:
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.fixture(scope="module")
def fp8(shelf: Path) -> Path:
    """A tiny model with the embedded model's tokenizer, in blocks that do not divide it."""
    plain = save_tiny("qwen3_moe", shelf / "with-tokenizer", vocab_size=6144)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_path() / name, plain)
    return quantise.fp8(plain, shelf / "fp8", (16, 16))


@pytest.fixture(scope="module")
def twin(shelf: Path, fp8: Path) -> Path:
    return quantise.plain(fp8, shelf / "twin")


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Any:
    """A command says these words in one or two lines, exits with 2 and leaves nothing.

    But for ``kept``: what took long, so that the mended command goes on from it.
    """

    def check(*args: object, says: tuple[str, ...], kept: str = "") -> None:
        before = tree(tmp_path)
        done = run(*args)
        lines = done.err.strip().splitlines()
        assert (done.code, done.out) == (2, ""), done.err
        assert 1 <= len(lines) <= 2 and lines[0].startswith("error: ")
        for words in says:
            assert words in done.err
        assert (tmp_path / kept).is_dir()
        after = {n: v for n, v in tree(tmp_path).items() if not kept or not n.startswith(kept)}
        assert after == before

    return check


def test_statistics_are_those_of_the_twin(fp8: Path, twin: Path, english: Path) -> None:
    text = Text((str(english),), 6, 64)
    stores = [
        calibrate(source, Path(f"stats-{source.name}"), text, compute=COMPUTE)
        for source in (fp8, twin)
    ]
    assert stores[0].layers == stores[1].layers
    for layer in stores[0].layers:
        mine, other = (store.layer(layer).to_tensors() for store in stores)
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            assert torch.equal(tensor, other[name]), name
    results = [evaluate(source, text=text, compute=COMPUTE)["domains"] for source in (fp8, twin)]
    assert results[0] == results[1]


def test_moeits_from_the_command_line(run: Run, fp8: Path, twin: Path) -> None:
    for source in (fp8, twin):
        args = ("--method", "moeits", "--keep", "5", "--out", source.name)
        as_json(run("prune", source, *args, "--dtype", "float32", "--json"))
    facts = as_json(run("inspect", "fp8", "--json"))
    assert (facts["quantization"], facts["experts"], facts["supported"]) == ("fp8", 5, True)
    unquantised = tensor_digests(quantise.plain(Path("fp8"), Path("plain")))
    assert unquantised == tensor_digests(Path("twin"))
    assert "fp8" in run("inspect", "fp8").out


@pytest.mark.parametrize("method", CHANGING)
def test_changed_values_are_refused_before_the_model_is_read(
    method: str, refused: Any, fp8: Path, small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    budget, what = CHANGING[method]
    monkeypatch.setattr(
        "moeprune.models.quantised.read", lambda *args, **options: pytest.fail("weights were read")
    )
    says = (f"this {what}", ".weight is stored as F8_E4M3", "weight_scale_inv", "--dequantize")
    refused("prune", fp8, "--method", method, "--out", "out", *budget, *small, says=says)


@pytest.mark.parametrize("method", CHANGING)
def test_changed_values_as_bf16(
    method: str, refused: Any, run: Run, fp8: Path, small: tuple[str, ...]
) -> None:
    """Planned from the quantised weights; carried out only where bf16 is asked for."""
    budget, _ = CHANGING[method]
    planned = ["--method", method, *budget, *small]
    if method == "mone":
        assert run("calibrate", fp8, "--out", "stats", *small).code == 0
        planned = ["--method", method, *budget, "--statistics", "stats"]
    done = run("plan", fp8, *planned, "--out", "plan.json")
    assert done.code == 0, done.err
    says = ("experts.0.", "F8_E4M3", "--dequantize")
    refused("apply", fp8, "--plan", "plan.json", "--out", "out", says=says)
    sizes = as_json(
        run("apply", fp8, "--plan", "plan.json", "--out", "out", "--dequantize", "--json")
    )
    assert sizes["path"] == "out"
    stored = {info.dtype for info in Checkpoint.open("out").tensors.values()}
    assert stored == {"BF16", "F32"}
    assert as_json(run("inspect", "out", "--json"))["quantization"] is None
    assert load("out").get_input_embeddings().weight.shape[0] == 6144
    args = ["--method", method, *budget, *small, "--out", "again", "--dequantize"]
    assert run("prune", fp8, *args).code == 0
    assert tensor_digests(Path("again")) == tensor_digests(Path("out"))


def test_nothing_to_dequantise(refused: Any, run: Run, twin: Path) -> None:
    says = ("is not quantised", "leave out --dequantize")
    args = ("--method", "moeits", "--keep", "5")
    refused("prune", twin, *args, "--out", "out", "--dequantize", says=says)
    assert run("plan", twin, *args, "--out", "plan.json").code == 0
    refused("apply", twin, "--plan", "plan.json", "--out", "out", "--dequantize", says=says)


def test_another_quantisation(refused: Any, run: Run, twin: Path, small: tuple[str, ...]) -> None:
    quantise.write(twin, Path("awq"), quantise.load_tensors(twin), {"quant_method": "awq"})
    facts = as_json(run("inspect", "awq", "--json"))
    assert facts["quantization"] == "awq" and not facts["supported"]
    says = ("is quantised as awq, which is not supported", "use the bf16 checkpoint")
    args = ("--method", "moeits", "--keep", "5")
    refused("calibrate", "awq", "--out", "out", *small, says=says)
    refused("plan", "awq", *args, "--out", "plan.json", says=says)
    refused("prune", "awq", *args, "--out", "out", says=says)
    refused("prune", "awq", *args, "--out", "out", "--dequantize", says=says)
    refused("evaluate", "awq", *small, says=says)
    assert run("plan", twin, *args, "--out", "plan.json").code == 0
    refused("apply", "awq", "--plan", "plan.json", "--out", "out", says=says)


def test_scales_that_do_not_fit(refused: Any, fp8: Path, small: tuple[str, ...]) -> None:
    def damaged(name: str) -> bool:
        return bool(re.fullmatch(r".*layers\.2\.mlp\.experts\.3\.up_proj\.weight_scale_inv", name))

    tensors = {n: t[:1] if damaged(n) else t for n, t in quantise.load_tensors(fp8).items()}
    config = json.loads((fp8 / "config.json").read_text())["quantization_config"]
    quantise.write(fp8, Path("damaged"), tensors, config)
    says = ("layers.2.mlp.experts.3.up_proj.weight_scale_inv: [1, 2]", "in blocks of [16, 16]")
    refused("calibrate", "damaged", "--out", "out", *small, says=says)
    args = ("--method", "moeits", "--keep", "5", "--out", "out")
    refused("prune", "damaged", *args, says=says)
    refused("prune", "damaged", *args, "--dequantize", says=says)


def test_a_router_that_cannot_be_cut(refused: Any, run: Run, twin: Path) -> None:
    quantise.fp8(twin, Path("routers"), (4, 32), lambda name: name.endswith("mlp.gate.weight"))
    args = ("--method", "moeits", "--keep", "5", "--out")
    says = ("model.layers.0.mlp.gate.weight is a router stored as F8_E4M3", "--dequantize")
    refused("prune", "routers", *args, "out", says=says, kept="out.pruning")
    assert run("prune", "routers", *args, "out", "--dequantize").code == 0
    assert not Path("out.pruning").exists()


def test_functions_take_the_same_choice(fp8: Path) -> None:
    made = plan(fp8, "moeits", Budget(keep=5), compute=COMPUTE)
    apply(fp8, made, "applied", writing=Writing(dequantize=True))
    prune(
        fp8, "moeits", Budget(keep=5), "pruned", compute=COMPUTE, writing=Writing(dequantize=True)
    )
    assert tensor_digests(Path("applied")) == tensor_digests(Path("pruned"))
    provenance = json.loads(Path("pruned/moeprune.json").read_text())
    assert provenance["dequantized_from"] == "fp8"
