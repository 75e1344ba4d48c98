"""Checkpoints with constant experts, opened with and without the package, over every family."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import experts_modules, load_tiny, moe_model_types, save_tiny, tiny_model, token_ids
from moeprune.core.plan import LayerPlan, MaskEdit, Plan
from moeprune.core.shapes import LayerShape
from moeprune.errors import CheckpointError, UnsupportedModelError
from moeprune.models import quirks, runtime
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.editing import Sizes
from moeprune.models.generated import MODELING_FILE, NOVICE_FILE
from moeprune.models.layout import expert_layout
from moeprune.models.loading import LayeredModel
from moeprune.models.surgery import apply_plan
from moeprune.models.walk import Batch, Walk
from support import (
    aligned,
    generator,
    layer_of,
    logits,
    open_stock,
    outputs_replaced,
    plan_for,
    some_experts,
    tensor_digests,
    without,
)

EDITABLE = [
    name
    for name in moe_model_types()
    if name not in quirks.REFUSED and name not in quirks.NOVICES_REFUSED
]
editable = pytest.mark.parametrize("model_type", EDITABLE)


@dataclass(frozen=True)
class Case:
    """A checkpoint with novices and where it came from."""

    source: Path
    path: Path
    shapes: dict[int, LayerShape]
    plan: Plan
    sizes: Sizes


def with_novices(shape: LayerShape, dtype: torch.dtype = torch.float32) -> LayerPlan:
    """Random constants for two or three experts, others in every layer; often for expert 0."""
    replaced = set(some_experts(shape, 2 if shape.groups == 1 else 1, seed=1)) - {0}
    replaced |= {0} if shape.layer % 2 else {5}
    vectors = torch.randn(len(replaced), shape.hidden, generator=generator(3, shape.layer))
    return LayerPlan(
        layer=shape.layer,
        experts=shape.experts,
        keep=without(shape, tuple(replaced)),
        replaced=tuple(sorted(replaced)),
        novices_NH=vectors.to(dtype).float(),
    )


def make(source: Path, out: Path, make_layer: Callable[[LayerShape], LayerPlan]) -> Case:
    checkpoint = Checkpoint.open(source)
    sites = LayeredModel(checkpoint).sites
    shapes = {index: site.shape for index, site in sites.items()}
    plan = plan_for(checkpoint, [make_layer(shape) for shape in shapes.values()])
    return Case(source, out, shapes, plan, apply_plan(checkpoint, plan, out))


@pytest.fixture(scope="module")
def cases(
    tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Case]:
    """The novice checkpoint of a family; tests must not write into it."""
    made: dict[str, Case] = {}

    def get(model_type: str) -> Case:
        if model_type not in made:
            out = tmp_path_factory.mktemp(f"novices-{model_type}") / "out"
            made[model_type] = make(tiny(model_type), out, with_novices)
        return made[model_type]

    return get


Cases = Callable[[str], Case]


def reference(case: Case) -> torch.Tensor:
    """Logits of the original whose replaced experts answer with their constants."""
    original = load_tiny(case.source)
    original.set_experts_implementation("eager")
    novices = {
        index: dict(zip(layer.replaced, layer.novices_NH, strict=True))
        for index, layer in case.plan.layers.items()
        if layer.novices_NH is not None
    }
    before = logits(original)
    with outputs_replaced(original, novices):
        expected = logits(original)
    assert not torch.allclose(before, expected, atol=1e-2), "the constants should matter"
    return expected


# A process of its own in which importing moeprune fails: everything comes from the checkpoint.
STRANGER = """
import json, sys
sys.modules["moeprune"] = None
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for source, out in json.load(open(sys.argv[1])):
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, trust_remote_code=True, dtype=torch.float32
        ).eval()
        tokens = torch.load(sys.argv[2])
        with torch.no_grad():
            torch.save(model(tokens, use_cache=False).logits, out)
    except Exception as error:
        open(out + ".error", "w").write(repr(error))
assert not [name for name in sys.modules if name.startswith("moeprune.")]
"""


def run_stranger(pairs: list[tuple[Path, Path]], folder: Path) -> None:
    """Write the logits of each checkpoint to a file, or an error beside it."""
    jobs, tokens = folder / "jobs.json", folder / "tokens.pt"
    jobs.write_text(json.dumps([[str(source), str(out)] for source, out in pairs]))
    torch.save(token_ids(2, 24), tokens)
    offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    subprocess.run(
        [sys.executable, "-c", STRANGER, str(jobs), str(tokens)],
        check=True,
        cwd=folder,
        env={**os.environ, **offline, "PYTHONPATH": ""},
        capture_output=True,
    )


def test_opens_without_moeprune(cases: Cases, tmp_path: Path) -> None:
    """Stock transformers with ``trust_remote_code`` computes the same, for every family."""
    pairs = [(cases(name).path, tmp_path / f"{name}.pt") for name in EDITABLE]
    run_stranger(pairs, tmp_path)
    failed = {}
    for name, (_, file) in zip(EDITABLE, pairs, strict=True):
        error = file.with_name(file.name + ".error")
        if error.exists():
            failed[name] = error.read_text()
        else:  # another process may round differently
            found, expected = torch.load(file), logits(runtime.load(cases(name).path))
            if not torch.allclose(found, expected, rtol=0, atol=1e-5):
                failed[name] = f"logits differ by {(found - expected).abs().max():.1e}"
    assert not failed


@editable
def test_replaced_outputs_are_constants(model_type: str, cases: Cases) -> None:
    """What ``load`` opens computes what the original does with constant outputs, in all kernels."""
    case = cases(model_type)
    model = runtime.load(case.path)
    assert not model.training
    expected = reference(case)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        assert {
            module.config._experts_implementation for module in experts_modules(model).values()
        } == {implementation}
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5)


@editable
def test_saves_what_it_loaded(model_type: str, cases: Cases, tmp_path: Path) -> None:
    case = cases(model_type)
    runtime.load(case.path).save_pretrained(tmp_path / "again")
    before, after = tensor_digests(case.path), tensor_digests(tmp_path / "again")
    assert after == before
    novices = [name for name in before if "approx_value" in name or "novice_value" in name]
    layout = expert_layout(LayeredModel(Checkpoint.open(case.source)))
    if any(tensor.expert is not None for tensor in layout.values()):
        kept = {tensor.renamed(0).rpartition("experts.0.")[0] for tensor in layout.values()
                if tensor.expert is not None}  # fmt: skip
        assert set(novices) == {
            f"{prefix}experts.{expert}.approx_value"
            for prefix in kept
            for expert in case.plan.layers[layer_of(prefix)].replaced
        }
    else:
        assert len(novices) == len(case.shapes)
    again = json.loads((tmp_path / "again/config.json").read_text())
    assert again["approximate_experts"] == {
        str(index): list(layer.replaced) for index, layer in case.plan.layers.items()
    }
    for file in (
        MODELING_FILE,
        NOVICE_FILE,
    ):  # transformers copies the code of remote classes only
        (tmp_path / "again" / file).write_bytes((case.path / file).read_bytes())
    opened = runtime.load(tmp_path / "again")
    assert torch.equal(logits(aligned(opened)), logits(aligned(runtime.load(case.path))))


@editable
def test_novices_take_no_weights(model_type: str, cases: Cases) -> None:
    """A novice costs H values, and saves its expert's matrices and biases."""
    case = cases(model_type)
    model = runtime.load(case.path)
    saved = 0
    for name, experts in experts_modules(model).items():
        layer, shape = case.plan.layers[layer_of(name)], case.shapes[layer_of(name)]
        kept, replaced = len(layer.keep), len(layer.replaced)
        sizes = {key: len(p) for key, p in experts.named_parameters(recurse=False)}
        assert sizes.pop("novice_value") == replaced
        assert set(sizes.values()) == {kept}
        assert torch.equal(experts.novice_value, layer.novices_NH)
        inner = (2 if "gate" in shape.roles else 1) * shape.intermediate
        biases = inner + shape.hidden if experts.has_bias else 0
        matrices = len(shape.roles) * shape.hidden * shape.intermediate
        saved += replaced * (matrices + biases - shape.hidden)
    before, after = Checkpoint.open(case.source), Checkpoint.open(case.path)
    assert before.numel - after.numel == saved > 0
    assert case.sizes.parameters == (before.numel, after.numel)
    assert case.sizes.experts[0] - case.sizes.experts[1] == sum(
        len(layer.replaced) for layer in case.plan.layers.values()
    )
    assert load_tiny(case.source).num_parameters() - model.num_parameters() == saved


@editable
def test_walk_computes_what_load_does(model_type: str, cases: Cases) -> None:
    case = cases(model_type)
    tokens, found = token_ids(2, 24), {}
    batch = Batch(tokens, torch.arange(tokens.numel()).view_as(tokens))
    with Walk(LayeredModel(Checkpoint.open(case.path)), [batch], workers=1) as walk:
        walk.layers()
        walk.logits(lambda index, value: found.update({index: value}))
    torch.testing.assert_close(found[0], logits(runtime.load(case.path)), rtol=0, atol=0)


@editable
def test_fails_loudly_without_remote_code(model_type: str, cases: Cases) -> None:
    with pytest.raises((RuntimeError, ValueError), match=r"mismatch|novice|size"):
        AutoModelForCausalLM.from_pretrained(cases(model_type).path, trust_remote_code=False)


@pytest.mark.parametrize("model_type", ["mixtral", "dots3_note_text", "axk1", "inkling2_text"])
def test_stock_models_are_unharmed(model_type: str, cases: Cases, tmp_path: Path) -> None:
    """Opening a novice checkpoint changes nothing for stock models in the same process."""
    case = cases(model_type)
    runtime.load(case.path)
    runtime.load(case.path)
    stock = open_stock(case.source)
    assert torch.equal(logits(stock), logits(aligned(tiny_model(model_type))))
    stock.save_pretrained(tmp_path)
    assert tensor_digests(tmp_path) == tensor_digests(case.source)


def test_some_layers_only(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """A layer without novices keeps its native experts."""

    def every_second(shape: LayerShape) -> LayerPlan:
        if shape.layer % 2:
            return with_novices(shape)
        return LayerPlan(shape.layer, shape.experts, tuple(range(shape.experts)))

    case = make(tiny("mixtral"), tmp_path / "out", every_second)
    model = runtime.load(case.path)
    names = [type(experts).__name__ for experts in experts_modules(model).values()]
    assert names == ["MixtralExperts", "NoviceMixtralExperts"] * 2
    torch.testing.assert_close(logits(model), reference(case), rtol=0, atol=2e-5)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_novices_and_masks_together(
    model_type: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    def both(shape: LayerShape) -> LayerPlan:
        return replace(with_novices(shape), mask=MaskEdit(0.5, None, shape.roles))

    def mask_only(shape: LayerShape) -> LayerPlan:
        whole = tuple(range(shape.experts))
        return LayerPlan(shape.layer, shape.experts, whole, mask=MaskEdit(0.5, None, shape.roles))

    case = make(tiny(model_type), tmp_path / "both", both)
    make(tiny(model_type), tmp_path / "masked", mask_only)
    expected = reference(replace(case, source=tmp_path / "masked"))
    torch.testing.assert_close(logits(runtime.load(case.path)), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_bfloat16(model_type: str, tmp_path: Path) -> None:
    tiny_model(model_type).to(torch.bfloat16).save_pretrained(tmp_path / "a")
    case = make(tmp_path / "a", tmp_path / "b", lambda s: with_novices(s, torch.bfloat16))
    assert {info.dtype for info in Checkpoint.open(case.path).tensors.values()} == {"BF16"}
    model = runtime.load(case.path)
    assert model.dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16
    in_float = runtime.load(case.path, dtype=torch.float32)
    torch.testing.assert_close(logits(in_float), reference(case), rtol=0, atol=2e-5)


def test_generates_with_a_cache(cases: Cases) -> None:
    """One token at a time, the novices answer as they do for the whole text."""
    model = runtime.load(cases("mixtral").path)
    tokens = token_ids(1, 6)
    out = model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=1)
    last = logits(model, out[:, :-1])[0, 5:].argmax(dim=-1)
    assert torch.equal(out[0, 6:], last)


def test_gradients_reach_the_constants(cases: Cases) -> None:
    """Recovery trains novices like any other weight."""
    case = cases("mixtral")
    model = runtime.load(case.path)
    model(token_ids(2, 24), use_cache=False).logits.square().mean().backward()
    for experts in experts_modules(model).values():
        value: Any = experts.novice_value
        assert value.grad is not None and value.grad.abs().sum() > 0


def test_load_opens_stock_checkpoints_too(tiny: Callable[[str], Path]) -> None:
    model = runtime.load(tiny("mixtral"))
    assert type(model).__name__ == "MixtralForCausalLM"
    assert torch.equal(logits(aligned(model)), logits(load_tiny(tiny("mixtral"))))


def test_load_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        runtime.load(tmp_path)
    directory = save_tiny("mixtral", tmp_path / "a")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "mixtral9"}))
    with pytest.raises(UnsupportedModelError, match="mixtral9"):
        runtime.load(directory)


@pytest.mark.parametrize("model_type", quirks.NOVICES_REFUSED)
def test_experts_that_cannot_be_replaced(
    model_type: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        make(tiny(model_type), tmp_path / "out", with_novices)
    assert quirks.NOVICES_REFUSED[model_type] in caught.value.problem
    assert not list(tmp_path.iterdir())


def test_a_novice_checkpoint_is_not_edited_again(cases: Cases, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(cases("mixtral").path)
    with pytest.raises(UnsupportedModelError, match="constants already"):
        apply_plan(checkpoint, plan_for(checkpoint, []), tmp_path / "out")
    assert not list(tmp_path.iterdir())
