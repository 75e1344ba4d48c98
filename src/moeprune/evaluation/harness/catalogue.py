"""Finds tasks of the installed harness by name without reading its fourteen thousand files twice.

The harness's own index takes half a minute; here a scan for names finds the few folders that
matter, and the index is built over these.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moeprune.errors import DataError, MoepruneError
from moeprune.evaluation import blimp
from moeprune.evaluation.harness.protocols import PROTOCOLS
from moeprune.models.native import quiet_transformers

_NAMED = re.compile(
    rb"""^\s*["']?(?:task|group|tag)["']?\s*:[ \t]*["']?([^\s"'#,\[\]]*)"""
    rb"""((?:["']?[ \t]*\r?\n\s*-[ \t]+["']?[\w.\-]+["']?)*)""",
    re.MULTILINE,
)
_ITEM = re.compile(rb"-[ \t]+[\"']?([\w.\-]+)")


def harness_version() -> str:
    """The installed version.

    Raises:
        MoepruneError: it is not installed.
    """
    try:
        return version("lm_eval")
    except PackageNotFoundError as error:
        raise MoepruneError(
            "tasks need lm-evaluation-harness, which is not installed",
            "pip install 'moeprune[eval]'; --tasks blimp_sample alone needs nothing more",
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """No advice and no bars from the harness: ours say how far it is."""
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    from datasets.utils import logging as datasets_logging
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    level = logger.level
    modules = (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface)

    def no_bar(*args: Any, **kwargs: Any) -> Any:
        return tqdm(*args, **{**kwargs, "disable": True})

    logger.setLevel(logging.ERROR)
    datasets_logging.disable_progress_bar()
    for module in modules:
        module.tqdm = no_bar
    try:
        with quiet_transformers():
            yield
    finally:
        for module in modules:
            module.tqdm = tqdm
        datasets_logging.enable_progress_bar()
        logger.setLevel(level)


@dataclass(frozen=True)
class Leaf:
    """One task of the harness, as a name that was asked for leads to it.

    Attributes:
        name: in the harness.
        config: its configuration, functions unresolved.
        overrides: what a group on the way changes.
    """

    name: str
    config: Mapping[str, Any]
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def evaluated(self) -> str | None:
        """The split that is measured: test where there is one, as in the harness."""
        merged = {**self.config, **self.overrides}
        return merged.get("test_split") or merged.get("validation_split")


class Catalogue:
    """The tasks that names lead to.

    Args:
        names: of tasks, groups or tags.
        include_path: folder with more task files; these come first.

    Raises:
        DataError: a name is unknown.
    """

    def __init__(self, names: Iterable[str], include_path: Path | None = None) -> None:
        self._own = [] if include_path is None else [include_path]
        self._folders: set[Path] = set()
        self.manager = self._index([])
        missing = {name for name in names if name not in self._known}
        while missing:
            unknown = sorted(missing - set(_places()))
            if unknown:
                raise _unknown(unknown[0], [*_places(), *self._known])
            found = {folder for name in missing for folder in _places()[name]}
            if not found - self._folders:  # a tag that only templates mention
                self.manager = self._index(None)
                missing -= set(self._known)
                if missing:
                    raise _unknown(sorted(missing)[0], self._known)
                break
            self._folders |= found
            self.manager = self._index(sorted(self._folders))
            wanted = {child for name in names for child in self._names(name)}
            missing = wanted - set(self._known)

    @property
    def _known(self) -> Mapping[str, Any]:
        index: Mapping[str, Any] = self.manager.task_index
        return index

    def _index(self, folders: list[Path] | None) -> Any:
        from lm_eval.tasks import TaskManager

        with quiet():
            return TaskManager(
                include_defaults=folders is None, include_path=[*(folders or ()), *self._own]
            )

    def _names(self, name: str) -> Iterator[str]:
        """A name and all that it leads to, known or not."""
        yield name
        entry = self._known.get(name)
        for child, _ in () if entry is None else _children(entry):
            yield from self._names(child)

    def is_group(self, name: str) -> bool:
        """Whether a name leads to several tasks."""
        return self._known[name].kind.name in ("GROUP", "TAG")

    def by_size(self, name: str) -> bool:
        """Whether the harness averages a group over questions, and not over tasks."""
        config = self._known[name].cfg or {}
        listed = config.get("aggregate_metric_list") or [{}]
        first = listed[0] if isinstance(listed, list) else listed
        return bool(first.get("weight_by_size", True))

    def leaves(self, name: str) -> list[Leaf]:
        """The tasks that a name leads to, in the harness's order, each once."""
        found: dict[str, Leaf] = {}
        for leaf in self._leaves(name, {}):
            found.setdefault(leaf.name, leaf)
        return list(found.values())

    def _leaves(self, name: str, overrides: Mapping[str, Any]) -> Iterator[Leaf]:
        entry = self._known[name]
        if not self.is_group(name):
            yield Leaf(name, entry.cfg or {}, overrides)
        for child, own in _children(entry):
            yield from self._leaves(child, {**overrides, **own})


def _children(entry: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if entry.kind.name == "TAG":
        yield from ((name, {}) for name in sorted(entry.tags))
    elif entry.kind.name == "GROUP":
        for item in entry.cfg.get("task") or []:
            if isinstance(item, str):
                yield item, {}
                continue
            name = item.get("task", item.get("group"))
            if not isinstance(name, str) or isinstance(item.get("task"), list):
                raise DataError(
                    f"the group {entry.name!r} defines tasks inside itself",
                    "give the names of single tasks",
                )
            yield name, {key: v for key, v in item.items() if key not in ("task", "group")}


@lru_cache(maxsize=1)
def _places() -> dict[str, tuple[Path, ...]]:
    """Folders of the harness in which a name is defined, by name."""
    import lm_eval.tasks

    found: dict[str, set[Path]] = {}
    for file in Path(lm_eval.tasks.__file__).parent.rglob("*"):
        if file.suffix not in ("", ".yaml") or not file.is_file():
            continue  # templates that tasks include have no suffix
        for name, items in _NAMED.findall(file.read_bytes()):
            for each in [name] if name else _ITEM.findall(items):
                found.setdefault(each.decode(), set()).add(file.parent)
    return {name: tuple(sorted(folders)) for name, folders in found.items()}


def _unknown(name: str, known: Iterable[str]) -> DataError:
    ours = (*PROTOCOLS, blimp.NAME)
    close = difflib.get_close_matches(name, [*ours, *known], n=3, cutoff=0.6)
    if close:
        return DataError(f"unknown task {name!r}", f"did you mean {' or '.join(close)}?")
    return DataError(
        f"unknown task {name!r}",
        f"lm-eval ls tasks lists those of the harness; {', '.join(ours)} are ours",
    )
