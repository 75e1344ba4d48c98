"""Layers with different numbers of experts: written, opened with and without us, padded."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

from families import experts_modules, load_tiny, moe_model_types, token_ids
from heads import attach, head_of
from moeprune.core.plan import LayerPlan, MaskEdit, Plan
from moeprune.core.shapes import LayerShape
from moeprune.errors import PlanError, UnsupportedModelError
from moeprune.models import quirks, runtime
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.editing import Writing
from moeprune.models.generated import CODE_FILES, MODELING_FILE, UNEVEN_FILE
from moeprune.models.layout import expert_layout
from moeprune.models.loading import LayeredModel
from moeprune.models.surgery import apply_plan
from moeprune.models.walk import Batch, Walk
from support import (
    aligned,
    experts_masked,
    layer_of,
    logits,
    open_stock,
    plan_for,
    some_experts,
    tensor_digests,
)
from towers import save_tower

Tiny = Callable[[str], Path]


EDITABLE = [name for name in moe_model_types() if name not in quirks.REFUSED]
UNEVEN = [name for name in EDITABLE if name not in quirks.UNEVEN_REFUSED]
uneven = pytest.mark.parametrize("model_type", UNEVEN)


def keep_some(shape: LayerShape, number: int) -> LayerPlan:
    """Keep a number of experts that differs from layer to layer; others in every layer."""
    per_group = shape.experts // shape.groups
    kept = per_group - 1 - number % 2 if shape.groups > 1 else per_group - 1 - number % 3
    if number % 4 == 3:
        kept = per_group
    return LayerPlan(shape.layer, shape.experts, some_experts(shape, kept, seed=number))


def make_plan(
    checkpoint: Checkpoint, change: Callable[[LayerPlan], LayerPlan] = lambda x: x
) -> Plan:
    sites = sorted(LayeredModel(checkpoint).sites.items())
    layers = [keep_some(site.shape, number) for number, (_, site) in enumerate(sites)]
    return plan_for(checkpoint, [change(layer) for layer in layers])


def keeps(plan: Plan) -> dict[int, tuple[int, ...]]:
    return {index: layer.keep for index, layer in plan.layers.items()}


def reference(source: Path, keep: Mapping[int, tuple[int, ...]]) -> torch.Tensor:
    original = load_tiny(source)
    with experts_masked(original, keep):
        return logits(original)


@pytest.fixture(scope="module")
def made(
    tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Plan]]:
    """The uneven checkpoint of a family; tests must not write into it."""
    done: dict[str, tuple[Path, Plan]] = {}

    def get(model_type: str) -> tuple[Path, Plan]:
        if model_type not in done:
            checkpoint = Checkpoint.open(tiny(model_type))
            plan = make_plan(checkpoint)
            out = tmp_path_factory.mktemp(f"uneven-{model_type}") / "out"
            apply_plan(checkpoint, plan, out)
            done[model_type] = out, plan
        return done[model_type]

    return get


Made = Callable[[str], tuple[Path, Plan]]


@uneven
def test_uneven_is_the_masked_original(model_type: str, tiny: Tiny, made: Made) -> None:
    """``load`` opens it, each layer with its own number, and it computes the masked original."""
    path, plan = made(model_type)
    counts = {index: len(ids) for index, ids in keeps(plan).items()}
    assert len(counts) == 1 or len(set(counts.values())) > 1
    model = aligned(runtime.load(path))
    for name, experts in experts_modules(model).items():
        assert experts.num_experts == experts.down_proj.shape[0] == counts[layer_of(name)]
    expected = reference(tiny(model_type), keeps(plan))
    # not bit for bit: a top-k that does not sort returns another order among 5 than among 8
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-6)


@uneven
def test_the_walk_computes_what_load_does(model_type: str, made: Made) -> None:
    path, plan = made(model_type)
    model, tokens = LayeredModel(Checkpoint.open(path)), token_ids(2, 24)
    found: dict[int, torch.Tensor] = {}
    assert {i: site.shape.experts for i, site in model.sites.items()} == {
        index: len(ids) for index, ids in keeps(plan).items()
    }
    batch = Batch(tokens, torch.arange(tokens.numel()).view_as(tokens))
    with Walk(model, [batch], workers=1) as walk:
        walk.layers()
        walk.logits(lambda index, value: found.update({index: value}))
    torch.testing.assert_close(found[0], logits(runtime.load(path)), rtol=0, atol=0)


@uneven
def test_saving_again_changes_no_tensor(model_type: str, made: Made, tmp_path: Path) -> None:
    path, _ = made(model_type)
    runtime.load(path).save_pretrained(tmp_path / "again")
    assert tensor_digests(tmp_path / "again") == tensor_digests(path)


# A process of its own in which importing moeprune fails: everything comes from the checkpoint.
STRANGER = """
import json, sys
sys.modules["moeprune"] = None
import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
torch.set_num_threads(1)
failed = {}
for name, (source, expected) in json.load(open(sys.argv[1])).items():
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
        )
        tokens, logits = torch.load(expected)
        with torch.no_grad():
            found = model.eval()(tokens, use_cache=False).logits
        if any(info.values()) or not torch.allclose(found, logits, rtol=0, atol=1e-5):
            failed[name] = f"{info}, differs by {(found - logits).abs().max():.1e}"
        model.generate(tokens[:1, :4], max_new_tokens=3, do_sample=False)
    except Exception as error:
        failed[name] = repr(error)[:300]
print(json.dumps(failed))
"""


def test_opens_without_moeprune(made: Made, tmp_path: Path) -> None:
    """Stock transformers with ``trust_remote_code`` computes the same, for every family."""
    jobs = {}
    for name in UNEVEN:
        path, _ = made(name)
        tokens = token_ids(2, 24)
        torch.save((tokens, logits(runtime.load(path), tokens)), tmp_path / f"{name}.pt")
        jobs[name] = (str(path), str(tmp_path / f"{name}.pt"))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "jobs.json")],
        check=True,
        cwd=tmp_path,
        env={**os.environ, **offline, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {}


@uneven
def test_fails_loudly_in_stock_classes(model_type: str, made: Made) -> None:
    path, plan = made(model_type)
    if len({len(ids) for ids in keeps(plan).values()}) == 1:
        pytest.skip("its tiny model has one MoE layer: nothing is uneven")
    with pytest.raises((RuntimeError, ValueError), match=r"mismatch|size|heterogeneous"):
        AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)


@pytest.mark.parametrize("model_type", sorted(quirks.UNEVEN_REFUSED))
def test_refuses_by_name_and_reason(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny(model_type))
    with pytest.raises(PlanError, match=model_type) as caught:
        apply_plan(checkpoint, make_plan(checkpoint), tmp_path / "out")
    assert quirks.UNEVEN_REFUSED[model_type] in caught.value.problem
    assert not list(tmp_path.iterdir())


def test_config_says_the_largest_and_the_others(tiny: Tiny, made: Made) -> None:
    path, plan = made("qwen3_moe")
    config = json.loads((path / "config.json").read_text())
    stock = json.loads((tiny("qwen3_moe") / "config.json").read_text())
    assert [len(ids) for ids in keeps(plan).values()] == [7, 6, 5, 8]
    assert config == {
        **stock,
        "architectures": ["UnevenQwen3MoeForCausalLM"],
        "num_local_experts": 8,
        "per_layer_config": {
            "0": {"num_local_experts": 7},
            "1": {"num_local_experts": 6},
            "2": {"num_local_experts": 5},
        },
        "allow_global_per_layer_attribute_access": True,
        "auto_map": {"AutoModelForCausalLM": "modeling_moeprune.UnevenQwen3MoeForCausalLM"},
    }
    assert (path / UNEVEN_FILE).is_file()


def test_vendors_spelling_of_the_number(tiny: Tiny, tmp_path: Path) -> None:
    """``num_experts`` in config.json is another name of what transformers calls differently."""
    (tmp_path / "a").mkdir()
    for file in tiny("qwen3_moe").iterdir():
        (tmp_path / "a" / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "a/config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(tmp_path / "a")
    plan = make_plan(checkpoint)
    apply_plan(checkpoint, plan, tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["num_experts"] == 8 and "num_local_experts" not in written
    model = aligned(runtime.load(tmp_path / "out"))
    expected = reference(tmp_path / "a", keeps(plan))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_uneven_can_be_pruned_again(
    model_type: str, made: Made, tiny: Tiny, tmp_path: Path
) -> None:
    """To equal numbers: then stock classes open it, and nothing of ours is left in it."""
    path, plan = made(model_type)
    checkpoint = Checkpoint.open(path)
    shapes = {index: site.shape for index, site in LayeredModel(checkpoint).sites.items()}
    second = {i: tuple(range(s.experts - 4, s.experts)) for i, s in shapes.items()}
    layers = [LayerPlan(i, shapes[i].experts, ids) for i, ids in second.items()]
    apply_plan(checkpoint, plan_for(checkpoint, layers), tmp_path / "out")
    assert not [file for file in CODE_FILES if (tmp_path / "out" / file).exists()]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert not {"auto_map", "per_layer_config"} & set(config)
    first = keeps(plan)
    both = {index: tuple(first[index][e] for e in ids) for index, ids in second.items()}
    expected = reference(tiny(model_type), both)
    torch.testing.assert_close(logits(open_stock(tmp_path / "out")), expected, rtol=0, atol=0)


def test_identity_keeps_an_uneven_checkpoint_uneven(made: Made, tmp_path: Path) -> None:
    path, _ = made("mixtral")
    checkpoint = Checkpoint.open(path)
    apply_plan(checkpoint, plan_for(checkpoint, []), tmp_path / "out")
    assert tensor_digests(tmp_path / "out") == tensor_digests(path)
    for file in ("config.json", MODELING_FILE, UNEVEN_FILE):
        assert (tmp_path / "out" / file).read_bytes() == (path / file).read_bytes()


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "gemma4"])
def test_uneven_with_a_tower(model_type: str, tmp_path: Path) -> None:
    """The numbers stand in the language model's part; every auto class opens the result."""
    source = save_tower(model_type, tmp_path / "a")
    checkpoint = Checkpoint.open(source)
    plan = make_plan(checkpoint)
    apply_plan(checkpoint, plan, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {"per_layer_config", "experts_per_layer"} & set(config["text_config"])
    assert not {"per_layer_config", "experts_per_layer"} & set(config)
    assert "AutoModelForImageTextToText" in config["auto_map"]
    tokens = token_ids(2, 24, vocab=118)
    original = aligned(AutoModelForMultimodalLM.from_pretrained(source, dtype=torch.float32))
    with experts_masked(original, keeps(plan)):
        expected = logits(original, tokens)
    found = logits(aligned(runtime.load(tmp_path / "out")), tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_constants_need_equal_layers(made: Made, tmp_path: Path) -> None:
    path, _ = made("mixtral")
    checkpoint = Checkpoint.open(path)
    shape = LayeredModel(checkpoint).sites[2].shape
    keep, gone = tuple(range(shape.experts - 1)), (shape.experts - 1,)
    layer = LayerPlan(2, shape.experts, keep, gone, novices_NH=torch.zeros(1, shape.hidden))
    with pytest.raises(UnsupportedModelError, match="different numbers of experts"):
        apply_plan(checkpoint, plan_for(checkpoint, [layer]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---- padding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", sorted(quirks.PADDABLE))
def test_pads_are_never_chosen(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    """Stock classes open the padded checkpoint; no other expert's weight changes."""
    checkpoint = Checkpoint.open(tiny(model_type))
    plan = make_plan(checkpoint)
    apply_plan(checkpoint, plan, tmp_path / "out", writing=Writing(pad=True))
    widest = max(len(ids) for ids in keeps(plan).values())
    padded = open_stock(tmp_path / "out")
    for experts in experts_modules(padded).values():
        assert experts.down_proj.shape[0] == widest
    expected = reference(checkpoint.path, keeps(plan))
    torch.testing.assert_close(logits(padded), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("model_type", sorted(set(EDITABLE) - quirks.PADDABLE))
def test_padding_is_refused_where_it_is_not_exact(
    model_type: str, tiny: Tiny, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(tiny(model_type))
    plan = make_plan(checkpoint)
    if len({len(ids) for ids in keeps(plan).values()}) == 1:
        pytest.skip("its tiny model has one MoE layer: nothing is uneven")
    with pytest.raises(PlanError, match=f"not exact for {model_type}"):
        apply_plan(checkpoint, plan, tmp_path / "out", writing=Writing(pad=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss"])
def test_padding_in_half_precision(
    model_type: str, dtype: torch.dtype, tiny: Tiny, tmp_path: Path
) -> None:
    load_tiny(tiny(model_type)).to(dtype).save_pretrained(tmp_path / "a")
    checkpoint = Checkpoint.open(tmp_path / "a")
    plan = make_plan(checkpoint)
    apply_plan(checkpoint, plan, tmp_path / "out", writing=Writing(pad=True))
    expected = reference(tmp_path / "a", keeps(plan))
    padded = open_stock(tmp_path / "out")
    assert torch.isfinite(logits(padded)).all()
    torch.testing.assert_close(logits(padded), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss"])
def test_padding_and_masks_together(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny(model_type))

    def mask(layer: LayerPlan) -> LayerPlan:
        return replace(layer, mask=MaskEdit(0.5, None))

    plan = make_plan(checkpoint, mask)
    uneven_sizes = apply_plan(checkpoint, plan, tmp_path / "uneven")
    padded_sizes = apply_plan(checkpoint, plan, tmp_path / "padded", writing=Writing(pad=True))
    pruned = uneven_sizes.parameters[1] - uneven_sizes.nonzero[1]
    assert pruned == padded_sizes.parameters[1] - padded_sizes.nonzero[1] > 0
    expected = logits(runtime.load(tmp_path / "uneven"))
    torch.testing.assert_close(logits(open_stock(tmp_path / "padded")), expected, rtol=0, atol=2e-5)


def test_padding_an_uneven_checkpoint_that_nothing_is_asked_of(
    tiny: Tiny, made: Made, tmp_path: Path
) -> None:
    """Layers that a plan leaves out are padded too."""
    path, plan = made("deepseek_v3")
    checkpoint = Checkpoint.open(path)
    apply_plan(checkpoint, plan_for(checkpoint, []), tmp_path / "out", writing=Writing(pad=True))
    expected = reference(tiny("deepseek_v3"), keeps(plan))
    torch.testing.assert_close(logits(open_stock(tmp_path / "out")), expected, rtol=0, atol=2e-5)


def test_a_head_is_padded_as_the_layer_that_it_follows(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("deepseek_v3")
    attach(source, tmp_path / "a", head_of(source, "model.layers.4."))
    checkpoint = Checkpoint.open(tmp_path / "a")
    plan = plan_for(checkpoint, [LayerPlan(3, 8, (0, 2, 3, 4, 5, 6))])  # the last; others keep all
    apply_plan(checkpoint, plan, tmp_path / "out", writing=Writing(pad=True))
    out = Checkpoint.open(tmp_path / "out")
    bias = out.read("model.layers.4.mlp.gate.e_score_correction_bias")
    assert [e for e in range(8) if bias[e] < -1e8] == [3, 7]  # one at the end of each group
    for expert, old in enumerate((0, 2, 3, None, 4, 5, 6, None)):
        found = out.read(f"model.layers.4.mlp.experts.{expert}.up_proj.weight")
        if old is None:
            assert not found.any()
        else:
            key = f"model.layers.4.mlp.experts.{old}.up_proj.weight"
            assert torch.equal(found, checkpoint.read(key))


def test_layout_of_an_uneven_checkpoint_is_understood(made: Made) -> None:
    for model_type in ("mixtral", "granitemoe", "nemotron_h"):
        path, plan = made(model_type)
        layout = expert_layout(LayeredModel(Checkpoint.open(path)))
        assert {tensor.layer for tensor in layout.values()} == set(plan.layers)


def test_generated_code_names_what_to_resize(made: Made) -> None:
    """Nothing is guessed when it opens, and nothing of the package is needed."""
    path, _ = made("deepseek_v3")
    code = (path / MODELING_FILE).read_text()
    assert "'mlp.gate.weight': 0" in code and "'mlp.gate.e_score_correction_bias': 0" in code
    assert not re.search(r"(?m)^(from|import) moeprune", code)
