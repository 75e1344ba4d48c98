"""Rules about config.json that need no weights: routing, code, special tokens."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moeprune.models.native import knows_class, knows_type
from moeprune.verification.finding import ERROR, NOTE, WARNING, Finding, Found, Rule, Skip
from moeprune.verification.shards import read_json
from moeprune.verification.subject import CONFIG, Subject, first_line, number

_GENERATION = "generation_config.json"


def _error(rule: str, problem: str, remedy: str) -> Finding:
    return Finding(rule, ERROR, CONFIG, None, problem, remedy)


def architecture(subject: Subject) -> Found:
    """model_type and architectures."""
    kind, names = subject.config.get("model_type"), subject.config.get("architectures")
    if not knows_type(kind) and "auto_map" not in subject.config:
        yield _error(
            "architecture", f"transformers knows no model_type {kind!r}", "copy the original's"
        )
    name = names[0] if isinstance(names, list) and names else None
    if name is None:
        yield Finding(
            "architecture", WARNING, CONFIG, None, "it names no architectures: serving engines "
            "find the class by that name", "copy the original's 'architectures'",
        )  # fmt: skip
    elif not knows_class(str(name)) and not any(
        str(target).endswith(f".{name}") for target in _auto_map(subject).values()
    ):
        yield _error(
            "architecture", f"transformers has no class {name!r}", "copy the original's name"
        )


def builds(subject: Subject) -> Found:
    """The model on meta."""
    _ = subject.tensors
    if subject.model_error is not None:
        if subject.quantised:
            raise Skip(first_line(subject.model_error))
        yield _error(
            "model", f"the model cannot be built from it: {first_line(subject.model_error)}",
            "compare it with the original's config.json",
        )  # fmt: skip


def _counts(subject: Subject) -> dict[int, str]:
    """E -> where it stands."""
    counts = {subject.experts(): subject.experts_key}
    for layer, experts in subject.uneven.items():
        counts.setdefault(experts, f"per_layer_config.{layer}")
    return counts


def top_k(subject: Subject) -> Found:
    """K <= E."""
    key, k = subject.top_k
    for experts, where in _counts(subject).items():
        if not 0 < k <= experts:
            yield _error(
                "top-k", f"{key} is {k}, but {where} is {experts}",
                f"keep at least {k} experts in every layer; a smaller {key} is another model",
            )  # fmt: skip


def groups(subject: Subject) -> Found:
    """Groups of equal size, large enough."""
    count = number(subject.text, "n_group") or 1
    if count == 1 or subject.text.get("topk_method") == "greedy":
        raise Skip("routing is not limited to groups")
    chosen = number(subject.text, "topk_group") or 1
    if not 0 < chosen <= count:
        yield _error(
            "groups", f"topk_group is {chosen} of {count} groups", "copy the original's topk_group"
        )
        return
    # DeepSeek-V2 ranks a group by its best expert, its successors by the sum of the two best
    ranked_by = 1 if subject.text.get("topk_method") == "group_limited_greedy" else 2
    k = subject.top_k[1]
    for experts, where in _counts(subject).items():
        each, rest = divmod(experts, count)
        remedy = f"keep the same number of experts in each of the {count} groups"
        if rest:
            problem = f"{where} is {experts}, not a multiple of n_group {count}: routers mix groups"
            yield _error("groups", problem, remedy)
        elif each < ranked_by:
            problem = f"groups of {each} experts are ranked by their best {ranked_by}"
            yield _error("groups", problem, f"{remedy}, at least {ranked_by}")
        elif k > chosen * each:
            problem = f"{k} experts per token, but {chosen} of the groups hold {chosen * each}"
            yield _error("groups", problem, f"{remedy}, at least {-(-k // chosen)}")


def _auto_map(subject: Subject) -> dict[str, Any]:
    table = subject.config.get("auto_map")
    return table if isinstance(table, dict) else {}


def auto_map(subject: Subject) -> Found:
    """Files and classes of remote code; they are parsed and never run."""
    table = _auto_map(subject)
    if not table:
        raise Skip("config.json has no auto_map")
    for name, target in table.items():
        for reference in target if isinstance(target, list) else [target]:
            if reference is not None:
                yield from _code(subject, name, str(reference))


def _code(subject: Subject, name: str, reference: str) -> Iterator[Finding]:
    local = reference.rpartition("--")
    if local[0]:
        yield Finding(
            "auto-map", NOTE, CONFIG, None, f"{name} is code of another repository, {local[0]}",
            "copy the file into this checkpoint, so that it opens without it",
        )  # fmt: skip
        return
    module, _, wanted = reference.rpartition(".")
    file = subject.path / f"{module}.py"
    if not module or Path(file.name).stem != module or not file.is_file():
        problem = f"{name} needs {module or reference}.py, which is not there"
        yield _error("auto-map", problem, "copy the file from where this checkpoint was made")
        return
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError) as error:
        problem = f"not Python that can be parsed: {first_line(error)}"
        yield Finding("auto-map", ERROR, file.name, None, problem, "copy the file again")
        return
    if wanted not in _defined(tree):
        problem = f"{name} needs the class {wanted}, which is not in it"
        yield Finding("auto-map", ERROR, file.name, None, problem, "correct auto_map or the file")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            needed = f"{node.module.split('.')[0]}.py"
            if not (subject.path / needed).is_file():
                problem = f"it imports {needed}, which is not there"
                yield Finding("auto-map", ERROR, file.name, None, problem, f"copy {needed} as well")


def _defined(tree: ast.Module) -> set[str]:
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def generated_class(subject: Subject) -> Found:
    """Results that stock classes cannot open name a class that can."""
    tables = {
        "approximate_experts": subject.novices,
        "per_layer_config": subject.uneven,
        "experts_served_by": subject.served,
        "expert_offsets": subject.entry("expert_offsets"),
    }
    needed = [key for key, table in tables.items() if table]
    if not needed:
        raise Skip("stock classes express this checkpoint")
    if "AutoModelForCausalLM" not in _auto_map(subject):
        yield _error(
            "generated-class",
            f"{needed[0]} needs a class of its own, but auto_map names no AutoModelForCausalLM",
            "write the checkpoint again with moeprune apply, or add modeling code and auto_map",
        )


def special_tokens(subject: Subject) -> Found:
    """Ids of special tokens in both configurations."""
    size = number(subject.text, "vocab_size")
    if size is None:
        raise Skip("config.json has no vocab_size")
    generation = read_json(subject.path / _GENERATION)
    parts = {CONFIG: subject.text, _GENERATION: generation if isinstance(generation, dict) else {}}
    for file, part in parts.items():
        for key, value in part.items():
            if not key.endswith("_token_id"):
                continue
            ids = value if isinstance(value, list) else [value]
            wrong = [i for i in ids if isinstance(i, int) and i >= size]
            if wrong:
                problem = f"{key} is {wrong[0]}, but the vocabulary has {size} tokens"
                remedy = "copy the original's value"
                yield Finding("special-tokens", ERROR, file, None, problem, remedy)


RULES = (
    Rule("architecture", "model_type and architectures are known", architecture),
    Rule("model", "transformers can build the model, without weights", builds),
    Rule("top-k", "every layer has at least as many experts as are chosen per token", top_k),
    Rule("groups", "routing groups are of equal size and hold enough experts", groups),
    Rule("auto-map", "the files and classes of auto_map are there; they are never run", auto_map),
    Rule("generated-class", "what stock classes cannot open names its class", generated_class),
    Rule("special-tokens", "ids of special tokens lie within the vocabulary", special_tokens),
)
