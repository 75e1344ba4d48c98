"""LoRA: what is merged computes what the adapter did, but for the zeros, which are put back."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from families import tiny_model
from moeprune import load, recover, training, verify
from moeprune.errors import MoepruneError
from moeprune.models.checkpoint import Checkpoint
from moeprune.pipeline.inputs import Text
from moeprune.recovery.groups import digests, parameters_of
from moeprune.recovery.lora import Adapters, targets
from moeprune.recovery.session import Session
from support import tensor_digests

pytest.importorskip("peft")

QUICK: dict[str, Any] = {
    "steps": 4, "batch": 4, "learning_rate": 1e-2, "evaluate_every": 2, "patience": 0,
    "holdout": 0.1, "rank": 4, "neftune": 1.0,
}  # fmt: skip
IDS = torch.randint(3, 6000, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["dropped", "uneven", "novices"])
def test_the_merged_model_is_the_adapted_one(
    students: dict[str, Path], teacher: Path, kind: str
) -> None:
    made = training("lora", None, {"rank": 4, "train": ("experts", "rest", "routers")})
    checkpoint = Checkpoint.open(students[kind])
    with ExitStack() as stack, torch.no_grad():
        session = Session(checkpoint, None, made, torch.device("cpu"), stack)
        assert session.adapters is not None
        adapted = session.adapters.model.eval()
        torch.manual_seed(0)
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.05)
        wanted = adapted(input_ids=IDS, use_cache=False).logits
        merged = session.adapters.merge()
        found = merged(input_ids=IDS, use_cache=False).logits
    plain = load(students[kind])(IDS, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert float((found - plain).abs().max()) > 0.01
    assert set(session.groups.values()) == {"experts", "rest", "routers"}
    assert all(n[0] == n[1] for g, n in session.changed().items() if g != "frozen")


LAYOUTS = {
    "qwen3_moe": "fused", "gpt_oss": "transposed, with biases", "granitemoe": "modules of its own",
    "nemotron_h": "without a gate", "llama4_text": "one input for all experts",
}  # fmt: skip


@pytest.mark.parametrize("family", LAYOUTS)
def test_what_is_said_to_train_trains_in_every_layout(family: str) -> None:
    model = tiny_model(family)
    made = training("lora", None, {"rank": 2, "dropout": 0.0})
    parameters = parameters_of(model)
    chosen = targets(model, parameters, made.train)
    assert {name for name in parameters.masked if name not in chosen} == set()
    before = digests(model, chosen)
    torch.manual_seed(0)
    adapters = Adapters(model, chosen, made)
    ids = torch.randint(3, 60, (4, 32), generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # the matrices that begin at zero train first, the others then
        adapters.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for name, p in adapters.model.named_parameters():
            if name in adapters.groups and "lora_B" in name:
                assert p.grad is not None and bool(p.grad.abs().sum() > 0), name
        with torch.no_grad():
            for name, p in adapters.model.named_parameters():
                if name in adapters.groups:
                    p.sub_(0.1 * p.grad)
    assert set(adapters.groups.values()) == set(chosen.values()) == {"experts", "rest"}
    adapters.merge()
    after = digests(model, chosen)
    assert [name for name in chosen if after[name] == before[name]] == []


def test_merged_on_disk_with_the_zeros_put_back(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path
) -> None:
    out = tmp_path / "healed"
    chosen = training("lora", None, {**QUICK, "holdout": 0.0})
    made = recover(students["masked"], teacher, out, chosen, text)
    assert not verify(out).findings
    before, after = Checkpoint.open(students["masked"]), Checkpoint.open(out)
    for key in before.tensors:
        if ".experts." in key:
            assert bool((after.read(key)[before.read(key) == 0] == 0).all())
    now, then = tensor_digests(out), tensor_digests(students["masked"])
    changed = {key for key in now if now[key] != then[key]}
    assert changed == {k for k in now if ".experts." in k or k.endswith("_proj.weight")}
    assert set(made.gradients) == {"experts", "rest"}
    assert all(made.gradients.values())


def test_without_a_teacher_and_as_an_adapter(
    students: dict[str, Path], text: Text, tmp_path: Path
) -> None:
    from peft import PeftModel

    out = tmp_path / "adapter"
    chosen = training("lora", None, {**QUICK, "adapter": True})
    made = recover(students["dropped"], None, out, chosen, text)
    assert made.measure == "ce"
    assert made.zeros == 0, "an adapter puts no zeros back"
    adapted = PeftModel.from_pretrained(
        load(students["dropped"]), out / "linear", adapter_name="linear"
    )
    adapted.load_adapter(out / "experts", adapter_name="experts")
    adapted.base_model.set_adapter(["linear", "experts"])
    plain = load(students["dropped"])(IDS, use_cache=False).logits
    found = adapted.eval()(input_ids=IDS, use_cache=False).logits
    assert float((found - plain).abs().max()) > 1e-4
    assert not list(out.glob("*.safetensors"))


def test_resumed_with_dropout_and_noise(
    students: dict[str, Path], text: Text, tmp_path: Path
) -> None:
    chosen = training("lora", None, {**QUICK, "save_every": 2})
    recover(students["dropped"], None, tmp_path / "whole", chosen, text)

    class Cut(Exception):
        pass

    def cut(status: Any) -> None:
        if status.step == 3:
            raise Cut

    with pytest.raises(Cut):
        recover(students["dropped"], None, tmp_path / "cut", chosen, text, listen=cut)
    recover(students["dropped"], None, tmp_path / "cut", chosen, text, resume=True)
    assert tensor_digests(tmp_path / "cut") == tensor_digests(tmp_path / "whole")


def test_nothing_to_adapt(students: dict[str, Path], text: Text, tmp_path: Path) -> None:
    with pytest.raises(MoepruneError, match="LoRA could adapt"):
        chosen = training("lora", None, {**QUICK, "train": ("embeddings",)})
        recover(students["dropped"], None, tmp_path / "x", chosen, text)
