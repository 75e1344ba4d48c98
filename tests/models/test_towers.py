"""Models with a vision or audio tower: the language model is edited, the rest stays."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    Ernie4_5_VLMoeConfig,
    PreTrainedModel,
)

from families import experts_modules, moe_layers, randomise, token_ids
from heads import read_all
from moeprune import Budget, Compute, Text, calibrate, evaluate, inspect, load, plan, prune
from moeprune.core.plan import LayerPlan, MaskEdit, Plan
from moeprune.core.shapes import LayerShape
from moeprune.errors import UnsupportedModelError
from moeprune.models import quirks
from moeprune.models.checkpoint import Checkpoint, ConfigOnly, demo_path
from moeprune.models.layout import DiskExperts, expert_layout
from moeprune.models.loading import LayeredModel
from moeprune.models.surgery import apply_plan
from moeprune.models.walk import Batch, Walk
from support import (
    aligned,
    experts_masked,
    layer_of,
    outputs_replaced,
    plan_for,
    some_experts,
    tensor_digests,
    without,
)
from towers import TOWERS, save_tower, tower_config

Saved = Callable[[str], Path]

every_tower = pytest.mark.parametrize("model_type", sorted(TOWERS))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The directory of a tiny checkpoint; tests must not write into it."""
    known: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in known:
            known[model_type] = save_tower(model_type, tmp_path_factory.mktemp(model_type))
        return known[model_type]

    return get


def rows(model_type: str, matrices: Tensor) -> Tensor:
    """Matrices of all experts as [experts, outputs, inputs]."""
    return matrices.transpose(1, 2) if model_type == "llama4" else matrices


def text_ids(seed: int = 0) -> Tensor:
    """Ordinary tokens: none stands for an image."""
    return token_ids(2, 24, vocab=118, seed=seed)


def stock(directory: Path) -> PreTrainedModel:
    """Opened by transformers alone; nothing missing, left over or of another size."""
    model, info = AutoModelForMultimodalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return aligned(model)


def logits(model: Any, ids: Tensor | None = None, **inputs: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(text_ids() if ids is None else ids, use_cache=False, **inputs).logits
        return output


def walk(directory: Path, *seeds: int) -> list[Tensor]:
    """Logits of a walk one layer at a time, a batch per seed."""
    model = LayeredModel(Checkpoint.open(directory), torch.float32)
    batches = [Batch(text_ids(seed), torch.arange(48).view(2, 24)) for seed in seeds]
    found: list[Tensor] = []
    with Walk(model, batches, 2) as running:
        running.layers(["routing"] if model.sites else [], lambda site, statistics: False)
        running.logits(lambda _, value: found.append(value))
    return found


def make_plan(directory: Path, make: Callable[[LayerShape], LayerPlan]) -> Plan:
    checkpoint = Checkpoint.open(directory)
    sites = LayeredModel(checkpoint).sites
    return plan_for(checkpoint, [make(site.shape) for _, site in sorted(sites.items())])


def drop(shape: LayerShape) -> LayerPlan:
    gone = some_experts(shape, 1 if shape.groups > 1 else 2, seed=1)
    return LayerPlan(shape.layer, shape.experts, without(shape, gone))


def is_language(name: str) -> bool:
    return "layers." in name and "visual" not in name and "vision" not in name


# ---- reading -------------------------------------------------------------------------------------


@every_tower
def test_walk_is_the_stock_forward(model_type: str, saved: Saved) -> None:
    """The decoder's layers are found, not the tower's, which are as many."""
    model = LayeredModel(Checkpoint.open(saved(model_type)), torch.float32)
    reference = stock(saved(model_type))
    assert type(model.model) is type(reference)
    assert "vis" not in model.prefix
    assert "audio" not in model.prefix
    assert sorted(model.sites) == moe_layers(reference)
    for seed, found in enumerate(walk(saved(model_type), 0, 1)):
        expected = logits(reference, text_ids(seed))
        # llama4's experts add up in another order while they are observed
        atol = 2e-6 if model_type == "llama4" else 0
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@every_tower
def test_experts_are_read_from_disk(model_type: str, saved: Saved) -> None:
    model = LayeredModel(Checkpoint.open(saved(model_type)), torch.float32)
    layout = expert_layout(model)
    modules = experts_modules(stock(saved(model_type)))
    for name, experts in modules.items():
        disk = DiskExperts(model.checkpoint, layout, model.sites[layer_of(name)])
        gate, up = rows(model_type, experts.gate_up_proj)[5].chunk(2)
        assert torch.equal(disk.matrix(5, "gate"), gate)
        assert torch.equal(disk.matrix(5, "up"), up)
        assert torch.equal(disk.matrix(5, "down"), rows(model_type, experts.down_proj)[5])


# ---- editing -------------------------------------------------------------------------------------


@every_tower
def test_deletion_is_the_masked_original(model_type: str, saved: Saved, tmp_path: Path) -> None:
    source = saved(model_type)
    chosen = make_plan(source, drop)
    apply_plan(Checkpoint.open(source), chosen, tmp_path / "out")
    pruned, original = stock(tmp_path / "out"), stock(source)
    keep = {index: layer.keep for index, layer in chosen.layers.items()}
    before = logits(original)
    with experts_masked(original, keep):
        expected = logits(original)
    assert not torch.allclose(before, expected, atol=1e-3)
    torch.testing.assert_close(logits(pruned), expected, rtol=0, atol=0)
    old, new = tensor_digests(source), tensor_digests(tmp_path / "out")
    tower = {name for name in old if not is_language(name)}
    assert len(tower) > 10
    assert all(old[name] == new[name] for name in tower)
    configs = [
        json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "out")
    ]
    text = configs[0]["text_config"]
    [key] = [key for key in quirks.EXPERT_COUNT_KEYS if key in text]
    text[key] = len(next(iter(keep.values())))
    assert configs[0] == configs[1]


def test_vendors_transposed_matrices(saved: Saved, tmp_path: Path) -> None:
    """Qwen3-VL stores inputs before outputs; transformers saves and reads both orders."""
    plain, source = saved("qwen3_vl_moe"), tmp_path / "vendor"
    source.mkdir()
    shutil.copy(plain / "config.json", source)
    tensors = {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
        for name, tensor in read_all(plain).items()
    }
    save_file(tensors, source / "model.safetensors")
    model = LayeredModel(Checkpoint.open(source))
    layout = expert_layout(model)
    assert {t.input_dim for t in layout.values() if t.role in ("gate_up", "down")} == {-2}
    for directory, out in ((source, tmp_path / "a"), (plain, tmp_path / "b")):
        apply_plan(Checkpoint.open(directory), make_plan(directory, drop), out)
    torch.testing.assert_close(
        logits(stock(tmp_path / "a")), logits(stock(tmp_path / "b")), rtol=0, atol=0
    )


@every_tower
def test_masks(model_type: str, saved: Saved, tmp_path: Path) -> None:
    source = saved(model_type)
    mask = MaskEdit(0.5, None)

    def half(shape: LayerShape) -> LayerPlan:
        return LayerPlan(shape.layer, shape.experts, tuple(range(shape.experts)), mask=mask)

    apply_plan(Checkpoint.open(source), make_plan(source, half), tmp_path / "out")
    original = experts_modules(stock(source))
    for name, experts in experts_modules(stock(tmp_path / "out")).items():
        for key in ("gate_up_proj", "down_proj"):
            before, after = (
                rows(model_type, getattr(module, key)) for module in (original[name], experts)
            )
            gone = after == 0
            assert (gone.sum(dim=-1) == before.shape[-1] // 2).all()
            assert torch.equal(after[~gone], before[~gone])
            largest_gone = before.abs().masked_fill(~gone, 0).amax(dim=-1)
            assert (largest_gone <= before.abs().masked_fill(gone, torch.inf).amin(dim=-1)).all()


_OPEN = """
import sys, torch
from transformers import AutoModelForMultimodalLM
torch.set_num_threads(1)
options = {"dtype": torch.float32, "trust_remote_code": True}
model = AutoModelForMultimodalLM.from_pretrained(sys.argv[1], **options).eval()
ids = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(ids, use_cache=False).logits, sys.argv[3])
assert "moeprune" not in sys.modules
"""


@pytest.mark.parametrize(
    "model_type", [name for name in TOWERS if f"{name}_text" not in quirks.NOVICES_REFUSED]
)
def test_novices(model_type: str, saved: Saved, tmp_path: Path) -> None:
    """Opened by us, and in a process without us by the auto class of such models."""
    source = saved(model_type)
    vectors: dict[int, dict[int, Tensor]] = {}

    def replaced(shape: LayerShape) -> LayerPlan:
        gone = some_experts(shape, 2, seed=3)
        values = torch.randn(len(gone), shape.hidden, generator=torch.Generator().manual_seed(5))
        vectors[shape.layer] = dict(zip(gone, values, strict=True))
        return LayerPlan(shape.layer, shape.experts, without(shape, gone), gone, novices_NH=values)

    apply_plan(Checkpoint.open(source), make_plan(source, replaced), tmp_path / "out")
    original = stock(source)
    with outputs_replaced(original, vectors):
        expected = logits(original)
    assert not torch.allclose(logits(original), expected, atol=1e-3)
    opened = load(tmp_path / "out", torch.float32)
    torch.testing.assert_close(logits(opened), expected, rtol=1e-5, atol=1e-5)
    opened.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        logits(load(tmp_path / "again", torch.float32)), logits(opened), rtol=1e-6, atol=1e-6
    )
    torch.save(text_ids(), tmp_path / "ids")
    command = [sys.executable, "-c", _OPEN, *(tmp_path / n for n in ("out", "ids", "found"))]
    subprocess.run(command, check=True, capture_output=True, env={"PATH": "/usr/bin:/bin"})
    torch.testing.assert_close(torch.load(tmp_path / "found"), expected, rtol=1e-5, atol=1e-5)
    [walked] = walk(tmp_path / "out", 0)
    torch.testing.assert_close(walked, expected, rtol=1e-5, atol=1e-5)


def test_an_image_goes_through_the_pruned_model(saved: Saved, tmp_path: Path) -> None:
    source = saved("qwen3_vl_moe")
    chosen = make_plan(source, drop)
    apply_plan(Checkpoint.open(source), chosen, tmp_path / "out")
    config = tower_config("qwen3_vl_moe")
    patches = 4 * 4  # of an image of 16 x 16, merged 2 x 2 into four tokens
    pixels = torch.randn(patches, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    ids = text_ids()[:1]
    image = torch.full((1, 4), config.image_token_id)
    start, end = (torch.tensor([[n]]) for n in (122, 123))
    ids = torch.cat([ids[:, :8], start, image, end, ids[:, 8:]], dim=1)
    inputs = {
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
    }
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    pruned, original = aligned(opened), stock(source)
    with experts_masked(original, {i: layer.keep for i, layer in chosen.layers.items()}):
        expected = logits(original, ids, **inputs)
        other = logits(original, ids, **inputs | {"pixel_values": -pixels})
    assert not torch.allclose(expected, other, atol=1e-3), "the image should matter"
    torch.testing.assert_close(logits(pruned, ids, **inputs), expected, rtol=0, atol=0)


# ---- the pipeline --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the embedded model's tokenizer, and so its vocabulary; no processor."""
    directory = tmp_path_factory.mktemp("readable") / "model"
    config = tower_config("qwen3_vl_moe")
    config.text_config.vocab_size = AutoConfig.from_pretrained(demo_path()).vocab_size
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    randomise(model, 0)
    model.save_pretrained(directory)
    for file in demo_path().glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory


def test_every_stage(readable: Path, tmp_path: Path) -> None:
    """Inspected, calibrated, planned, pruned and evaluated on text alone."""
    facts = inspect(readable)
    assert facts["supported"], facts["reason"]
    assert (facts["experts"], facts["top_k"], facts["moe_layers"]) == (8, 2, [0, 1, 2, 3])
    compute = Compute(dtype="float32", workers=1)
    text = tmp_path / "text.txt"
    text.write_text("A tower stands beside the sea, and nobody looks at it. " * 60)
    words = Text((str(text),), 4, 32)
    store = calibrate(readable, tmp_path / "statistics", words, compute=compute)
    assert store.layers == [0, 1, 2, 3]
    made = plan(readable, "mone", Budget(ratio=0.25), tmp_path / "statistics", compute=compute)
    assert all(len(layer.replaced) == 2 for layer in made.layers.values())
    done = prune(readable, "moeits", Budget(keep=6), tmp_path / "out", words, compute=compute)
    assert done.sizes.experts == (32, 24)
    result = evaluate(tmp_path / "out", readable, words, compute)
    assert result["groups"]["all"]["kl"] > 0
    assert type(load(tmp_path / "out")).__name__ == "Qwen3VLMoeForConditionalGeneration"


# ---- the edges -----------------------------------------------------------------------------------


def test_language_model_alone(saved: Saved, tmp_path: Path) -> None:
    """Where ``architectures`` names it, the language model is opened without its towers."""
    source = Path(shutil.copytree(saved("qwen3_5_moe"), tmp_path / "a"))
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["Qwen3_5MoeForCausalLM"]
    (source / "config.json").write_text(json.dumps(config))
    model = LayeredModel(Checkpoint.open(source), torch.float32)
    assert type(model.model).__name__ == "Qwen3_5MoeForCausalLM"
    apply_plan(Checkpoint.open(source), make_plan(source, drop), tmp_path / "out")
    old, new = tensor_digests(source), tensor_digests(tmp_path / "out")
    assert all(old[name] == new[name] for name in old if not is_language(name))
    pruned, whole = load(tmp_path / "out", torch.float32), load(source, torch.float32)
    with experts_masked(
        aligned(whole), {i: p.keep for i, p in make_plan(source, drop).layers.items()}
    ):
        expected = logits(whole)
    torch.testing.assert_close(logits(aligned(pruned)), expected, rtol=0, atol=0)


def test_refuses_two_blocks_of_experts_in_a_layer(tmp_path: Path) -> None:
    """Ernie 4.5 VL routes text and image tokens to experts of their own."""
    config = Ernie4_5_VLMoeConfig()
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="more than one MoE block"):
        LayeredModel(ConfigOnly(tmp_path))
