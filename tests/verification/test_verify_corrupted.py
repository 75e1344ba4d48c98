"""Every kind of damage is found by the rule that is about it, one kind a test."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from bases import Base, Tensors, edit_config, edit_json, edit_tensors, in_order
from safetensors.torch import load_file, save_file

import moeprune
from moeprune.files import sha256_bytes
from moeprune.models.checkpoint import INDEX

Change = Callable[[Path], object]
MIXTRAL = "model.layers.{}.block_sparse_moe."


@dataclass(frozen=True)
class Damage:
    """What is done to a clean checkpoint.

    Attributes:
        what: name of the test.
        base: the clean checkpoint.
        rule: the rule that must find it.
        change: does it.
        where: part of the file's and the tensor's name that the finding must give.
        severity: of the finding.
    """

    what: str
    base: str
    rule: str
    change: Change
    where: str
    severity: str = "error"


def shard(directory: Path, number: int = 0) -> Path:
    return sorted(directory.glob("*.safetensors"))[number]


def layers(tensors: Tensors, name: str) -> list[str]:
    return [key for key in tensors if key.endswith(name)]


# --- files


def truncate(directory: Path) -> None:
    file = shard(directory)
    file.write_bytes(file.read_bytes()[:-100])


def index_entry(tensor: str, file: str) -> Change:
    def change(directory: Path) -> None:
        edit_json(directory / INDEX, lambda data: data["weight_map"].update({tensor: file}))

    return change


def total_size(directory: Path) -> None:
    edit_json(directory / INDEX, lambda data: data["metadata"].update(total_size=12))


def same_tensor_twice(directory: Path) -> None:
    second = load_file(shard(directory, 1))
    second["model.embed_tokens.weight"] = torch.zeros(128, 32)
    save_file(second, shard(directory, 1))


def copied_as(name: str) -> Change:
    return lambda directory: shutil.copy(shard(directory), directory / name)


# --- tensors


def set_values(name: str, row: int, value: float, dtype: torch.dtype | None = None) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].to(dtype or tensors[name].dtype)
        tensors[name][row] = value

    return edit_tensors(change)


def without_tensor(name: str) -> Change:
    return edit_tensors(lambda tensors: tensors.pop(name))


def renamed(old: str, new: str) -> Change:
    return edit_tensors(lambda tensors: tensors.update({new: tensors.pop(old)}))


def sliced(ending: str, entries: int) -> Change:
    def change(tensors: Tensors) -> None:
        for key in layers(tensors, ending):
            tensors[key] = tensors[key][:entries]

    return edit_tensors(change)


def experts_cut(entries: int) -> Change:
    """Experts from ``entries`` on are gone, of layers that store them one by one."""

    def change(tensors: Tensors) -> None:
        for key in list(tensors):
            part = key.partition(".experts.")[2].partition(".")[0]
            if part.isdecimal() and int(part) >= entries:
                del tensors[key]

    return edit_tensors(change)


def cut(entries: int, router: str, *vectors: str) -> Change:
    """Experts cut as they should be, but for their routing."""
    return in_order(experts_cut(entries), *(sliced(name, entries) for name in (router, *vectors)))


# --- our own results


def plan_changed(directory: Path) -> None:
    edit_json(directory / "moeprune_plan.json", lambda data: data.update(seed=1))


def one_bit(directory: Path) -> None:
    """One bit of one kept weight: a number like any other."""
    file = shard(directory)
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)


def plan_of_others(directory: Path) -> None:
    """Another plan whose hash is right: only its counts tell."""

    def add(data: dict[str, dict[str, dict[str, list[int]]]]) -> None:
        data["layers"]["0"]["keep"] = [0, 1, 2]

    file = directory / "moeprune_plan.json"
    edit_json(file, add)
    digest = sha256_bytes(file.read_bytes())
    edit_json(directory / "moeprune.json", lambda data: data.update(plan_sha256=digest))


def novice_list(change: Callable[[list[int]], object]) -> Change:
    def edit(directory: Path) -> None:
        edit_json(directory / "config.json", lambda data: change(data["approximate_experts"]["1"]))

    return edit


def without_file(name: str) -> Change:
    return lambda directory: (directory / name).unlink()


def written(name: str, text: str) -> Change:
    return lambda directory: (directory / name).write_text(text)


def added_token(directory: Path) -> None:
    def add(data: dict[str, list[dict[str, object]]]) -> None:
        data["added_tokens"].append({**data["added_tokens"][0], "id": 99_999, "content": "<new>"})

    edit_json(directory / "tokenizer.json", add)


def special_token(directory: Path) -> None:
    edit_json(directory / "generation_config.json", lambda data: data.update(eos_token_id=[2, 128]))


def pruned_head(directory: Path) -> None:
    """The layers lose two experts and the head does not, as tools do that do not know it."""

    def change(tensors: Tensors) -> None:
        for key in list(tensors):
            if "layers.4." in key or ".mlp." not in key:
                continue
            part = key.partition(".experts.")[2].partition(".")[0]
            if part.isdecimal() and int(part) >= 6:
                del tensors[key]
            elif key.endswith(("gate.weight", "gate.e_score_correction_bias")):
                tensors[key] = tensors[key][:6]

    in_order(edit_tensors(change), edit_config(n_routed_experts=6))(directory)


PER_LAYER = {"1": {"num_local_experts": 6}}
BIAS = "gate.e_score_correction_bias"
UP = MIXTRAL.format(1) + "experts.3.w3.weight"
DAMAGES = (
    Damage("no config.json", "mixtral", "config", without_file("config.json"), "config.json"),
    Damage("config.json is cut", "mixtral", "config", written("config.json", "{"), "config.json"),
    Damage("a shard is cut", "mixtral", "weights", truncate, "model-00001"),
    Damage("shards without index", "mixtral", "weights", without_file(INDEX), INDEX),
    Damage("a shard is missing", "mixtral", "index", lambda d: shard(d, 1).unlink(), "model-00002"),
    Damage(
        "a tensor in another shard", "mixtral", "index",
        index_entry("model.embed_tokens.weight", "model-00002-of-00004.safetensors"),
        "model.embed_tokens.weight",
    ),
    Damage(
        "a tensor in no shard", "mixtral", "index",
        index_entry("model.other", "model-00002-of-00004.safetensors"), "model.other",
    ),
    Damage(
        "the index leaves the folder", "mixtral", "index",
        index_entry("model.norm.weight", "../other.safetensors"), INDEX,
    ),
    Damage("the index's size", "mixtral", "index-size", total_size, INDEX, "warning"),
    Damage(
        "a tensor in two shards", "mixtral", "duplicate-tensors", same_tensor_twice,
        "model.embed_tokens.weight",
    ),
    Damage(
        "an old shard", "mixtral", "leftover-files", copied_as("model-00005-of-00005.safetensors"),
        "model-00005", "warning",
    ),
    Damage(
        "pickles", "mixtral", "leftover-files", written("pytorch_model.bin", "x"),
        "pytorch_model.bin", "warning",
    ),
    Damage(
        "a single file before the shards", "mixtral", "leftover-files",
        copied_as("model.safetensors"), "model.safetensors",
    ),
    # --- configuration
    Damage("unknown type", "mixtral", "architecture", edit_config(model_type="mix"), "config.json"),
    Damage(
        "unknown class", "mixtral", "architecture", edit_config(architectures=["PrunedModel"]),
        "config.json",
    ),
    Damage("no such model", "mixtral", "model", edit_config(hidden_act="none"), "config.json"),
    Damage(
        "more chosen than there are", "mixtral", "top-k",
        in_order(cut(1, "gate.weight"), edit_config(num_local_experts=1)), "config.json",
    ),
    Damage(
        "more chosen than one layer has", "mixtral", "top-k",
        edit_config(per_layer_config={"1": {"num_local_experts": 1}}), "config.json",
    ),
    Damage(
        "groups of different size", "deepseek_v3", "groups",
        in_order(cut(7, "gate.weight", BIAS), edit_config(n_routed_experts=7)), "config.json",
    ),
    Damage(
        "groups of one", "deepseek_v3", "groups",
        in_order(cut(2, "gate.weight", BIAS), edit_config(n_routed_experts=2)), "config.json",
    ),
    Damage(
        "groups too small for the choice", "deepseek_v3", "groups",
        edit_config(num_experts_per_tok=6), "config.json",
    ),
    Damage(
        "no modeling file", "olmoe/replaced", "auto-map", without_file("modeling_moeprune.py"),
        "config.json",
    ),
    Damage(
        "no class in the file", "olmoe/replaced", "auto-map",
        written("modeling_moeprune.py", "class Other: ..."), "modeling_moeprune.py",
    ),
    Damage(
        "no imported file", "olmoe/replaced", "auto-map", without_file("moeprune_novices.py"),
        "modeling_moeprune.py",
    ),
    Damage(
        "no class is named", "olmoe/replaced", "generated-class", edit_config(auto_map=None),
        "config.json",
    ),
    Damage(
        "end token", "mixtral", "special-tokens", edit_config(eos_token_id=500), "config.json"
    ),
    Damage(
        "end token of generation", "mixtral", "special-tokens", special_token,
        "generation_config.json",
    ),
    # --- shapes
    Damage(
        "fewer experts than said", "mixtral", "expert-count", cut(6, "gate.weight"),
        "experts.5.",
    ),
    Damage(
        "more experts than said", "gpt_oss", "expert-count", edit_config(num_local_experts=6),
        "experts.",
    ),
    Damage(
        "more experts than said of one layer", "mixtral", "expert-count",
        edit_config(per_layer_config=PER_LAYER), "layers.1.",
    ),
    Damage(
        "more experts in one matrix than said", "dbrx", "expert-count",
        lambda d: edit_json(
            d / "config.json", lambda data: data["ffn_config"].update(moe_num_experts=6)
        ),
        "experts.",
    ),
    Damage(
        "more experts in blocks than said", "mxfp4", "expert-count",
        edit_config(num_local_experts=6), "_blocks",
    ),
    Damage(
        "a router that was not cut", "mixtral", "router-rows",
        in_order(experts_cut(6), edit_config(num_local_experts=6)), "gate.weight",
    ),
    Damage(
        "a bias that was not cut", "deepseek_v3", "router-vectors",
        in_order(cut(6, "gate.weight"), edit_config(n_routed_experts=6)), BIAS,
    ),
    Damage(
        "a router bias that was not cut", "gpt_oss/deleted", "router-vectors",
        edit_tensors(
            lambda t: t.update({k: torch.zeros(8) for k in layers(t, "router.bias")})
        ),
        "router.bias",
    ),
    Damage(
        "another width of experts", "granitemoe", "expert-shape",
        edit_config(intermediate_size=24), "input_linear",
    ),
    Damage(
        "one expert of another width", "mixtral", "expert-shape",
        edit_tensors(lambda t: t.update({UP: t[UP][:40]})), "experts.",
    ),
    Damage("rows of the head", "mixtral", "tensor-shape", sliced("lm_head.weight", 100), "lm_head"),
    Damage(
        "a norm is missing", "mixtral", "missing-tensors", without_tensor("model.norm.weight"),
        "model.norm.weight",
    ),
    Damage(
        "a tensor too many", "mixtral", "unused-tensors",
        edit_tensors(lambda t: t.update({"model.extra.weight": torch.ones(3)})),
        "model.extra.weight", "warning",
    ),
    Damage(
        "no head", "mixtral", "tied-weights", without_tensor("lm_head.weight"), "lm_head.weight"
    ),
    Damage(
        "a head that is not the embeddings", "mixtral", "tied-weights",
        edit_config(tie_word_embeddings=True), "lm_head.weight", "warning",
    ),
    # --- experts
    Damage(
        "a gap", "mixtral", "expert-ids",
        edit_tensors(
            lambda t: [t.pop(k) for k in list(t) if k.startswith(UP.replace("w3.weight", ""))]
        ),
        "layers.1.block_sparse_moe.experts.3.",
    ),
    Damage(
        "two names of one expert", "mixtral", "expert-ids",
        edit_tensors(lambda t: t.update({UP.replace(".3.", ".03."): t[UP].clone()})),
        ".w3.weight",
    ),
    Damage("half an expert", "mixtral", "expert-matrices", without_tensor(UP), UP),
    Damage(
        "one expert of another type", "mixtral", "expert-dtype",
        edit_tensors(lambda t: t.update({UP: t[UP].half()})), UP,
    ),
    Damage(
        "a constant that is not stored", "olmoe/replaced", "novices",
        novice_list(lambda ids: ids.append(next(e for e in range(8) if e not in ids))),
        "layers.1.mlp.experts.",
    ),
    Damage(
        "a constant that is not listed", "olmoe/replaced", "novices",
        novice_list(lambda ids: ids.pop()), "approx_value",
    ),
    Damage(
        "constants of fused experts", "granitemoe/replaced", "novices",
        novice_list(lambda ids: ids.pop()), "novice_value",
    ),
    Damage(
        "constants of no expert", "olmoe/replaced", "novices",
        novice_list(lambda ids: ids.append(8)), "config.json",
    ),
    Damage(
        "more experts in a layer than in any", "mixtral", "per-layer-config",
        edit_config(per_layer_config={"1": {"num_local_experts": 9}}), "config.json",
    ),
    Damage(
        "counts of no layer", "mixtral", "per-layer-config",
        edit_config(per_layer_config={"17": {"num_local_experts": 6}}), "config.json",
    ),
    Damage(
        "an expert of zeros", "mixtral", "zero-experts",
        edit_tensors(lambda t: t[UP].zero_()), UP, "warning",
    ),
    Damage(
        "a fused expert of zeros", "granitemoe", "zero-experts",
        set_values("model.layers.2.block_sparse_moe.output_linear.weight", 5, 0.0),
        "output_linear", "warning",
    ),
    # --- quantisation
    Damage(
        "no scale", "fp8", "fp8-scales",
        without_tensor("model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"),
        "experts.2.up_proj.weight_scale_inv",
    ),
    Damage(
        "too few scales", "fp8", "fp8-scales", sliced("experts.2.up_proj.weight_scale_inv", 1),
        "experts.2.up_proj.weight_scale_inv",
    ),
    Damage(
        "a scale of nothing", "fp8", "fp8-scales",
        edit_tensors(lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(1, 1)})),
        "lm_head.weight_scale_inv",
    ),
    Damage(
        "scales of all experts", "mxfp4", "mxfp4-scales",
        sliced("mlp.experts.down_proj_blocks", 6), "down_proj_scales",
    ),
    Damage(
        "no scales of blocks", "mxfp4", "mxfp4-scales",
        without_tensor("model.layers.1.mlp.experts.down_proj_scales"), "down_proj_scales",
    ),
    Damage(
        "quantised without saying", "fp8", "quantised", edit_config(quantization_config=None),
        "experts.",
    ),
    Damage(
        "said to be quantised", "mixtral", "quantised",
        edit_config(quantization_config={"quant_method": "fp8"}), "config.json",
    ),
    # --- prediction heads
    Damage(
        "a head that is not there", "deepseek_v3", "attached-heads",
        edit_config(num_nextn_predict_layers=1), "config.json", "warning",
    ),
    Damage(
        "a head that was not pruned", "with-head", "attached-experts", pruned_head, "layers.4."
    ),
    Damage(
        "a head whose router was not pruned", "with-head", "attached-experts",
        edit_tensors(
            lambda t: t.update({"model.layers.4.mlp.gate.weight": torch.zeros(6, 32)})
        ),
        "layers.4.mlp.gate.weight",
    ),
    # --- values
    Damage(
        "not a number", "granitemoe", "finite", set_values("model.norm.weight", 3, float("nan")),
        "model.norm.weight",
    ),
    Damage(
        "infinity in half precision", "mixtral", "finite",
        set_values("lm_head.weight", 5, float("inf"), torch.float16), "lm_head.weight",
    ),
    Damage(
        "not a number in 8 bits", "fp8", "finite",
        set_values("model.layers.1.mlp.experts.2.up_proj.weight", 0, float("nan")),
        "experts.2.up_proj.weight",
    ),
    Damage(
        "another type than said", "mixtral", "dtype", edit_config(dtype="bfloat16"),
        "config.json", "warning",
    ),
    # --- tokenizer
    Damage("a new token", "demo", "tokenizer", added_token, "tokenizer.json"),
    Damage("no tokens", "demo", "tokenizer", written("tokenizer.json", "{}"), "tokenizer.json"),
    Damage(
        "a template without end", "demo", "chat-template",
        written("chat_template.jinja", "{% for m in messages %}{{ m }}"), "chat_template.jinja",
    ),
    # --- provenance
    Damage("another plan", "mixtral/deleted", "provenance", plan_changed, "moeprune_plan.json"),
    Damage("a flipped bit", "mixtral/deleted", "checksums", one_bit, "model"),
    Damage(
        "no plan", "mixtral/deleted", "provenance", without_file("moeprune_plan.json"),
        "moeprune_plan.json",
    ),
    Damage(
        "a record that is none", "mixtral/deleted", "provenance", written("moeprune.json", "[]"),
        "moeprune.json",
    ),
    Damage(
        "tensors that came later", "mixtral/deleted", "provenance",
        edit_tensors(lambda t: t.update({"model.extra": torch.ones(3)})), "moeprune.json",
        "warning",
    ),
    Damage(
        "a plan of other counts", "mixtral/deleted", "plan-counts", plan_of_others,
        "moeprune_plan.json",
    ),
    Damage(
        "a plan of other counts, fused", "granitemoe/deleted", "plan-counts", plan_of_others,
        "moeprune_plan.json",
    ),
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.what)
def test_damage_is_found(copy: Base, damage: Damage) -> None:
    directory = copy(damage.base)
    damage.change(directory)
    before = {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}
    result = moeprune.verify(directory)
    found = [finding for finding in result.findings if finding.rule == damage.rule]
    assert found, result.findings
    assert {finding.severity for finding in found} == {damage.severity}
    assert any(damage.where in f"{f.file} {f.tensor}" for f in found), found
    assert all(f.problem and f.remedy and f.file for f in result.findings)
    assert not any("could not be checked" in f.problem for f in result.findings)
    assert result.passed() == (not result.of("error"))
    if damage.severity == "warning":
        assert not result.passed(strict=True)
    json.dumps(result.to_json(), allow_nan=False)
    # looking changes nothing
    assert before == {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_every_rule_about_a_checkpoint_alone_has_a_test() -> None:
    from moeprune.verification.run import RULES

    alone = {rule.id for rule in RULES if not rule.id.startswith("against-")}
    elsewhere = {"answers", "offsets"}  # test_verify_rebuilt.py
    assert alone == {damage.rule for damage in DAMAGES} | elsewhere


def test_code_of_a_checkpoint_is_never_run(copy: Base, tmp_path: Path) -> None:
    directory = copy("mixtral")
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\nclass Model: ...\n"
    (directory / "modeling.py").write_text(code)
    edit_config(
        auto_map={"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.Model"}
    )(directory)
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["modeling.Model", None]}})
    )
    assert moeprune.verify(directory).passed()
    assert not marker.exists()


def test_a_missing_shard_is_told_once(copy: Base) -> None:
    directory = copy("mixtral")
    shard(directory, 1).unlink()
    result = moeprune.verify(directory)
    assert [f.rule for f in result.of("error")] == ["index"]
    assert "expert-ids" in result.skipped and "missing-tensors" in result.skipped
