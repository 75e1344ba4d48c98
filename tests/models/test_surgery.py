"""Edits on disk, compared with the original model changed from outside, over every family."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from families import experts_modules, load_tiny, moe_model_types, save_tiny, tiny_model
from moeprune.core.plan import LayerPlan, MaskEdit, Plan
from moeprune.core.shapes import LayerShape
from moeprune.errors import CheckpointError, OutputError, PlanError, UnsupportedModelError
from moeprune.models import quirks, surgery, writer
from moeprune.models.checkpoint import INDEX, Checkpoint
from moeprune.models.checks import check_plan
from moeprune.models.layout import DiskExperts, expert_layout
from moeprune.models.loading import LayeredModel
from moeprune.models.memory_edits import edit_in_memory
from moeprune.models.surgery import PLAN_COPY, PROVENANCE, apply_plan
from support import (
    expert_count,
    experts_masked,
    generator,
    layer_of,
    logits,
    matrices,
    open_stock,
    plan_for,
    redirected,
    some_experts,
    tensor_digests,
    tree,
    without,
)

Tiny = Callable[[str], Path]

REFUSED = {name: why for name, why in quirks.REFUSED.items() if name in moe_model_types()}
"""Families whose experts are not edited, with what the user is told."""

EDITABLE = [name for name in moe_model_types() if name not in REFUSED]

editable = pytest.mark.parametrize("model_type", EDITABLE)


@dataclass(frozen=True)
class Case:
    """A checkpoint with its skeleton."""

    checkpoint: Checkpoint
    model: LayeredModel

    @property
    def shapes(self) -> list[LayerShape]:
        return [site.shape for _, site in sorted(self.model.sites.items())]

    def plan(self, make: Callable[[LayerShape], LayerPlan]) -> Plan:
        return plan_for(self.checkpoint, [make(shape) for shape in self.shapes])


def case(directory: Path) -> Case:
    checkpoint = Checkpoint.open(directory)
    return Case(checkpoint, LayeredModel(checkpoint))


def drop(shape: LayerShape, per_group: int | None = None) -> LayerPlan:
    """Delete one expert of every group or, without groups, two: others in every layer."""
    number = per_group or (1 if shape.groups > 1 else 2)
    return LayerPlan(
        shape.layer, shape.experts, without(shape, some_experts(shape, number, seed=1))
    )


def identity(shape: LayerShape) -> LayerPlan:
    return LayerPlan(shape.layer, shape.experts, tuple(range(shape.experts)))


def masked(shape: LayerShape, ratio: float | None, pattern: tuple[int, int] | None) -> LayerPlan:
    """Zero weights in all experts, by scales that differ between experts and columns."""
    random = generator(7, shape.layer)
    scale_in = torch.rand(shape.experts, shape.hidden, generator=random) + 0.1
    scale_mid = torch.rand(shape.experts, shape.intermediate, generator=random) + 0.1
    mask = MaskEdit(ratio, pattern, shape.roles, scale_in, scale_mid)
    return replace(identity(shape), mask=mask)


# ---- uniform deletion ----------------------------------------------------------------------------


@editable
def test_deletion_is_the_masked_original(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    """Opens with transformers alone, and computes what the original does with masked routers."""
    source = case(tiny(model_type))
    plan = source.plan(drop)
    sizes = apply_plan(source.checkpoint, plan, tmp_path / "out")
    pruned, original = open_stock(tmp_path / "out"), load_tiny(source.checkpoint.path)
    keep = {index: layer.keep for index, layer in plan.layers.items()}
    assert len(set(keep.values())) > 1, "the layers should lose different experts"
    for name, experts in experts_modules(pruned).items():
        assert expert_count(experts) == len(keep[layer_of(name)])
    before = logits(original)
    with experts_masked(original, keep):
        expected = logits(original)
    assert not torch.allclose(before, expected, atol=1e-3), "the mask should change something"
    torch.testing.assert_close(logits(pruned), expected, rtol=0, atol=0)
    after = Checkpoint.open(tmp_path / "out")
    assert sizes.parameters == (source.checkpoint.numel, after.numel)
    assert sizes.nonzero == sizes.parameters
    assert sizes.bytes == (source.checkpoint.nbytes, after.nbytes)
    assert sizes.experts == (
        sum(shape.experts for shape in source.shapes),
        sum(len(ids) for ids in keep.values()),
    )


@editable
def test_deletion_copies_everything_else(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    """Tensors that belong to no expert have the same bytes, those of kept experts a new number."""
    source = case(tiny(model_type))
    plan = source.plan(drop)
    apply_plan(source.checkpoint, plan, tmp_path / "out")
    layout = expert_layout(source.model)
    before, after = tensor_digests(source.checkpoint.path), tensor_digests(tmp_path / "out")
    expected, sliced = {}, set()
    for name, digest in before.items():
        tensor = layout.get(name)
        if tensor is None:
            expected[name] = digest
        elif tensor.expert is None:
            sliced.add(name)
        elif tensor.expert not in (gone := plan.layers[tensor.layer].dropped):
            # longcat: identity experts have the ids after the last one, and matrices
            number = [e for e in range(tensor.expert + 1) if e not in gone].index(tensor.expert)
            expected[re.sub(r"(?<=experts\.)\d+", str(number), name)] = digest
    assert {name: after[name] for name in after if name not in sliced} == expected
    assert sliced, "every family has router rows at least"
    for name in sliced:
        tensor, ids = layout[name], list(plan.layers[layout[name].layer].keep)
        whole = source.checkpoint.read(name)
        kept = Checkpoint(tmp_path / "out").read(name)
        if tensor.role == "table":
            rows = [[ids.index(e) for e in row] for row in redirected(whole.tolist(), ids)]
            assert torch.equal(kept, torch.tensor(rows))
            continue
        if tensor.rows > 1:  # dbrx
            whole, kept = whole.view(8, -1, 32), kept.view(6, -1, 32)
        ids += range(plan.layers[tensor.layer].experts, whole.shape[tensor.dim])
        assert torch.equal(kept, whole.index_select(tensor.dim, torch.tensor(ids))), name


def test_all_families_but_two_are_edited(tiny: Tiny) -> None:
    """The layout of each is understood; that the result is right is asserted one by one above."""
    assert set(REFUSED) == {"doge", "jetmoe"}
    assert len(EDITABLE) >= 55
    for model_type in EDITABLE:
        source = case(tiny(model_type))
        layers = {tensor.layer for tensor in expert_layout(source.model).values()}
        assert layers == set(source.model.sites), model_type


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_refuses_by_name_and_reason(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny(model_type))
    with pytest.raises(UnsupportedModelError) as caught:
        apply_plan(checkpoint, plan_for(checkpoint, []), tmp_path / "out")
    assert model_type in caught.value.problem
    assert REFUSED[model_type] in caught.value.problem
    assert not list(tmp_path.iterdir())


def test_refuses_a_dense_model(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    checkpoint = Checkpoint.open(tmp_path / "dense")
    with pytest.raises(UnsupportedModelError, match="dense model"):
        apply_plan(checkpoint, plan_for(checkpoint, []), tmp_path / "out")


# ---- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "pattern"), [(0.5, None), (None, (2, 4))], ids=["half", "2-of-4"]
)
@editable
def test_masks(
    model_type: str,
    ratio: float | None,
    pattern: tuple[int, int] | None,
    tiny: Tiny,
    tmp_path: Path,
) -> None:
    """Exact zeros per row of the reloaded matrices, the lowest scores first, the rest unchanged."""
    source = case(tiny(model_type))
    plan = source.plan(lambda shape: masked(shape, ratio, pattern))
    sizes = apply_plan(source.checkpoint, plan, tmp_path / "out")
    zeros = 0
    original = experts_modules(load_tiny(source.checkpoint.path))
    for name, experts in experts_modules(open_stock(tmp_path / "out")).items():
        mask = plan.layers[layer_of(name)].mask
        assert mask is not None
        for expert in range(expert_count(experts)):
            before = matrices(original[name], expert)
            for role, after in matrices(experts, expert).items():
                scale = mask.scale(role, expert)
                zeros += _check_mask(before[role], after, scale, ratio, pattern)
    assert sizes.nonzero == (source.checkpoint.numel, source.checkpoint.numel - zeros)
    assert sizes.parameters == (source.checkpoint.numel,) * 2
    untouched = {
        name
        for name, tensor in expert_layout(source.model).items()
        if tensor.role in ("router", "other")
    } | (set(source.checkpoint.tensors) - set(expert_layout(source.model)))
    old, new = tensor_digests(source.checkpoint.path), tensor_digests(tmp_path / "out")
    assert set(old) == set(new)
    assert all(old[name] == new[name] for name in untouched)


def _check_mask(
    before: Tensor,
    after: Tensor,
    scale: Tensor | None,
    ratio: float | None,
    pattern: tuple[int, int] | None,
) -> int:
    """One matrix [outputs, inputs]; returns its number of zeros."""
    assert scale is not None
    width = before.shape[1] if pattern is None else pattern[1]
    number = int(width * ratio) if ratio is not None else pattern[0]  # type: ignore[index]
    gone = (after == 0).reshape(-1, width)
    assert (gone.sum(dim=1) == number).all()
    kept = after != 0
    assert torch.equal(after[kept], before[kept])
    assert not after[~kept].signbit().any()
    score = (before.abs() * scale).reshape(-1, width)
    highest_gone = score.masked_fill(~gone, -1).amax(dim=1)
    lowest_kept = score.masked_fill(gone, torch.inf).amin(dim=1)
    assert (highest_gone <= lowest_kept).all()
    return int(gone.sum())


@editable
def test_mask_in_memory_is_the_mask_on_disk(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    source = case(tiny(model_type))
    plan = source.plan(lambda shape: masked(shape, 0.5, None))
    apply_plan(source.checkpoint, plan, tmp_path / "out")
    on_disk = experts_modules(open_stock(tmp_path / "out"))
    before = tree(source.checkpoint.path)
    for index, site in source.model.sites.items():
        source.model.load_layer(index)
        edit_in_memory(source.model, site, plan.layers[index])
        for name, parameter in site.experts.named_parameters():
            expected = on_disk[site.experts_name].get_parameter(name)
            assert torch.equal(parameter, expected), (index, name)
        source.model.free_layer(index)
    assert tree(source.checkpoint.path) == before, "the loaded tensors are the mapped file itself"


def test_masked_weights_that_are_not_finite_become_zero(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    with torch.no_grad():
        for experts in experts_modules(model).values():
            experts.down_proj[:, :, 5] = torch.nan
    model.save_pretrained(tmp_path / "a")
    source = case(tmp_path / "a")
    plan = source.plan(lambda s: replace(identity(s), mask=MaskEdit(0.25, None)))
    apply_plan(source.checkpoint, plan, tmp_path / "out")
    for experts in experts_modules(open_stock(tmp_path / "out")).values():
        assert (experts.down_proj[:, :, 5] == 0).all()


def test_mask_of_one_role_only(tiny: Tiny, tmp_path: Path) -> None:
    source = case(tiny("mixtral"))
    plan = source.plan(lambda s: replace(identity(s), mask=MaskEdit(0.25, None, ("down",))))
    apply_plan(source.checkpoint, plan, tmp_path / "out")
    original = experts_modules(load_tiny(source.checkpoint.path))
    for name, experts in experts_modules(open_stock(tmp_path / "out")).items():
        before, after = matrices(original[name], 3), matrices(experts, 3)
        assert torch.equal(before["gate"], after["gate"])
        assert torch.equal(before["up"], after["up"])
        _check_mask(before["down"], after["down"], torch.ones(48), 0.25, None)


def test_half_of_a_fused_matrix_is_not_masked(tiny: Tiny, tmp_path: Path) -> None:
    source = case(tiny("gpt_oss"))
    plan = source.plan(lambda s: replace(identity(s), mask=MaskEdit(0.5, None, ("up",))))
    with pytest.raises(PlanError, match="gate and up"):
        apply_plan(source.checkpoint, plan, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_mask_and_deletion_together(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    """Deleting first and masking the rest, or both at once, is the same."""
    source = case(tiny(model_type))

    def both(shape: LayerShape) -> LayerPlan:
        return replace(drop(shape), mask=masked(shape, 0.5, None).mask)

    apply_plan(source.checkpoint, source.plan(both), tmp_path / "both")
    apply_plan(source.checkpoint, source.plan(lambda s: masked(s, 0.5, None)), tmp_path / "masked")
    middle = case(tmp_path / "masked")
    apply_plan(middle.checkpoint, middle.plan(drop), tmp_path / "after")
    assert tensor_digests(tmp_path / "both") == tensor_digests(tmp_path / "after")


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_bfloat16_stays_bfloat16(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    source = case(tmp_path / "half")
    apply_plan(source.checkpoint, source.plan(lambda s: masked(s, 0.5, None)), tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
    site = next(iter(source.model.sites.values()))
    before = DiskExperts(source.checkpoint, expert_layout(source.model), site).matrix(2, "down")
    after = DiskExperts(checkpoint, expert_layout(LayeredModel(checkpoint)), site).matrix(2, "down")
    mask = masked(site.shape, 0.5, None).mask
    assert mask is not None
    _check_mask(before, after, mask.scale("down", 2), 0.5, None)


def test_weights_in_eight_bits_are_not_masked(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "a").mkdir()
    for file in tiny("mixtral").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "a" / file.name).write_bytes(file.read_bytes())
            continue
        tensors = load_file(file)
        for name in tensors:
            if "experts" in name:
                tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        save_file(tensors, tmp_path / "a" / file.name, metadata={"format": "pt"})
    source = case(tmp_path / "a")
    with pytest.raises(UnsupportedModelError, match="F8_E4M3"):
        apply_plan(source.checkpoint, source.plan(lambda s: masked(s, 0.5, None)), tmp_path / "b")
    apply_plan(source.checkpoint, source.plan(drop), tmp_path / "b")  # bytes are bytes
    dtypes = {info.dtype for info in Checkpoint.open(tmp_path / "b").tensors.values()}
    assert dtypes == {"F32", "F8_E4M3"}


# ---- matrices ------------------------------------------------------------------------------------


@editable
def test_disk_matrices_are_the_loaded_ones(model_type: str, tiny: Tiny) -> None:
    source = case(tiny(model_type))
    layout = expert_layout(source.model)
    loaded = experts_modules(load_tiny(source.checkpoint.path))
    assert set(loaded) == {site.experts_name for site in source.model.sites.values()}
    for site in source.model.sites.values():
        disk = DiskExperts(source.checkpoint, layout, site)
        for expert in (0, 5):
            expected = matrices(loaded[site.experts_name], expert)
            assert set(expected) == set(site.shape.roles)
            for role, matrix in expected.items():
                found = disk.matrix(expert, role)
                assert found.dtype == torch.float32 and found.is_contiguous()
                assert torch.equal(found, matrix), (site.shape.layer, expert, role)
                inputs = site.shape.intermediate if role == "down" else site.shape.hidden
                assert found.shape[1] == inputs


# ---- files ---------------------------------------------------------------------------------------


@editable
def test_identity_changes_no_tensor(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    source = case(tiny(model_type))
    apply_plan(source.checkpoint, source.plan(identity), tmp_path / "out")
    assert tensor_digests(tmp_path / "out") == tensor_digests(source.checkpoint.path)
    assert json.loads((tmp_path / "out/config.json").read_text()) == source.checkpoint.config
    empty = plan_for(source.checkpoint, [])
    apply_plan(source.checkpoint, empty, tmp_path / "empty")
    assert tensor_digests(tmp_path / "empty") == tensor_digests(source.checkpoint.path)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_shards(
    model_type: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 20_000
    seen: list[tuple[int, int]] = []
    source = case(tiny(model_type))
    plan = source.plan(drop)
    apply_plan(source.checkpoint, plan, tmp_path / "one")
    assert [f.name for f in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "one" / INDEX).exists()

    def in_small_shards(directory: Path, pieces: Any, progress: Any) -> None:
        writer.write_shards(directory, pieces, max_shard=limit, progress=progress)

    monkeypatch.setattr(surgery, "write_shards", in_small_shards)
    apply_plan(source.checkpoint, plan, tmp_path / "many", progress=lambda *step: seen.append(step))
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    names = set()
    for file in files:
        with safe_open(file, "pt") as handle:
            size = sum(handle.get_tensor(name).nbytes for name in handle.keys())  # noqa: SIM118
            assert size <= limit or len(handle.keys()) == 1
            assert {index["weight_map"][name] for name in handle.keys()} == {file.name}  # noqa: SIM118
            names |= set(handle.keys())
    assert names == set(index["weight_map"])
    checkpoint = Checkpoint.open(tmp_path / "many")
    assert index["metadata"]["total_size"] == checkpoint.nbytes
    assert tensor_digests(tmp_path / "many") == tensor_digests(tmp_path / "one")
    torch.testing.assert_close(
        logits(open_stock(tmp_path / "many")), logits(open_stock(tmp_path / "one")), rtol=0, atol=0
    )
    assert seen[-1] == (checkpoint.nbytes, checkpoint.nbytes)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_other_files_and_provenance(tmp_path: Path) -> None:
    directory = save_tiny("mixtral", tmp_path / "a")
    (directory / "tokenizer.json").write_text('{"a": "ü"}')
    (directory / "pytorch_model.bin").write_bytes(b"old weights")
    (directory / PROVENANCE).write_text("{}")
    source = case(directory)
    plan = source.plan(drop)
    apply_plan(source.checkpoint, plan, tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    assert not (out / "pytorch_model.bin").exists()
    assert (out / "generation_config.json").exists()
    assert oct(out.stat().st_mode & 0o777) == "0o755"
    provenance = json.loads((out / PROVENANCE).read_text())
    assert provenance["base_fingerprint"] == source.checkpoint.fingerprint
    assert provenance["experts"] == [32, 24]
    assert json.loads((out / PLAN_COPY).read_text()) == plan.to_json(None)
    config = json.loads((out / "config.json").read_text())
    assert config == {**source.checkpoint.config, "num_local_experts": 6}


def test_existing_output_is_kept_without_force(tiny: Tiny, tmp_path: Path) -> None:
    source = case(tiny("mixtral"))
    out = tmp_path / "out"
    apply_plan(source.checkpoint, source.plan(drop), out)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="output exists"):
        apply_plan(source.checkpoint, source.plan(identity), out)
    assert tree(tmp_path) == before
    apply_plan(source.checkpoint, source.plan(identity), out, force=True)
    assert tensor_digests(out) == tensor_digests(source.checkpoint.path)


# ---- errors --------------------------------------------------------------------------------------


def _layers(plan: Plan, change: Callable[[LayerPlan], LayerPlan], only: Iterable[int]) -> Plan:
    layers = {i: change(p) if i in only else p for i, p in plan.layers.items()}
    return replace(plan, layers=layers)


BAD: Mapping[str, tuple[str, Callable[[Plan], Plan], str]] = {
    "another model": (
        "mixtral",
        lambda p: replace(p, model={"name": "other", "fingerprint": "0" * 64}),
        "made for another model",
    ),
    "no fingerprint": ("mixtral", lambda p: replace(p, model={}), "made for another model"),
    "fewer than top-k": (
        "mixtral",
        lambda p: _layers(p, lambda x: replace(x, keep=(3,)), p.layers),
        "1 experts remain, but 2 are selected",
    ),
    "unbalanced groups": (
        "deepseek_v3",
        lambda p: _layers(p, lambda x: replace(x, keep=(0, 1, 2, 3, 4, 5)), p.layers),
        r"\[4, 2\] experts remain in the 2 routing groups",
    ),
    "one expert per group": (
        "deepseek_v3",
        lambda p: _layers(p, lambda x: replace(x, keep=(0, 4)), p.layers),
        "2 experts remain, its router needs 4",
    ),
    "out of range": (
        "mixtral",
        lambda p: _layers(p, lambda x: replace(x, keep=(0, 1, 2, 3, 4, 8)), p.layers),
        r"expert outside 0\.\.7",
    ),
    "negative": (
        "mixtral",
        lambda p: _layers(p, lambda x: replace(x, keep=(-1, 1, 2, 3, 4, 5)), p.layers),
        r"expert outside 0\.\.7",
    ),
    "twice": (
        "mixtral",
        lambda p: _layers(p, lambda x: replace(x, keep=(0, 1, 1, 3, 4, 5)), p.layers),
        "ascending ids without repetition",
    ),
    "another number of experts": (
        "mixtral",
        lambda p: _layers(p, lambda x: replace(x, experts=16), p.layers),
        "made for 16 experts, found 8",
    ),
    "a dense layer": (
        "deepseek_v3",
        lambda p: replace(p, layers={**p.layers, 0: replace(p.layers[1], layer=0)}),
        "layer 0, which is not an MoE layer",
    ),
    "deleted and replaced": (
        "mixtral",
        lambda p: _layers(
            p,
            lambda x: replace(
                x, keep=x.keep[:-1], replaced=x.keep[-1:], novices_NH=torch.zeros(1, 32)
            ),
            p.layers,
        ),
        "cannot be mixed",
    ),
    "all replaced": (
        "mixtral",
        lambda p: _layers(
            p,
            lambda x: replace(x, keep=(), replaced=tuple(range(8)), novices_NH=torch.zeros(8, 32)),
            [2],
        ),
        "layer 2: all experts are replaced",
    ),
    "no vector": (
        "mixtral",
        lambda p: _layers(
            p, lambda x: replace(x, keep=(0, 1, 2), replaced=(3, 4, 5, 6, 7)), p.layers
        ),
        "novices of shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_plans_write_nothing(name: str, tiny: Tiny, tmp_path: Path) -> None:
    model_type, change, message = BAD[name]
    source = case(tiny(model_type))
    good = source.plan(drop)
    check_plan(source.model, good)
    with pytest.raises(PlanError, match=message):
        apply_plan(source.checkpoint, change(good), tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())


def test_unknown_place_of_the_number_of_experts(tiny: Tiny, tmp_path: Path) -> None:
    for file in tiny("mixtral").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["num_local_experts"]  # 8 is the default of transformers
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = case(tmp_path)
    with pytest.raises(UnsupportedModelError, match="does not say 8 experts"):
        apply_plan(source.checkpoint, source.plan(drop), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("exists", [False, True], ids=["new", "force"])
@pytest.mark.parametrize("blocks", [0, 7], ids=["first", "middle"])
def test_disk_full(
    blocks: int, exists: bool, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was there before is there afterwards, and nothing else."""
    source = case(tiny("mixtral"))
    out = tmp_path / "out"
    if exists:
        apply_plan(source.checkpoint, source.plan(identity), out)
    before = tree(tmp_path)
    written = 0
    read = writer._read

    def full(*args: Any) -> Any:
        nonlocal written
        for block in read(*args):
            if written == blocks:
                raise OSError(errno.ENOSPC, "No space left on device")
            written += 1
            yield block

    monkeypatch.setattr(writer, "_read", full)
    with pytest.raises(OutputError, match="disk full while writing"):
        apply_plan(source.checkpoint, source.plan(drop), out, force=exists)
    assert written == blocks
    assert tree(tmp_path) == before


def test_source_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    directory = save_tiny("mixtral", tmp_path / "a")
    source = case(directory)
    plan = source.plan(drop)
    shard = source.checkpoint.shards[-1]
    _ = source.checkpoint.fingerprint
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="shorter"):
        apply_plan(source.checkpoint, plan, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
