"""The models of the papers, by their vendors' config.json, and configurations that need more."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from families import experts_modules, randomise
from moeprune import inspect, load
from moeprune.core.plan import LayerPlan
from moeprune.errors import UnsupportedModelError
from moeprune.models import native
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.layout import expert_layout
from moeprune.models.loading import LayeredModel
from moeprune.models.surgery import apply_plan
from support import (
    aligned,
    experts_masked,
    layer_of,
    logits,
    open_stock,
    plan_for,
    some_experts,
    without,
)
from vendor_configs import DEEPSEEK_MOE, VENDORS, Vendor


@dataclass(frozen=True)
class Saved:
    """A shrunk model on disk; tests must not write into it."""

    vendor: Vendor
    directory: Path


TRAP = 'raise RuntimeError("code of a checkpoint ran")\n'


def save_vendor(name: str, directory: Path) -> Path:
    """The shrunk model under the vendor's tensor names and its own config.json and code."""
    directory.mkdir()
    config = VENDORS[name].small()
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(directory), dtype=torch.float32
        )
    randomise(model, 0)
    model.save_pretrained(directory, max_shard_size="200KB")
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    for target in config.get("auto_map", {}).values():
        (directory / f"{target.partition('.')[0]}.py").write_text(TRAP)
    return directory


@pytest.fixture(scope="module", params=sorted(VENDORS))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """One published model after the other, shrunk."""
    directory = save_vendor(request.param, tmp_path_factory.mktemp("vendor") / "model")
    return Saved(VENDORS[request.param], directory)


def test_facts(saved: Saved) -> None:
    """What the configuration says is what is found, whatever it is called."""
    published, small = saved.vendor.config, saved.vendor.small()
    model = LayeredModel(Checkpoint.open(saved.directory))
    stored = torch.bfloat16 if "torch_dtype" in published else torch.float32
    assert model.dtype == stored
    expected = [i for i in range(3) if i not in saved.vendor.dense]
    assert sorted(model.sites) == expected
    for site in model.sites.values():
        shape = site.shape
        assert shape.experts == published[saved.vendor.count_key]
        assert shape.top_k == published["num_experts_per_tok"]
        assert (shape.groups, shape.top_groups) == (1, 1)
        width = small.get("moe_intermediate_size", small["intermediate_size"])
        assert (shape.hidden, shape.intermediate) == (small["hidden_size"], width)
    layers = {tensor.layer for tensor in expert_layout(model).values()}
    assert layers == set(expected)
    assert all(model.target(key)[0] is not None for key in model.checkpoint.tensors)
    facts = inspect(saved.directory)
    assert facts["supported"], facts["reason"]
    assert facts["architecture"] == published["architectures"][0]


def sliced(original: PreTrainedModel, count_key: str, keep: Mapping[int, Sequence[int]]) -> Any:
    """The original with experts and router rows taken out in memory, by its parameters' names."""
    state = original.state_dict()
    for name in [n for n in state if re.search(r"experts\.\w+$|\.(gate|router)\.", n)]:
        if "shared" not in name:
            state[name] = state[name][list(keep[layer_of(name)])]
    config = copy.deepcopy(original.config)
    setattr(config, count_key, len(next(iter(keep.values()))))
    model = type(original)(config)
    model.load_state_dict(state, strict=True)
    return aligned(model)


def test_pruned_is_the_original_without_those_experts(saved: Saved, tmp_path: Path) -> None:
    """A quarter of the experts goes; config.json differs in the vendor's own key alone.

    The masked original is the same but for rounding: a softmax over 64 entries, of which 16 are
    zero, adds in another order than one over 48, and an unsorted top-k returns another order.
    """
    checkpoint, key = Checkpoint.open(saved.directory), saved.vendor.count_key
    keep = {}
    for index, site in LayeredModel(checkpoint).sites.items():
        shape = site.shape
        keep[index] = without(shape, some_experts(shape, shape.experts // 4, seed=1))
    total = saved.vendor.config[key]
    plan = plan_for(checkpoint, [LayerPlan(i, total, ids) for i, ids in keep.items()])
    apply_plan(checkpoint, plan, tmp_path / "out")
    pruned, original = open_stock(tmp_path / "out"), open_stock(saved.directory)
    found = logits(pruned)
    for module, experts in experts_modules(pruned).items():
        assert len(experts.down_proj) == len(keep[layer_of(module)]) == total - total // 4
    expected = logits(sliced(original, key, keep))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    before = logits(original)
    with experts_masked(original, keep):
        masked = logits(original)
    assert not torch.allclose(before, masked, atol=1e-3)
    torch.testing.assert_close(found, masked, rtol=1e-4, atol=5e-6)
    ours = aligned(load(tmp_path / "out", torch.float32))
    torch.testing.assert_close(logits(ours), found, rtol=0, atol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == saved.vendor.small() | {key: total - total // 4}


def bare(directory: Path, **config: object) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, directory / "model.safetensors")
    for name in ("configuration_deepseek", "modeling_deepseek"):
        (directory / f"{name}.py").write_text(TRAP)
    return directory


def test_deepseek_moe_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """DeepSeekMoE-16B: its code would have to run; transformers has no class for it."""
    source = bare(tmp_path / "a", **DEEPSEEK_MOE)
    for reads in (lambda: LayeredModel(Checkpoint.open(source)), lambda: load(source)):
        with pytest.raises(UnsupportedModelError) as caught:
            reads()
        assert "'deepseek'" in caught.value.problem
        assert "code that comes with a checkpoint is not run" in caught.value.problem
        assert "deepseek_v2" in caught.value.hint


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "something_new", "auto_map": {"AutoConfig": "configuration_deepseek.C"}},
        {"auto_map": {"AutoConfig": "configuration_deepseek.C"}},
        {"model_type": ["a"], "auto_map": {"AutoConfig": "configuration_deepseek.C"}},
        {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.M"}},
    ],
    ids=["unknown", "nameless", "not a name", "no language model"],
)
def test_code_of_a_checkpoint_never_runs(config: dict[str, object], tmp_path: Path) -> None:
    source = bare(tmp_path / "a", **config)
    with pytest.raises(UnsupportedModelError, match="is not run") as caught:
        LayeredModel(Checkpoint.open(source))
    assert caught.value.hint
    assert "\n" not in caught.value.problem + caught.value.hint


def test_a_known_type_with_a_bad_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the value that is wrong, not that code is missing."""

    def fail(*_: object, **__: object) -> None:
        raise ValueError("hidden_size is not a number")

    source = bare(tmp_path / "a", **VENDORS["Moonlight-16B-A3B"].small())
    monkeypatch.setattr(native, "refuse_absurd", lambda checkpoint: None)  # its weights are missing
    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(UnsupportedModelError, match="cannot read the configuration") as caught:
        LayeredModel(Checkpoint.open(source))
    assert caught.value.hint == "hidden_size is not a number"


def test_unknown_without_code(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot read the configuration"):
        LayeredModel(Checkpoint.open(bare(tmp_path / "a", model_type="something_new")))
