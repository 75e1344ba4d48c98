"""Plans in the formats of servers that leave experts out while they load an unpruned checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from moeprune.core.plan import LayerPlan, Plan
from moeprune.errors import PlanError
from moeprune.files import json_bytes

FORMAT = "moeprune.profile/1"


def export(plan: Plan, profile: str = "moeprune") -> bytes:
    """The contents of a profile that keeps the experts that ``plan`` keeps.

    Args:
        plan: one that deletes whole experts and does nothing else.
        profile: a name in ``PROFILES``.

    Raises:
        PlanError: the plan does more than delete experts, or the format cannot say it.
    """
    refuse_more(plan)
    return PROFILES[profile](plan)


def refuse_more(plan: Plan) -> None:
    """Raise ``PlanError`` unless the plan deletes whole experts and does nothing else."""
    apply = "moeprune apply writes a checkpoint that has it"
    if plan.drop_layers:
        raise PlanError("a server that prunes at load cannot leave out decoder layers", apply)
    for index, layer in sorted(plan.layers.items()):
        more = [name for name, there in _beyond(layer).items() if there]
        if more:
            raise PlanError(
                f"layer {index}: a server that prunes at load cannot make {more[0]}", apply
            )


def _beyond(layer: LayerPlan) -> dict[str, bool]:
    return {
        "novices": bool(layer.replaced),
        "masks": layer.mask is not None,
        "merged or narrowed experts": layer.neurons is not None or layer.stored is not None,
        "new router rows": layer.router_CE is not None,
        "experts that answer for others": layer.served_by is not None,
        "constants in outputs": layer.offsets_CH is not None,
        "experts of lower rank": bool(layer.ranks),
    }


def _own(plan: Plan) -> bytes:
    return json_bytes(
        {
            "format": FORMAT,
            "method": plan.method,
            "model": dict(plan.model),
            "layers": {
                str(index): {"experts": layer.experts, "keep": list(layer.keep)}
                for index, layer in sorted(plan.layers.items())
            },
        }
    )


def _riy(plan: Plan) -> bytes:
    gone = [
        [index, expert] for index, layer in sorted(plan.layers.items()) for expert in layer.dropped
    ]
    return json_bytes(
        {"version": 1, "model": str(plan.model.get("name", "")), "pruned_experts": gone}
    )


def _ascend(plan: Plan) -> bytes:
    counts = {(len(layer.keep), layer.experts) for layer in plan.layers.values()}
    if len(counts) != 1:
        raise PlanError(
            "vllm-ascend keeps the same number of experts in every layer",
            "make a plan with --uniform, or choose another --format",
        )
    lines = [
        json.dumps({str(index): [*layer.keep, *layer.dropped]})
        for index, layer in sorted(plan.layers.items())
    ]
    return ("\n".join(lines) + "\n").encode()


PROFILES: Mapping[str, Callable[[Plan], bytes]] = {"moeprune": _own, "riy": _riy, "ascend": _ascend}
"""What servers read: docs/serving.md says which, and what of it has been tried."""
