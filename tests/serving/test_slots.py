"""The parts of the vLLM plugin that need no vLLM, against the modules that transformers runs."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import tiny_model
from moeprune.errors import CheckpointError, MoepruneError
from moeprune.models.answer_runtime import AnsweringExperts
from moeprune.models.novice_runtime import NoviceExperts
from moeprune.models.sites import is_experts, is_swiglu
from moeprune.serving import plugin
from moeprune.serving.slots import Slots, added_output, index_tensors

E, K, H, T = 8, 3, 6, 40


def config(**keys: Any) -> Any:
    found = SimpleNamespace(**keys)
    found.get_text_config = lambda: found
    return found


class Plain(nn.Module):
    """Experts that are matrices; ids from ``num_experts`` on are skipped, as fast kernels do."""

    def __init__(self, weight_CHH: Tensor) -> None:
        super().__init__()
        self.weight_CHH, self.num_experts = weight_CHH, len(weight_CHH)
        self.config = SimpleNamespace(_experts_implementation="grouped_mm")

    def forward(self, x_TH: Tensor, id_TK: Tensor, gate_TK: Tensor) -> Tensor:
        out_TH = torch.zeros_like(x_TH)
        for e in range(self.num_experts):
            share_T = (gate_TK * (id_TK == e)).sum(1)
            out_TH += share_T[:, None] * (x_TH @ self.weight_CHH[e].T)
        return out_TH


class Novices(NoviceExperts, Plain):
    pass


class Answers(AnsweringExperts, Plain):
    pass


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    ids_TK = torch.rand(T, E, generator=random).argsort(1)[:, :K]
    gate_TK = torch.rand(T, K, generator=random)
    return torch.randn(T, H, generator=random), ids_TK, gate_TK


def served(module: Plain, slots: Slots, value: Tensor | None, inputs: Any) -> Tensor:
    """What the plugin computes, with ``Plain`` in the place of vLLM's kernel."""
    x_TH, ids_TK, gate_TK = inputs
    slot_E, row_E, computed_E = index_tensors(slots)
    out_TH = Plain.forward(module, x_TH, slot_E[ids_TK], gate_TK * computed_E[ids_TK])
    if value is None:
        return out_TH
    return out_TH + added_output(x_TH, row_E[ids_TK], gate_TK, value, slots.rank)


@pytest.mark.parametrize("rank", [0, 2])
def test_novices_as_in_transformers(inputs: Any, rank: int) -> None:
    gone = [6, 1, 4]
    slots = Slots.of(config(approximate_experts={"3": gone}, approximate_rank=rank), 3, E)
    assert slots is not None and slots.kept == (0, 2, 3, 5, 7) and slots.added == (1, 4, 6)
    module = Novices(torch.randn(5, H, H))
    module.novice_value = nn.Parameter(torch.randn(3, H * (1 + 2 * rank)))
    module.novice_rank, order = rank, [*slots.kept, *slots.added]
    module.slot_of_expert = [order.index(e) for e in range(E)]
    torch.testing.assert_close(
        served(module, slots, module.novice_value, inputs), module(*inputs), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("offsets", [False, True])
def test_answers_as_in_transformers(inputs: Any, offsets: bool) -> None:
    answers = [0, 2, 2, 5, 0, 5, 5, 7]
    keys: dict[str, Any] = {"experts_served_by": {"3": answers}}
    slots = Slots.of(config(**keys, expert_offsets=[3] if offsets else []), 3, E)
    assert slots is not None and slots.kept == (0, 2, 5, 7) and all(slots.computed)
    module = Answers(torch.randn(4, H, H))
    module.output_offset = nn.Parameter(torch.randn(4, H)) if offsets else None
    module.slot_of_expert = [slots.kept.index(e) for e in answers]
    torch.testing.assert_close(
        served(module, slots, module.output_offset, inputs), module(*inputs), rtol=0, atol=2e-5
    )


def test_names_in_checkpoints() -> None:
    slots = Slots.of(config(approximate_experts={"0": [1, 4]}), 0, 6)
    assert slots is not None
    assert slots.stored_name("5.up_proj.weight") == "3.up_proj.weight"
    assert slots.stored_name("gate_up_proj") == "gate_up_proj"
    assert slots.row("4.approx_value") == 1
    assert slots.row("novice_value") == slice(None)
    assert slots.row("5.up_proj.weight") is None
    with pytest.raises(CheckpointError, match=r"1\.up_proj\.weight is stored"):
        slots.stored_name("1.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"5\.approx_value is stored"):
        slots.row("5.approx_value")
    without = Slots.of(config(experts_served_by={"0": [0, 0, 2, 3, 4, 5]}), 0, 6)
    assert without is not None
    with pytest.raises(CheckpointError, match="output_offset is stored"):
        without.row("output_offset")


def test_layers_without_anything_of_ours() -> None:
    assert Slots.of(config(), 0, E) is None
    assert Slots.of(config(approximate_experts={"1": [2]}), 0, E) is None


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"approximate_experts": {"0": [9]}}, "does not select among"),
        ({"approximate_experts": {"0": list(range(E))}}, "no expert at all"),
        ({"experts_served_by": {"0": [0, 1]}}, "does not select among"),
        ({"approximate_experts": {"0": [1]}, "expert_offsets": [0]}, "novices and experts that"),
    ],
)
def test_impossible_configurations(keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        Slots.of(config(**keys), 0, E)


def test_entry_point_and_what_it_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = entry_points(group="vllm.general_plugins", name="moeprune")
    assert found.load() is plugin.register
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MoepruneError, match="vLLM cannot be imported"):
        plugin.register()
    names = plugin.architectures()
    assert names["NoviceOlmoeForCausalLM"].endswith(":PrunedOlmoeForCausalLM")
    assert names["UnevenGlm4MoeForCausalLM"] == plugin.BACKEND
    assert sum(where != plugin.BACKEND for where in names.values()) == 18


def test_a_vllm_that_differs_opens_other_models(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registered: dict[str, str] = {}
    registry = SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    monkeypatch.delitem(sys.modules, "moeprune.serving.vllm_config", raising=False)
    plugin.register()
    assert registered == plugin.architectures()
    assert "tested with vLLM 0.32" in caplog.text and "uneven DeepSeek" in caplog.text


@pytest.mark.parametrize(("version", "said"), [("0.32.0+cpu", False), ("0.33.1", True)])
def test_another_version_is_said(
    version: str, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    plugin.warn_of_version(version)
    assert (f"this is {version}: compare" in caplog.text) == said


def test_every_architecture_has_a_class() -> None:
    """The classes need vLLM to be made; their definitions do not."""
    source = plugin.__file__.replace("plugin.py", "vllm_models.py")
    with open(source, encoding="utf-8") as file:
        text = file.read()
    for where in set(plugin.architectures().values()) - {plugin.BACKEND}:
        name = where.rpartition(":")[2]
        assert f'\n{name} = _pruned("{name.removeprefix("Pruned")}")' in text


def test_models_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, plugin.MODELS, raising=False)
    with pytest.raises(MoepruneError, match="does not have what the plugin builds on"):
        __import__(plugin.MODELS)


@pytest.mark.parametrize(
    ("model_type", "keys", "served"),
    [
        ("glm4_moe", {}, True),
        ("glm4_moe", {"hidden_act": "gelu"}, False),
        ("gpt_oss", {}, False),  # limits, and another slope
        ("nemotron_h", {}, False),  # no gate
    ],
)
def test_experts_that_servers_compute(model_type: str, keys: dict[str, Any], served: bool) -> None:
    model = tiny_model(model_type, **keys)
    assert {is_swiglu(experts) for experts in model.modules() if is_experts(experts)} == {served}
