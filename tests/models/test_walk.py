"""The walk against transformers' own forward, and its statistics against slow references."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import experts_modules, moe_model_types, token_ids
from moeprune.core.accumulators import ACCUMULATORS, SAMPLE_SIZE
from moeprune.core.statistics import LayerStatistics
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.loading import LayeredModel
from moeprune.models.walk import Batch, Walk
from support import expert_count, layer_of, matrices, router_of

Tiny = Callable[[str], Path]

NOT_BIT_EQUAL: dict[str, str] = {}
"""Families whose streamed logits may differ from transformers' own in the last bits, and why."""

NOT_OBSERVED = {
    "doge": "its experts are rows of embedding tables",
    "jetmoe": "its experts have no common interface",
}
"""Families without sites: their layers can be walked, but there are no statistics."""

OBSERVED = [name for name in moe_model_types() if name not in NOT_OBSERVED]
SPECIAL = ["dbrx", "deepseek_v4", "llama4_text", "longcat_flash", "zaya"]
SPLIT = ["mixtral", "olmoe", "deepseek_v3", "gpt_oss", "nemotron_h", *SPECIAL]
EVERYTHING = tuple({*ACCUMULATORS} - {"served"})  # these batches have no domains; see test_served

Collected = dict[int, LayerStatistics]


def batch(ids: Tensor, first_key: int, padding: Sequence[int] = ()) -> Batch:
    """A batch whose rows have so many padding tokens on the left."""
    mask = None
    if padding:
        mask = (torch.arange(ids.shape[1]) >= torch.tensor(padding)[:, None]).long()
        ids = ids * mask
    # keys in no particular order, without repetition
    keys = (torch.arange(ids.numel()) + first_key) * 7919 % 100_003
    return Batch(ids, keys.view_as(ids), mask)


def three_batches() -> list[Batch]:
    """Plain, padded on the left, and a shorter one."""
    return [
        batch(token_ids(2, 24, seed=1), 0),
        batch(token_ids(2, 24, seed=2), 1000, padding=(5, 0)),
        batch(token_ids(1, 9, seed=3), 2000),
    ]


def walk(
    model: LayeredModel,
    batches: Sequence[Batch],
    workers: int = 1,
    needs: Sequence[str] = (),
) -> tuple[list[Tensor], Collected]:
    logits: dict[int, Tensor] = {}
    found: Collected = {}

    def visit(site: Any, statistics: LayerStatistics) -> bool:
        found[site.shape.layer] = statistics
        return False

    with Walk(model, batches, workers) as running:
        running.layers(needs, visit)
        running.logits(lambda index, value: logits.update({index: value}))
    return [logits[index] for index in range(len(batches))], found


def opened(directory: Path) -> LayeredModel:
    return LayeredModel(Checkpoint.open(directory), torch.float32)


def stock(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def plain_logits(model: PreTrainedModel, batches: Sequence[Batch]) -> list[Tensor]:
    with torch.no_grad():
        return [model(**b.inputs(torch.device("cpu")), use_cache=False).logits for b in batches]


def tensors(found: Collected) -> Iterator[tuple[str, Tensor]]:
    for layer, statistics in sorted(found.items()):
        for name, tensor in statistics.to_tensors().items():
            yield f"{layer}.{name}", tensor


# ---- logits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", moe_model_types())
def test_streamed_logits_are_the_models_own(model_type: str, tiny: Tiny) -> None:
    batches = three_batches()
    expected = plain_logits(stock(tiny(model_type)), batches)
    model = opened(tiny(model_type))
    for workers in (1, 2):
        for found, plain in zip(walk(model, batches, workers)[0], expected, strict=True):
            if model_type in NOT_BIT_EQUAL:
                torch.testing.assert_close(found, plain)
            else:
                torch.testing.assert_close(found, plain, rtol=0, atol=0)


def test_exceptions_are_families() -> None:
    assert set(NOT_BIT_EQUAL) | set(NOT_OBSERVED) <= set(moe_model_types())


@pytest.mark.parametrize("model_type", NOT_OBSERVED)
def test_families_without_sites(model_type: str, tiny: Tiny) -> None:
    assert not opened(tiny(model_type)).sites


@pytest.mark.parametrize("model_type", OBSERVED)
def test_observing_changes_rounding_only(model_type: str, tiny: Tiny) -> None:
    """Logits of an observed run; who was selected is the model's own decision, exactly."""
    batches = three_batches()
    expected, seen = plain_logits_and_routing(tiny(model_type), batches)
    logits, found = walk(opened(tiny(model_type)), batches, 2, ["routing", "router"])
    for value, plain in zip(logits, expected, strict=True):
        torch.testing.assert_close(value, plain, rtol=2e-6, atol=2e-6 * float(plain.abs().max()))
    assert found.keys() == seen.keys()
    real = sum(int(b.mask_BL.sum()) if b.mask_BL is not None else b.ids_BL.numel() for b in batches)
    for layer, statistics in found.items():
        assert statistics.tokens == real
        count_E = statistics.parts["routing"].count_E
        assert torch.equal(count_E, seen[layer]), layer
        assert statistics.parts["router"].sum_E.abs().sum() > 0


def plain_logits_and_routing(
    directory: Path, batches: Sequence[Batch]
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Logits, and how many tokens that are no padding were handed to each expert, by layer."""
    model, counts = stock(directory), {}
    with recorded(model) as seen:
        logits = plain_logits(model, batches)
    for name, experts in experts_modules(model).items():
        index_TK = torch.cat(real_rows(seen[layer_of(name)]["index"], batches))
        E = expert_count(experts)
        counts[layer_of(name)] = torch.bincount(index_TK.reshape(-1), minlength=E)[:E]
    return logits, counts


def real_rows(per_batch: Sequence[Tensor], batches: Sequence[Batch]) -> list[Tensor]:
    """The rows of tokens that are no padding."""
    masks = [torch.ones_like(b.ids_BL) if b.mask_BL is None else b.mask_BL for b in batches]
    pairs = zip(per_batch, masks, strict=True)
    return [rows[mask.reshape(-1).bool()] for rows, mask in pairs]


# ---- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", OBSERVED)
def test_workers_make_no_difference(model_type: str, tiny: Tiny) -> None:
    batches = three_batches()
    model = opened(tiny(model_type))
    one = dict(tensors(walk(model, batches, 1, EVERYTHING)[1]))
    two = dict(tensors(walk(model, batches, 2, EVERYTHING)[1]))
    assert one.keys() == two.keys()
    assert {name for name in one if not torch.equal(one[name], two[name])} == set()


def rows_of(texts: Tensor, rows: Sequence[int], lengths: Sequence[int]) -> Batch:
    """Some rows of ``texts`` as one batch, padded on the left; keys belong to the tokens."""
    width = max(lengths[row] for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    keys = torch.full((len(rows), width), -1)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for at, row in enumerate(rows):
        n = lengths[row]
        ids[at, width - n :] = texts[row, :n]
        keys[at, width - n :] = (torch.arange(n) + 100 * row) * 7919 % 100_003
        mask[at, width - n :] = 1
    return Batch(ids, keys, None if mask.all() else mask)


# deepseek_v4 itself computes something else for padded tokens: it pools neighbours, padding as well
@pytest.mark.parametrize("model_type", [name for name in SPLIT if name != "deepseek_v4"])
def test_batches_make_no_difference(model_type: str, tiny: Tiny) -> None:
    """Counts are the same for every split of the text, sums the same up to rounding."""
    texts, lengths = token_ids(6, 24, seed=5), (24, 24, 17, 24, 3, 11)
    model = opened(tiny(model_type))
    reference: dict[str, Tensor] = {}
    for split in (
        [[0, 1, 2, 3, 4, 5]],
        [[0], [1], [2], [3], [4], [5]],
        [[5, 1], [4], [3, 0, 2]],
        [[2, 4], [0, 1, 3, 5]],
    ):
        batches = [rows_of(texts, rows, lengths) for rows in split]
        found = dict(tensors(walk(model, batches, 2, EVERYTHING)[1]))
        reference = reference or found
        assert found.keys() == reference.keys()
        for name, tensor in found.items():
            if tensor.dtype == torch.int64:
                assert torch.equal(tensor, reference[name]), (split, name)
            else:
                assert distance(tensor, reference[name]) < 1e-5, (split, name)


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    assert found.shape == expected.shape
    largest = float(expected.abs().max())
    return float((found.double() - expected.double()).abs().max()) / (largest or 1.0)


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[dict[int, dict[str, list[Tensor]]]]:
    """What the experts of every layer were called with and the router's logits, per batch.

    Where a family's experts are not told who was chosen, that is worked out from what the router
    saw and returned; a slot without an expert has an id from E on.
    """
    seen: dict[int, dict[str, list[Tensor]]] = {}
    handles = []
    for name, experts in experts_modules(model).items():
        into = seen.setdefault(layer_of(name), {"x": [], "index": [], "gate": [], "logits": []})
        family, last = type(experts).__name__, {}

        def call(
            module: Any,
            args: Any,
            kwargs: Any,
            into: Any = into,
            family: Any = family,
            last: Any = last,
        ) -> None:
            values = [*args, *kwargs.values()]
            if family == "Llama4TextExperts":  # sees scaled inputs only
                logits_TE = last["output"][1]
                chosen = logits_TE.sort(dim=1, descending=True)
                K = model.config.num_experts_per_tok
                values = [last["input"], chosen.indices[:, :K], chosen.values[:, :K].sigmoid()]
            elif family == "ZayaExperts":  # skipping tokens come as expert 0's
                biases = last["router"].balancing_biases
                chosen_T = (last["output"][0].softmax(dim=1) + biases).argmax(dim=1)
                assert torch.equal(values[1][:, 0], chosen_T % module.num_experts)
                values[1] = chosen_T[:, None]
            elif family == "DbrxExperts":
                values[0] = values[0].flatten(0, 1)
            for key, value in zip(("x", "index", "gate"), values, strict=True):
                into[key].append(value.clone())

        def route(
            module: nn.Module, args: Any, output: Any, into: Any = into, last: Any = last
        ) -> None:
            last.update(router=module, input=args[0], output=output)
            at = 1 if type(module).__name__ == "Llama4Router" else 0
            logits = output if isinstance(output, Tensor) else output[at]
            into["logits"].append(logits.reshape(-1, logits.shape[-1]).clone())

        handles.append(experts.register_forward_pre_hook(call, with_kwargs=True))
        handles.append(router_of(model, name).register_forward_hook(route))
    yield seen
    for handle in handles:
        handle.remove()


def expert_by_definition(experts: Any, e: int, x_nH: Tensor) -> tuple[Tensor, Tensor]:
    """h = act(G x) * (U x) and f = D h of one expert, row by row in float64."""
    if not hasattr(experts, "is_transposed"):
        act = experts.mlp.activation_fn if hasattr(experts, "mlp") else experts.act_fn
        by_role = {role: matrix.detach().double() for role, matrix in matrices(experts, e).items()}
        pairs = [(by_role["gate"] @ x_H, by_role["up"] @ x_H) for x_H in x_nH.double()]
        h_nI = torch.stack([act(gate_I) * up_I for gate_I, up_I in pairs])
        return h_nI, torch.stack([by_role["down"] @ h_I for h_I in h_nI])
    weights = {name: p.data[e].double() for name, p in experts.named_parameters(recurse=False)}
    if experts.is_transposed:
        weights = {name: w.T if w.ndim == 2 else w for name, w in weights.items()}
    zero = torch.zeros((), dtype=torch.float64)
    h_rows, f_rows = [], []
    for x_H in x_nH.double():
        if experts.has_gate:
            both = weights["gate_up_proj"] @ x_H + weights.get("gate_up_proj_bias", zero)
            h_I = experts._apply_gate(both)
        else:
            h_I = experts.act_fn(weights["up_proj"] @ x_H)
        h_rows.append(h_I)
        f_rows.append(weights["down_proj"] @ h_I + weights.get("down_proj_bias", zero))
    return torch.stack(h_rows), torch.stack(f_rows)


def sums_by_definition(
    experts: Any, seen: dict[str, list[Tensor]], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """All accumulators of one layer, token by token, in float64."""
    x_TH, index_TK, gate_TK, z_TR = (
        torch.cat(real_rows(seen[key], batches)) for key in ("x", "index", "gate", "logits")
    )
    key_T = torch.cat(real_rows([b.key_BL.reshape(-1) for b in batches], batches))
    gate_TK = gate_TK.double()
    E = expert_count(experts)
    scales_inputs = type(experts).__name__ == "Llama4TextExperts"
    per_expert: dict[str, list[Tensor]] = {}
    together_EE = torch.zeros(E, E, dtype=torch.int64)
    top1_E = torch.zeros(E, dtype=torch.int64)
    for index_K, gate_K in zip(index_TK.tolist(), gate_TK, strict=True):
        if index_K[int(gate_K.argmax())] < E:
            top1_E[index_K[int(gate_K.argmax())]] += 1
        for i in index_K:
            for j in index_K:
                if max(i, j) < E:
                    together_EE[i, j] += 1
    for e in range(E):
        tokens, slots = torch.where(index_TK == e)
        x_nH, score_n = x_TH[tokens].double(), gate_TK[tokens, slots]
        g_n = score_n
        if scales_inputs:
            x_nH, g_n = x_nH * score_n[:, None], torch.ones_like(score_n)
        if len(tokens):
            h_nI, f_nH = expert_by_definition(experts, e, x_nH)
        else:
            width = matrices(experts, e)["down"].shape[1]
            h_nI, f_nH = x_nH.new_zeros(0, width), x_nH.new_zeros(0, x_nH.shape[1])
        g_n1, norm_n = g_n[:, None], f_nH.norm(dim=1)
        one_x_nK = torch.cat((torch.ones_like(x_nH[:, :1]), x_nH), dim=1)
        mean_H = f_nH.mean(dim=0) if len(tokens) else f_nH.sum(dim=0)
        values = {
            "routing.count_E": torch.tensor(len(tokens)),
            "routing.gate_E": score_n.sum(),
            "routing.gate_sq_E": (score_n**2).sum(),
            "inputs.sq_EH": (x_nH**2).sum(dim=0),
            "inputs.gated_sq_EH": ((g_n1 * x_nH) ** 2).sum(dim=0),
            "hidden.sq_EI": (h_nI**2).sum(dim=0),
            "hidden.gated_sq_EI": ((g_n1 * h_nI) ** 2).sum(dim=0),
            "hidden.sum_EI": h_nI.sum(dim=0),
            "outputs.count_E": torch.tensor(len(tokens)),
            "outputs.mean_EH": mean_H,
            "outputs.m2_EH": ((f_nH - mean_H) ** 2).sum(dim=0),
            "outputs.gate_f_EH": (g_n1 * f_nH).sum(dim=0),
            "outputs.gated_EH": (g_n1**2 * f_nH).sum(dim=0),
            "outputs.norm_E": norm_n.sum(),
            "outputs.norm_sq_E": (norm_n**2).sum(),
            "outputs.gate_norm_E": (g_n * norm_n).sum(),
            "outputs.gate_norm_sq_E": (g_n * norm_n**2).sum(),
            "outputs.gate_sq_norm_sq_E": (g_n**2 * norm_n**2).sum(),
            "outputs.max_E": f_nH.abs().max() if len(tokens) else f_nH.new_zeros(()),
            "novice-gram.moments_EKK": (g_n1 * one_x_nK).T @ (g_n1 * one_x_nK),
            "novice-gram.cross_EHK": (g_n1 * f_nH).T @ (g_n1 * one_x_nK),
            "input-gram.gram_EHH": x_nH.T @ x_nH,
            "hidden-gram.gram_EII": h_nI.T @ h_nI,
        }
        for name, value in values.items():
            per_expert.setdefault(name, []).append(value)
    z_TE = z_TR[:, :E].double()
    smallest = key_T.argsort()[:SAMPLE_SIZE]
    return {
        **{name: torch.stack(values) for name, values in per_expert.items()},
        "routing.top1_E": top1_E,
        "routing.together_EE": together_EE,
        "router.sum_E": z_TE.sum(dim=0),
        "router.gram_EE": z_TE.T @ z_TE,
        "router.prob_E": z_TR.double().softmax(dim=1)[:, :E].sum(dim=0),
        "sample.key_S": key_T[smallest],
        "sample.x_SH": x_TH[smallest],
        "sample.z_SR": z_TR[smallest],
        "sample.index_SK": index_TK[smallest],
        "sample.gate_SK": gate_TK[smallest],
    }


@pytest.mark.parametrize("model_type", SPLIT)
def test_statistics_are_the_sums_by_definition(model_type: str, tiny: Tiny) -> None:
    """Every field of every accumulator; more tokens than a sample holds."""
    batches = [
        batch(token_ids(4, 48, seed=1), 0),
        batch(token_ids(4, 32, seed=2), 1000, padding=(9, 0, 31, 2)),
        batch(token_ids(1, 9, seed=3), 2000),
        batch(token_ids(5, 48, seed=4), 4000),
    ]
    found = walk(opened(tiny(model_type)), batches, 2, EVERYTHING)[1]
    model = stock(tiny(model_type))
    if model_type not in ("dbrx", "llama4_text", "longcat_flash"):
        model.set_experts_implementation("eager")
    with recorded(model) as seen:
        plain_logits(model, batches)
    modules = {layer_of(name): module for name, module in experts_modules(model).items()}
    assert found.keys() == seen.keys() == modules.keys()
    for layer, statistics in found.items():
        expected = sums_by_definition(modules[layer], seen[layer], batches)
        actual = statistics.to_tensors()
        assert actual.keys() == expected.keys()
        assert statistics.tokens > SAMPLE_SIZE == len(actual["sample.key_S"])
        for name, tensor in actual.items():
            if tensor.dtype == torch.int64:
                assert torch.equal(tensor, expected[name]), (layer, name)
            else:
                assert distance(tensor, expected[name]) < 1e-5, (layer, name)


def test_second_run_of_a_changed_layer(tiny: Tiny) -> None:
    """A visitor that changes weights and says so decides what the next layers see."""
    batches = three_batches()[:1]
    model = opened(tiny("mixtral"))

    def silence(change: bool) -> Callable[[Any, LayerStatistics], bool]:
        def visit(site: Any, statistics: LayerStatistics) -> bool:
            if change and site.shape.layer == 1:
                down = torch.zeros_like(site.experts.down_proj)
                site.experts.down_proj = nn.Parameter(down, requires_grad=False)
            return change and site.shape.layer == 1

        return visit

    logits: dict[bool, Tensor] = {}
    for change in (False, True):
        with Walk(model, batches, 1) as running:
            running.layers(["routing"], silence(change))
            running.logits(lambda _, value, change=change: logits.update({change: value}))
    reference = stock(tiny("mixtral"))
    with torch.no_grad():
        reference.model.layers[1].mlp.experts.down_proj.zero_()
    expected = plain_logits(reference, batches)[0]
    torch.testing.assert_close(logits[True], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits[True], logits[False], atol=1e-2)


# ---- housekeeping --------------------------------------------------------------------------------


def walkers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("moeprune")]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("where", ["layer", "norm", "visit"])
def test_an_error_ends_everything(
    where: str, workers: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error surfaces, no thread stays, layers have their own forward, and it works again."""
    batches = three_batches()
    model = opened(tiny("mixtral"))
    broken = model.layers[2].mlp if where == "layer" else model.model.model.norm
    forward = type(broken).forward

    def fail(self: nn.Module, x: Tensor, *args: Any) -> Any:
        if where != "visit" and self is broken and x.shape[1] == 9:  # the third batch
            raise RuntimeError("broken on purpose")
        return forward(self, x, *args)

    def visit(site: Any, statistics: LayerStatistics) -> bool:
        if where == "visit" and site.shape.layer == 2:
            raise RuntimeError("broken on purpose")
        return False

    threads = torch.get_num_threads()
    with monkeypatch.context() as patch:
        patch.setattr(type(broken), "forward", fail)
        with (
            pytest.raises(RuntimeError, match="broken on purpose"),
            Walk(model, batches, workers) as running,
        ):
            assert walkers()
            running.layers(["routing"], visit)
            running.logits(lambda index, value: None)
    assert not walkers()
    assert torch.get_num_threads() == threads
    assert all("forward" not in layer.__dict__ for layer in model.layers)
    assert all(p.is_meta for layer in model.layers for p in layer.parameters())
    implementations = {
        m.config._experts_implementation for m in experts_modules(model.model).values()
    }
    assert implementations == {"grouped_mm"}
    expected = plain_logits(stock(tiny("mixtral")), batches)
    for found, plain in zip(walk(model, batches, workers)[0], expected, strict=True):
        torch.testing.assert_close(found, plain, rtol=0, atol=0)
    assert not walkers()


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_layers_come_and_go(model_type: str, tiny: Tiny) -> None:
    model = opened(tiny(model_type))
    assert all(p.is_meta for p in model.model.parameters())
    model.load_resident()
    resident = {name for name, p in model.model.named_parameters() if not p.is_meta}
    assert resident == {
        name for name, _ in model.model.named_parameters() if not name.startswith(model.prefix)
    }
    reference = dict(stock(tiny(model_type)).named_parameters())
    for index, layer in enumerate(model.layers):
        model.load_layer(index)
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter, reference[f"{model.prefix}.{index}.{name}"])
        model.free_layer(index)
        assert {name for name, p in model.model.named_parameters() if not p.is_meta} == resident


def test_at_most_two_layers_are_in_memory(tiny: Tiny) -> None:
    model = opened(tiny("mixtral"))
    most = 0

    def visit(site: Any, statistics: LayerStatistics) -> bool:
        nonlocal most
        loaded = [not any(p.is_meta for p in layer.parameters()) for layer in model.layers]
        assert loaded[site.shape.layer]
        partly = [any(not p.is_meta for p in layer.parameters()) for layer in model.layers]
        most = max(most, sum(partly))
        return False

    with Walk(model, three_batches(), 2) as running:
        running.layers(["routing"], visit)
    assert most <= 2
    assert all(p.is_meta for layer in model.layers for p in layer.parameters())


def test_logits_of_few_batches_at_once(tiny: Tiny) -> None:
    """One slow batch does not make those behind it pile up."""
    model, passed = opened(tiny("olmoe")), threading.Event()
    batches = [batch(token_ids(1, 9 if n else 24, seed=n), 100 * n) for n in range(8)]
    most = 0

    def slow(module: nn.Module, args: Any) -> None:
        if args[0].shape[1] == 24:
            passed.wait(0.2)  # for as long as all others would take

    hook = model.model.get_output_embeddings().register_forward_pre_hook(slow)
    with Walk(model, batches, 2) as running:

        def finished(index: int, logits: Tensor) -> None:
            nonlocal most
            held = [job.output for job in running._lockstep.jobs]
            most = max(most, 1 + sum(hasattr(output, "logits") for output in held))

        running.layers()
        running.logits(finished)
    hook.remove()
    assert most <= 2


def test_progress_counts_batches_and_layers(tiny: Tiny) -> None:
    steps: list[tuple[int, int]] = []
    model = opened(tiny("deepseek_v3"))
    with Walk(model, three_batches(), 2, lambda *step: steps.append(step)) as running:
        running.layers(["routing"])
    assert steps == [(i, 12) for i in range(1, 13)]
