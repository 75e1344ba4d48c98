"""Rules about the files: what is there, what the index says, what was left behind."""

from __future__ import annotations

from pathlib import Path

from moeprune.models.checkpoint import INDEX
from moeprune.verification.finding import ERROR, WARNING, Finding, Found, Rule, Skip
from moeprune.verification.shards import SINGLE, read_json
from moeprune.verification.subject import CONFIG, Subject

_AGAIN = "copy or write the checkpoint again"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "optimizer.bin")


def config(subject: Subject) -> Found:
    """config.json."""
    file = subject.path / CONFIG
    if not file.is_file():
        yield Finding(
            "config", ERROR, CONFIG, None, "there is no config.json", "copy it from the original"
        )
    elif not isinstance(read_json(file), dict):
        problem = "config.json is not a JSON object"
        yield Finding("config", ERROR, CONFIG, None, problem, "copy it from the original, and edit")


def weights(subject: Subject) -> Found:
    """Shards that are damaged, or none at all."""
    if not subject.shards.names:
        others = [f.name for f in subject.path.iterdir() if f.suffix in _PICKLES]
        there = f", only {others[0]}" if others else ""
        yield Finding(
            "weights", ERROR, SINGLE, None, f"there are no safetensors weights{there}",
            "save the model again with transformers: save_pretrained writes safetensors",
        )  # fmt: skip
    for name, why in subject.shards.damaged.items():
        yield Finding("weights", ERROR, name, None, why, _AGAIN)
    if len(subject.shards.names) > 1 and not (subject.path / INDEX).is_file():
        yield Finding(
            "weights", ERROR, INDEX, None,
            f"{len(subject.shards.names)} shards but no index: transformers opens none of them",
            f"write {INDEX}, or join the shards to {SINGLE}",
        )  # fmt: skip


def _require_index(subject: Subject) -> None:
    if not (subject.path / INDEX).is_file():
        raise Skip("there is no index: the weights are one file")


def index(subject: Subject) -> Found:
    """The index against the shards."""
    _require_index(subject)
    weight_map = subject.weight_map
    if not weight_map:
        problem = "it is not JSON with a weight_map"
        yield Finding("index", ERROR, INDEX, None, problem, "write the index again")
        return
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            yield Finding(
                "index", ERROR, INDEX, None, f"it points outside the folder: {name!r}",
                "do not open this checkpoint; get it from its author again",
            )  # fmt: skip
        elif not (subject.path / name).is_file():
            tensor = min(key for key, file in weight_map.items() if file == name)
            yield Finding("index", ERROR, name, tensor, "this shard is missing", _AGAIN)
    for tensor, name in sorted(weight_map.items()):
        header = subject.shards.headers.get(name)
        if header is None or tensor in header:
            continue
        other = subject.shards.tensors.get(tensor)
        where = "in no shard" if other is None else f"in {other.file.name}"
        problem = f"the index says that it is in {name}, but it is {where}"
        yield Finding("index", ERROR, name, tensor, problem, "write the index again")
    for tensor, info in subject.shards.tensors.items():
        if tensor not in weight_map:
            problem = "it is in a shard but not in the index"
            remedy = "write the index again"
            yield Finding("index", WARNING, info.file.name, tensor, problem, remedy)


def index_size(subject: Subject) -> Found:
    """total_size."""
    _require_index(subject)
    subject.require_all()
    index = read_json(subject.path / INDEX)
    metadata = index.get("metadata") if isinstance(index, dict) else None
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    if said is None:
        raise Skip("the index has no total_size")
    size = sum(info.nbytes for info in subject.tensors.values())
    if said != size:
        problem = f"total_size is {said}, but the tensors have {size} bytes"
        remedy = f"set metadata.total_size to {size}"
        yield Finding("index-size", WARNING, INDEX, None, problem, remedy)


def duplicates(subject: Subject) -> Found:
    """One name, two shards."""
    for tensor, first, second in subject.shards.twice:
        problem = f"it stands in {first} as well: which one is opened depends on the order"
        remedy = "delete one of the two"
        yield Finding("duplicate-tensors", ERROR, second, tensor, problem, remedy)


def leftovers(subject: Subject) -> Found:
    """Weights that nothing opens, or that are opened by mistake."""
    names = set(subject.shards.names)
    if not names:
        raise Skip("there are no safetensors weights")
    for file in sorted(subject.path.iterdir()):
        if file.name in names or not file.is_file():
            continue
        if file.name == SINGLE:
            yield Finding(
                "leftover-files", ERROR, SINGLE, None,
                f"transformers opens it and not the shards of {INDEX}",
                "delete whichever of the two is the old one",
            )  # fmt: skip
        elif file.suffix == ".safetensors":
            problem = "it is not in the index: an old shard, or one that was forgotten"
            remedy = "delete it, or write the index again"
            yield Finding("leftover-files", WARNING, file.name, None, problem, remedy)
        elif file.suffix in _PICKLES and file.name not in _NOT_WEIGHTS:
            problem = "pickled weights beside safetensors: opening them can run code"
            remedy = "delete it; the safetensors files hold the weights"
            yield Finding("leftover-files", WARNING, file.name, None, problem, remedy)


RULES = (
    Rule("config", "config.json is there and is a JSON object", config),
    Rule("weights", "there are safetensors weights, and every shard is whole", weights),
    Rule("index", "the index names every tensor in the shard that holds it", index),
    Rule("index-size", "the index's total_size is the size of the tensors", index_size),
    Rule("duplicate-tensors", "no tensor stands in two shards", duplicates),
    Rule("leftover-files", "no weights lie beside those that are opened", leftovers),
)
