"""A result is what its plan makes of the original, in bytes and in logits; what is not is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bases import Base, Tensors, edit_config, edit_tensors, shapes_of

import moeprune
from families import moe_model_types
from moeprune.errors import MoepruneError
from moeprune.models import quirks
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.store import write_plan
from moeprune.verification.edits import Edit
from moeprune.verification.finding import Verification
from moeprune.verification.reference import Reference
from moeprune.verification.subject import Subject
from support import plan_for

PLAN = "moeprune_plan.json"


def rules(result: Verification) -> set[str]:
    """Rules with errors, except what the record of the result itself says."""
    return {finding.rule for finding in result.of("error")} - {"provenance"}


# --- clean results


@pytest.mark.parametrize("edit", ["deleted", "replaced", "masked"])
@pytest.mark.parametrize(
    "family", ["mixtral", "granitemoe", "gpt_oss", "deepseek_v3", "nemotron_h", "ernie4_5_moe"]
)
def test_a_result_is_its_plan_on_the_original(base: Base, family: str, edit: str) -> None:
    result = moeprune.verify(base(f"{family}/{edit}"), against=base(family))
    assert result.passed(strict=True), result.findings
    compared = result.comparison["logits"]
    assert compared["tokens"] == 192 and compared["text"] == "random tokens"
    if edit == "replaced":  # the reference adds the constants by another formula
        assert compared["difference"] < 1e-4 < compared["tolerance"]
    else:
        assert compared["equal"] and compared["difference"] == 0
    masked = result.comparison.get("masked_tensors_compared", 0)
    assert masked + result.comparison["tensors_compared"] == sum(
        not key.endswith(("approx_value", "novice_value"))
        for key in Checkpoint.open(base(f"{family}/{edit}")).tensors
    )
    assert (masked > 0) == (edit == "masked")


@pytest.mark.parametrize("family", moe_model_types())
def test_deletion_in_every_family(base: Base, family: str) -> None:
    if family in quirks.REFUSED:
        pytest.skip(quirks.REFUSED[family])
    edit = "deleted" if family in quirks.UNEVEN_REFUSED else "uneven"
    result = moeprune.verify(base(f"{family}/{edit}"), against=base(family))
    assert not result.of("error"), result.findings
    assert result.comparison["logits"]["equal"]


@pytest.mark.parametrize("planned", [True, False], ids=["plan", "no plan"])
@pytest.mark.parametrize("family", ["fp8", "mxfp4"])
def test_quantised_weights(copy: Base, base: Base, family: str, planned: bool) -> None:
    directory = copy(f"{family}/deleted")
    if not planned:
        (directory / PLAN).unlink()
        (directory / "moeprune.json").unlink()
    result = moeprune.verify(directory, against=base(family))
    assert result.passed(strict=True), result.findings
    assert result.comparison["logits"]["equal"]


@pytest.mark.parametrize("edit", ["deleted", "replaced"])
def test_a_prediction_head_follows_the_last_layer(base: Base, edit: str) -> None:
    result = moeprune.verify(base(f"with-head/{edit}"), against=base("with-head"))
    assert result.passed(strict=True), result.findings


def test_a_prediction_head_may_be_left_out(copy: Base, base: Base) -> None:
    def drop(tensors: Tensors) -> None:
        for key in [key for key in tensors if "layers.4." in key]:
            del tensors[key]

    directory = copy("with-head/deleted")
    edit_tensors(drop)(directory)
    result = moeprune.verify(directory, against=base("with-head"))
    assert {f.rule for f in result.findings} == {"attached-heads", "provenance", "tokenizer"}
    assert not result.of("error")


def test_a_prediction_head_of_other_experts_is_found(copy: Base, base: Base) -> None:
    def roll(tensors: Tensors) -> None:
        key = "model.layers.4.mlp.gate.weight"
        tensors[key] = tensors[key].roll(1, 0)

    directory = copy("with-head/deleted")
    edit_tensors(roll)(directory)
    result = moeprune.verify(directory, against=base("with-head"))
    # the decoder layers do not read it, so logits cannot tell
    assert rules(result) == {"against-tensors"}


@pytest.mark.parametrize("planned", [True, False], ids=["plan", "no plan"])
@pytest.mark.parametrize("edit", ["padded", "padded-masked"])
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_padding(copy: Base, base: Base, family: str, edit: str, planned: bool) -> None:
    directory = copy(f"{family}/{edit}")
    if not planned:
        (directory / PLAN).unlink()
        (directory / "moeprune.json").unlink()
    result = moeprune.verify(directory, against=base(family))
    assert result.passed(strict=True), result.findings
    # the reference has no pads: other numbers of rows are other kernels
    assert result.comparison["logits"]["difference"] <= 1e-5


def test_padding_that_can_be_chosen_is_found(copy: Base, base: Base) -> None:
    def change(tensors: Tensors) -> None:
        for key in tensors:
            if key.endswith("router.bias"):
                tensors[key].clamp_(min=0.0)

    directory = copy("gpt_oss/padded")
    edit_tensors(change)(directory)
    alone = moeprune.verify(directory)
    assert "zero-experts" in {finding.rule for finding in alone.of("warning")}
    assert "against-tensors" in rules(moeprune.verify(directory, against=base("gpt_oss")))


@pytest.mark.parametrize("edit", ["deleted", "replaced", "masked", "masked-2-of-4"])
@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_without_a_plan_the_experts_are_recognised(copy: Base, family: str, edit: str) -> None:
    directory = copy(f"{family}/{edit}")
    (directory / PLAN).unlink()
    (directory / "moeprune.json").unlink()
    result = moeprune.verify(directory, against=directory_of_original(directory, family, copy))
    assert not result.of("error"), result.findings
    assert "against-plan" in result.skipped and "against-logits" not in result.skipped


def directory_of_original(directory: Path, family: str, copy: Base) -> Path:
    """The original beside a copy that was already taken."""
    directory.rename(directory.with_name("result"))
    original = copy(family)
    original.rename(original.with_name("original"))
    original.with_name("result").rename(directory)
    return original.with_name("original")


def test_the_recognised_experts_are_those_of_the_plan(base: Base) -> None:
    original = Checkpoint.open(base("granitemoe"))
    subject = Subject(base("granitemoe/deleted"))
    planned = Reference(original, None, subject).edits
    recognised = Reference(original, None, subject)
    found = {layer: recognised._recognise(layer) for layer in planned}
    assert found == planned
    assert all(isinstance(edit, Edit) and len(edit.keep) == 6 for edit in found.values())


def test_the_embedded_model_against_itself(base: Base) -> None:
    result = moeprune.verify("demo", against="demo")
    assert result.passed(strict=True)
    assert result.comparison["logits"]["equal"]
    assert result.comparison["logits"]["text"] == "embedded text"


def test_the_vectors_of_a_plan_are_compared(base: Base, tmp_path: Path) -> None:
    from bases import replaced

    original = Checkpoint.open(base("olmoe"))
    plan = plan_for(original, [replaced(shape) for shape in shapes_of(original.path)])
    write_plan(plan, tmp_path / "plan.json")
    directory = base("olmoe/replaced")
    result = moeprune.verify(directory, against=base("olmoe"), plan=tmp_path / "plan.json")
    assert not result.of("error") and "against-constants" not in result.skipped
    for layer in plan.layers.values():
        assert layer.novices_NH is not None
        layer.novices_NH[1] += 1
    write_plan(plan, tmp_path / "other.json")
    result = moeprune.verify(directory, against=base("olmoe"), plan=tmp_path / "other.json")
    assert rules(result) == {"against-constants"}
    assert len(result.of("error")) == len(plan.layers)


# --- results that are something else


def swap_experts(tensors: Tensors) -> None:
    """Two experts change places; the router's rows do not."""
    for key in [key for key in tensors if ".1.block_sparse_moe.experts.2." in key]:
        other = key.replace("experts.2.", "experts.4.")
        tensors[key], tensors[other] = tensors[other], tensors[key]


def swap_fused(tensors: Tensors) -> None:
    for name in ("input_linear", "output_linear"):
        weight = tensors[f"model.layers.1.block_sparse_moe.{name}.weight"]
        weight[[2, 4]] = weight[[4, 2]]


def roll_router(tensors: Tensors) -> None:
    block = "model.layers.1.block_sparse_moe."
    key = next(
        block + name for name in ("gate.weight", "router.layer.weight") if block + name in tensors
    )
    tensors[key] = tensors[key].roll(1, dims=0)


def roll_bias(tensors: Tensors) -> None:
    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[key] = tensors[key].roll(1)


def bend_attention(tensors: Tensors) -> None:
    tensors["model.layers.2.self_attn.q_proj.weight"][3, 5] += 0.5


SPOILED: dict[str, tuple[str, Callable[[Tensors], object]]] = {
    "swapped experts": ("mixtral", swap_experts),
    "swapped fused experts": ("granitemoe", swap_fused),
    "permuted router": ("mixtral", roll_router),
    "permuted fused router": ("granitemoe", roll_router),
    "permuted correction bias": ("deepseek_v3", roll_bias),
    "changed attention": ("mixtral", bend_attention),
}


@pytest.mark.parametrize("planned", [True, False], ids=["plan", "no plan"])
@pytest.mark.parametrize("what", SPOILED)
def test_other_bytes_are_found(copy: Base, base: Base, what: str, planned: bool) -> None:
    family, change = SPOILED[what]
    directory = copy(f"{family}/deleted")
    edit_tensors(change)(directory)
    if not planned:
        (directory / PLAN).unlink()
    result = moeprune.verify(directory, against=base(family))
    assert "against-tensors" in rules(result), result.findings
    assert "against-logits" in rules(result)
    named = {finding.tensor for finding in result.of("error") if finding.tensor}
    layer = "layers.2." if "attention" in what else "layers.1."
    assert named and all(layer in tensor for tensor in named)


def test_a_consistent_renumbering_is_no_finding(copy: Base, base: Base) -> None:
    """Without a plan, experts may stand in any order if their router's rows do."""

    def renumber(tensors: Tensors) -> None:
        swap_fused(tensors)
        gate = tensors["model.layers.1.block_sparse_moe.router.layer.weight"]
        gate[[2, 4]] = gate[[4, 2]]

    directory = copy("granitemoe/deleted")
    edit_tensors(renumber)(directory)
    (directory / PLAN).unlink()
    (directory / "moeprune.json").unlink()
    result = moeprune.verify(directory, against=base("granitemoe"))
    assert not result.of("error"), result.findings


@pytest.mark.parametrize("entry", [{"norm_topk_prob": False}, {"routed_scaling_factor": 1.0}])
def test_another_routing_is_found(copy: Base, base: Base, entry: dict[str, object]) -> None:
    directory = copy("deepseek_v3/deleted")
    edit_config(**entry)(directory)
    result = moeprune.verify(directory, against=base("deepseek_v3"))
    assert rules(result) == {"against-logits"}
    logits = result.comparison["logits"]
    assert not logits["passed"] and logits["difference"] > logits["tolerance"]


def test_changed_weights_under_a_mask_are_found(copy: Base, base: Base) -> None:
    def change(tensors: Tensors) -> None:
        weight = tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
        weight[weight != 0] *= 1.01

    directory = copy("mixtral/masked")
    edit_tensors(change)(directory)
    result = moeprune.verify(directory, against=base("mixtral"))
    assert rules(result) == {"against-masks", "against-logits"}
    [found] = [finding for finding in result.of("error") if finding.rule == "against-masks"]
    assert found.tensor == "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    assert "neither zero nor the original's" in found.problem


@pytest.mark.parametrize(("name", "problem"), [("masked", "25 of 48"), ("masked-2-of-4", "3 of 4")])
def test_more_zeros_than_planned_are_found(copy: Base, base: Base, name: str, problem: str) -> None:
    def change(tensors: Tensors) -> None:
        row = tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"][0]
        row[torch.nonzero(row)[0]] = 0

    directory = copy(f"mixtral/{name}")
    edit_tensors(change)(directory)
    result = moeprune.verify(directory, against=base("mixtral"))
    # the reference takes the zeros of the result, so the logits say nothing about their number
    assert rules(result) == {"against-masks"}
    assert problem in result.of("error")[0].problem


def test_fewer_zeros_than_planned_are_found(copy: Base, base: Base) -> None:
    key = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    original = Checkpoint.open(base("mixtral")).read(key)
    directory = copy("mixtral/masked")
    edit_tensors(lambda tensors: tensors.update({key: original}))(directory)
    result = moeprune.verify(directory, against=base("mixtral"))
    assert rules(result) == {"against-masks"}
    assert "0 of 48" in result.of("error")[0].problem


def test_missing_and_additional_tensors_are_found(copy: Base, base: Base) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.other.weight"] = tensors.pop("model.norm.weight")

    directory = copy("mixtral/deleted")
    edit_tensors(change)(directory)
    result = moeprune.verify(directory, against=base("mixtral"))
    found = {f.tensor for f in result.of("error") if f.rule == "against-tensors"}
    assert found == {"model.other.weight", "model.norm.weight"}


def test_another_original_is_found(base: Base) -> None:
    result = moeprune.verify(base("mixtral/deleted"), against=base("minimax_m2"))
    assert "against-plan" in rules(result)


def test_a_plan_that_is_none_is_found(base: Base, tmp_path: Path) -> None:
    for content in ("[]", '{"format": "moeprune.plan/1", "layers": {"0": {"experts": 8}}}'):
        (tmp_path / "plan.json").write_text(content)
        result = moeprune.verify(
            base("mixtral/deleted"), against=base("mixtral"), plan=tmp_path / "plan.json"
        )
        assert "against-plan" in rules(result)
        assert "not a plan" in " ".join(finding.problem for finding in result.of("error"))
        assert "against-logits" in result.skipped


def test_constants_without_the_vectors_of_a_plan_are_taken_as_they_are(
    copy: Base, base: Base
) -> None:
    def change(tensors: Tensors) -> None:
        for key in tensors:
            if key.endswith("approx_value"):
                tensors[key] *= 2

    directory = copy("olmoe/replaced")
    edit_tensors(change)(directory)
    # the copy of the plan has no vectors, so this is what the result says its constants are
    assert moeprune.verify(directory, against=base("olmoe")).passed()


def test_half_precision_is_compared_as_such(base: Base) -> None:
    result = moeprune.verify(
        base("mixtral/deleted"),
        against=base("mixtral"),
        compute=moeprune.Compute(dtype="bfloat16"),
    )
    assert result.passed() and result.comparison["logits"]["dtype"] == "bfloat16"
    with pytest.raises(MoepruneError, match="cannot compare"):
        moeprune.verify("demo", against="demo", compute=moeprune.Compute(dtype="float8"))


def test_the_result_is_json(base: Base) -> None:
    result = moeprune.verify(base("olmoe/replaced"), against=base("olmoe")).to_json()
    text = json.dumps(result, allow_nan=False)
    assert json.loads(text)["format"] == "moeprune.verification/1"
