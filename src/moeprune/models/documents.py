"""Documents of other kinds than lines of text: rows of a dataset, and conversations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune.errors import DataError

PREFIX = "dataset:"
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell halves of characters


@dataclass(frozen=True)
class Dataset:
    """A split of a dataset, read through the ``datasets`` library.

    Attributes:
        name: on the hub, or a local directory: what ``save_to_disk`` wrote, or files that
            ``load_dataset`` understands (JSONL, Parquet, CSV, text).
        config: empty for the only one.
        split: empty for ``train``, or for all of a directory without splits.
        field: of every row; empty takes ``text``, and ``messages`` where there is no text.
    """

    name: str
    config: str = ""
    split: str = ""
    field: str = ""

    @classmethod
    def parse(cls, source: str) -> Dataset:
        """``dataset:NAME[:CONFIG][:SPLIT][#FIELD]``; what is left empty is not given.

        Raises:
            DataError: no name, or too many parts.
        """
        place, _, field = source.removeprefix(PREFIX).partition("#")
        parts = place.split(":")
        if not parts[0] or len(parts) > 3:
            raise DataError(
                f"not a dataset: {source!r}",
                "write dataset:NAME[:CONFIG][:SPLIT][#FIELD], without a CONFIG dataset:NAME::SPLIT",
            )
        name, config, split = (*parts, "", "")[:3]
        return cls(name, config, split, field)

    @property
    def domain(self) -> str:
        """What its domain is called where no name is given."""
        return Path(self.name).name or "dataset"

    def __str__(self) -> str:
        parts = [self.name, self.config, self.split]
        while not parts[-1]:
            parts.pop()
        return PREFIX + ":".join(parts) + (f"#{self.field}" if self.field else "")

    def documents(self, tokenizer: Any) -> Iterator[str]:
        """The text of every row, in order; a dataset of the hub is read only as far as needed.

        Raises:
            DataError: the library is not installed, there is no such dataset, split or field, or a
                row cannot be read.
        """
        for number, row in enumerate(self._rows()):
            yield document_text(row, tokenizer, f"{self}, row {number}", self.field)

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        try:
            import datasets  # noqa: PLC0415  (an optional dependency)
        except ImportError as error:
            raise DataError(f"{self}: needs datasets", "pip install 'moeprune[data]'") from error
        try:
            yield from self._open(datasets)
        except DataError:
            raise
        except Exception as error:  # every reader of every format has errors of its own
            why = [*str(error).splitlines(), type(error).__name__][0]
            raise DataError(
                f"{self} cannot be read: {why[:160]}",
                "give a dataset's name on the hub or a local directory, and its config and split",
            ) from error

    def _open(self, datasets: Any) -> Any:
        saved = any((Path(self.name) / f).is_file() for f in ("state.json", "dataset_dict.json"))
        if saved:
            found = datasets.load_from_disk(self.name)
        else:
            found = datasets.load_dataset(self.name, self.config or None, streaming=True)
        splits = list(found) if isinstance(found, dict) else []
        if not splits and not self.split:
            return found
        split = self.split or "train"
        if split not in splits:
            raise DataError(
                f"{self} has no split {split!r}", f"it has {', '.join(map(str, splits)) or 'none'}"
            )
        return found[split]


def document_text(record: Any, tokenizer: Any, where: str, field: str = "") -> str:
    """The text of one record: a string, or a conversation rendered by the chat template.

    Args:
        record: an object with ``text``, or else with ``messages``.
        tokenizer: whose template; None where conversations cannot be read.
        where: for errors.
        field: to read instead.

    Raises:
        DataError: there is neither, or it cannot be rendered.
    """
    names = (field,) if field else ("text", "messages")
    name = next((n for n in names if isinstance(record, Mapping) and n in record), None)
    found = None if name is None else record[name]
    if isinstance(found, list) and all(isinstance(m, Mapping) and "role" in m for m in found):
        found = _rendered(found, tokenizer, where)
    elif name != names[0]:
        found = None  # messages are a list
    if not isinstance(found, str) or _SURROGATE.search(found):
        raise DataError(
            f"{where}: no {' or '.join(map(repr, names))} that is text or a conversation",
            'write one {"text": "..."} or {"messages": [{"role": ..., "content": ...}]} a line',
        )
    return found


def _rendered(messages: list[Any], tokenizer: Any, where: str) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{where}: a conversation, and the tokenizer has no chat template",
            'copy chat_template.jinja of the chat model beside it, or give {"text": "..."}',
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates raise what they like
        why = [*str(error).splitlines(), type(error).__name__][0]
        raise DataError(
            f"{where}: the chat template refuses the conversation: {why[:120]}",
            'messages are [{"role": "user", "content": "..."}, ...]',
        ) from error
