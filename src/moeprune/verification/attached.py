"""Rules about prediction heads behind the decoder layers (multi-token prediction)."""

from __future__ import annotations

from moeprune.models import quirks
from moeprune.verification.finding import ERROR, WARNING, Finding, Found, Rule, Skip
from moeprune.verification.subject import CONFIG, Subject, layer_in_name, number

_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
_REMEDY = "prune the head like the nearest layer, or delete it and set {} to 0"


def _promised(subject: Subject) -> tuple[str, int]:
    found = ((key, number(subject.text, key) or 0) for key in _COUNTS)
    return max(found, key=lambda item: item[1])


def heads(subject: Subject) -> Found:
    """As many as config.json says."""
    subject.require_all()
    key, count = _promised(subject)
    stored = [name for name in subject.tensors if subject.attached(name)]
    if not count and not stored:
        raise Skip("the model has no prediction heads")
    if count and not stored:
        problem = f"{key} is {count}, but no tensor of a prediction head is stored"
        remedy = f"set {key} to 0, or copy the head and prune it"
        yield Finding("attached-heads", WARNING, CONFIG, None, problem, remedy)
    elif stored and not count and any(key in subject.text for key in _COUNTS):
        problem = f"it belongs to a prediction head, but {key} is 0"
        yield subject.at("attached-heads", WARNING, min(stored), problem, "delete the head")


def head_experts(subject: Subject) -> Found:
    """A head routes over as many experts as the layers do."""
    subject.require_all()
    stored = [name for name in subject.tensors if subject.attached(name)]
    groups = [group for group in subject.groups if subject.attached(group.prefix)]
    fused = [k for k in stored if ".experts." in k and len(subject.tensors[k].shape) == 3]
    if not groups and not fused:
        raise Skip("no prediction head with experts is stored")
    remedy = _REMEDY.format(_promised(subject)[0])
    blocks: dict[str, int] = {}
    for group in groups:
        ids = {*group.matrices, *group.novices}
        blocks[group.prefix] = len(ids)
        expected = subject.experts(group.layer)
        if ids != set(range(expected)):
            key = min(group.matrices[max(group.matrices)].values()) if group.matrices else ""
            problem = f"a prediction head has {len(ids)} experts, config.json says {expected}"
            yield subject.at("attached-experts", ERROR, key, problem, remedy)
    for key in fused:
        rows, expected = subject.tensors[key].shape[0], subject.experts(layer_in_name(key))
        blocks[key.partition("experts.")[0] + "experts."] = rows
        if rows != expected:
            problem = f"a prediction head has {rows} experts, config.json says {expected}"
            yield subject.at("attached-experts", ERROR, key, problem, remedy)
    for prefix, experts in blocks.items():
        for router in quirks.ROUTER_NAMES:
            key = f"{prefix.removesuffix('experts.')}{router}.weight"
            info = subject.tensors.get(key)
            if info is not None and info.shape[:1] != (experts,):
                problem = f"{list(info.shape)} router weights for {experts} experts of the head"
                yield subject.at("attached-experts", ERROR, key, problem, remedy)


RULES = (
    Rule("attached-heads", "prediction heads are stored if config.json promises them", heads),
    Rule("attached-experts", "prediction heads have as many experts as the layers", head_experts),
)
