"""A run's result pieced together from what a folder holds: plans, statistics, checkpoints, scores.

For folders that no single command made, and for runs that were stopped: what is missing is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeprune.core.plan import FORMAT as PLAN
from moeprune.errors import MoepruneError
from moeprune.files import load_json, sha256_file
from moeprune.models.checkpoint import DEMO, Checkpoint
from moeprune.models.data import load_tokenizer
from moeprune.models.store import MANIFEST, STATISTICS_FORMAT, StatisticsStore, read_plan
from moeprune.models.surgery import PLAN_COPY, PROVENANCE_FORMAT
from moeprune.pipeline import facts
from moeprune.pipeline.atlas import atlas

EVALUATION = "moeprune.evaluation/1"
_MAX = 1 << 26
_MOST = 64  # files and folders that are looked into
_WHOLE = {
    "method": str, "options": dict, "budget": dict, "seed": int, "model": dict, "warnings": list,
    "versions": dict,
}  # fmt: skip
_WHAT = "give what demo, prune, compare or run wrote, or a folder with plans and statistics"


@dataclass
class _Found:
    """What a folder holds; plans and checkpoints by the SHA-256 of the plan."""

    plans: dict[str, dict[str, Any]] = field(default_factory=dict)
    checkpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    stores: list[StatisticsStore] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def gather(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The result (``moeprune.run/1``) of what ``folder`` holds, and what it does not hold.

    Raises:
        MoepruneError: it holds neither a plan nor statistics.
    """
    found = _Found()
    places = [folder, *sorted(p for p in folder.iterdir() if p.is_dir())]
    if len(places) > _MOST:
        found.wrong.append(f"{len(places) - _MOST} folders were not looked into")
    for place in places[:_MOST]:
        for file, data in _documents(place):
            try:
                _sort(file, data, found)
            except MoepruneError as error:
                found.wrong.append(f"{file.name}: {error.problem}")
    if not (found.plans or found.stores):
        detail = f" ({found.wrong[0]})" if found.wrong else ""
        raise MoepruneError(
            f"{folder} is no run: it holds no plan and no statistics{detail}", _WHAT
        )
    base = _base(found)
    rows = [_row(key, data, found, base) for key, data in found.plans.items()]
    store = next(
        (s for s in found.stores if s.manifest["model"]["fingerprint"] == base["fingerprint"]), None
    )
    missing = [*found.wrong, *_missing(rows, store)]
    used = _used(base, found)
    if used and not facts.of_one_text(used):
        missing.append(
            "evaluations are of different texts or dtypes: their perplexities cannot be compared "
            "(moeprune evaluate with the same --data and --dtype)"
        )
    result: dict[str, Any] = {
        "format": "moeprune.run/1",
        "command": f"moeprune report {folder}",
        "model": base,
        "rows": [_original(base, found), *rows],
        "warnings": missing,
        "versions": next((dict(p["versions"]) for p in found.plans.values()), {}),
        "seconds": None,
    }
    if store is not None:
        result["versions"] = dict(store.manifest.get("versions") or result["versions"])
        result["calibration"] = {**facts.calibration(store), "seconds": None}
        result["usage"] = facts.usage(store)
        result["atlas"] = atlas(store, _tokenizer(base["name"], rows))
    return result, missing


def _documents(place: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """JSON objects of one folder; the copy of a plan in a checkpoint comes after the plan."""
    files = sorted(place.glob("*.json"), key=lambda file: (file.name == PLAN_COPY, file.name))
    for file in files[:_MOST]:
        try:
            data = load_json(file, _MAX)
        except (OSError, ValueError):
            continue
        if isinstance(data, dict):
            yield file, data


def evaluations(place: Path) -> list[dict[str, Any]]:
    """What ``evaluate --json`` printed into files of one folder."""
    return [data for _, data in _documents(place) if data.get("format") == EVALUATION]


def _sort(file: Path, data: dict[str, Any], found: _Found) -> None:
    """Put a document where it belongs, by what it says of itself."""
    form = data.get("format")
    if form == STATISTICS_FORMAT and file.name == MANIFEST:
        found.stores.append(StatisticsStore.open(file.parent))
    elif form == PLAN:
        copy = file.name == PLAN_COPY
        layers = facts.layers_of(data) if copy else facts.plan_facts(read_plan(file))
        label = file.parent.resolve().name if copy else file.name.removesuffix(".json")
        if not all(isinstance(data.get(key), kind) for key, kind in _WHOLE.items()):
            raise MoepruneError("the plan is not whole")
        plan = {key: data[key] for key in _WHOLE}
        counts = {index: layer["experts"] for index, layer in data["layers"].items()}
        plan |= {"label": label.removesuffix(".plan"), "layers": layers, "counts": counts}
        # a plan and its copies decide the same: the first one found stands for all
        decision = (plan["method"], plan["budget"], plan["options"], plan["model"], data["layers"])
        known = [k for k, other in found.plans.items() if other["decision"] == decision]
        key = known[0] if known else f"{file}"
        if not known:
            found.plans[key] = plan | {"decision": decision}
        if copy and (file.parent / "config.json").is_file():  # else it was never finished
            found.checkpoints.setdefault(key, {})["sha256"] = sha256_file(file)
            found.checkpoints[key]["path"] = str(file.parent)
    elif form == PROVENANCE_FORMAT:
        found.checkpoints[f"made {file.parent}"] = data
    elif form == EVALUATION:
        found.evaluations.append(data)


def _made(key: str, found: _Found) -> dict[str, Any]:
    """What the checkpoint of a plan says of itself."""
    path = found.checkpoints.get(key, {}).get("path")
    return found.checkpoints.get(f"made {path}", {})


def _sizes(made: Mapping[str, Any], name: str) -> list[Any]:
    """Before and after, as far as it is known."""
    pair = made.get(name)
    return pair if isinstance(pair, list) and len(pair) == 2 else [None, None]


def _base(found: _Found) -> dict[str, Any]:
    """The model that it began with, as far as plans, statistics and checkpoints know it."""
    made = next((m for key in found.plans if (m := _made(key, found))), {})
    models = [plan["model"] for plan in found.plans.values()]
    models += [store.manifest["model"] for store in found.stores]
    keys = ("name", "model_type", "layers", "moe_layers", "experts", "top_k", "fingerprint")
    try:
        return {
            **{key: models[0][key] for key in keys},
            "experts": max([models[0]["experts"], *_counts(found).values()]),
            "parameters": _sizes(made, "parameters")[0],
            "bytes": _sizes(made, "tensor_bytes")[0],
        }
    except (KeyError, TypeError, LookupError) as error:
        raise MoepruneError(f"the run does not say which model it is of: {error}", _WHAT) from error


def _counts(found: _Found) -> dict[str, int]:
    """Experts by layer, of which layers may have different numbers; empty where nothing names them.

    A plan that drops whole layers names none.
    """
    for plan in found.plans.values():
        if plan["counts"]:
            counts: dict[str, int] = plan["counts"]
            return counts
    layers = found.stores[0].manifest["layers"] if found.stores else {}
    return {index: entry["shape"]["experts"] for index, entry in layers.items()}


def _total(base: Mapping[str, Any], counts: Mapping[str, int]) -> int:
    """Experts of all layers."""
    return sum(counts.values()) or len(base["moe_layers"]) * int(base["experts"])


def _evaluation(key: str, found: _Found) -> dict[str, Any]:
    """Of the checkpoint of a plan, which may have another name than the plan."""
    path = found.checkpoints.get(key, {}).get("path")
    names = [] if path is None else [Path(path).resolve().name]
    names.append(found.plans[key]["label"])
    return next((e for name in names for e in found.evaluations if e.get("model") == name), {})


def _used(base: Mapping[str, Any], found: _Found) -> list[dict[str, Any]]:
    """The evaluations of all rows."""
    own = [one for one in found.evaluations if one.get("model") == base["name"]]
    return [*own[:1], *(one for key in found.plans if (one := _evaluation(key, found)))]


def _row(key: str, plan: dict[str, Any], found: _Found, base: Mapping[str, Any]) -> dict[str, Any]:
    made, total = _made(key, found), _total(base, plan["counts"])
    kept = sum(len(entry["keep"]) for entry in plan["layers"].values())

    return {
        "name": plan["label"],
        **{name: plan[name] for name in ("method", "budget", "options", "seed")},
        "experts": _sizes(made, "experts")[1] if made else kept,
        "experts_before": total,
        "parameters": _sizes(made, "parameters")[1],
        "nonzero_parameters": _sizes(made, "nonzero_parameters")[1],
        "bytes": _sizes(made, "tensor_bytes")[1],
        "perplexity": {},
        "seconds": {},
        "path": found.checkpoints.get(key, {}).get("path"),
        "warnings": list(plan["warnings"]),
        "plan": plan["layers"],
        **facts.measured(_evaluation(key, found)),
    }


def _original(base: Mapping[str, Any], found: _Found) -> dict[str, Any]:
    total = _total(base, _counts(found))
    return {
        "name": "original",
        "method": None,
        "experts": total,
        "experts_before": total,
        "parameters": base["parameters"],
        "nonzero_parameters": base["parameters"],
        "bytes": base["bytes"],
        "perplexity": {},
        "seconds": {},
        **facts.measured_original(base["name"], _used(base, found)),
    }


def _missing(rows: list[dict[str, Any]], store: StatisticsStore | None) -> list[str]:
    """In words, with what to run."""
    lines = []
    if store is None:
        lines.append(
            "no statistics of the original: usage, domains and tokens of experts are unknown "
            "(moeprune calibrate MODEL --out FOLDER/statistics)"
        )
    if not rows:
        lines.append("no plan: nothing was decided yet (moeprune plan)")
    unwritten = [row["name"] for row in rows if row["path"] is None]
    if unwritten:
        lines.append(f"no checkpoint of {', '.join(unwritten)}: sizes are unknown (moeprune apply)")
    unmeasured = [row["name"] for row in rows if not row["perplexity"]]
    if unmeasured:
        lines.append(
            f"no evaluation of {', '.join(unmeasured)}: what was lost is unknown "
            "(moeprune evaluate CHECKPOINT --teacher MODEL --json > FOLDER/evaluation.json)"
        )
    return lines


def _tokenizer(name: str, rows: list[dict[str, Any]]) -> Any:
    """Of the model or of a checkpoint made from it; None where there is none to be had."""
    for place in (*(row["path"] for row in rows if row["path"]), *([DEMO] if name == DEMO else ())):
        try:
            return load_tokenizer(Checkpoint.open(place))
        except MoepruneError:
            continue
    return None
