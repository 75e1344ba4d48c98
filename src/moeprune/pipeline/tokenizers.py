"""Two models are compared token by token, so both have to read the same tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moeprune.errors import DataError
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.data import load_tokenizer

SAMPLE = (
    "The quick brown fox, 12 × 345 = 4140.",
    "Größe, élève, señor, żółw; Привет, мир! 你好，世界 – こんにちは",
    "def f(x):\n    return {'a': [x ** 2, None]}\n\n\t# tabs\r\n",
    "  two  spaces, CamelCase_and_snake 🙂\u200d",
)
_HINT = "give --teacher the model that this one was made from, or copy its tokenizer files"


def refuse_other_tokenizer(
    model: Checkpoint, teacher: Checkpoint, texts: Iterable[str] = SAMPLE
) -> None:
    """Raise unless both tokenizers agree.

    No id may name another token, and the texts must become the same ids. Tokens that only one of
    them has (added later) do no harm as long as no text contains them.

    Raises:
        DataError: a tokenizer is missing, or they differ; the message shows where.
    """
    if model.path == teacher.path:
        return
    one, two = load_tokenizer(model), load_tokenizer(teacher)
    clash = _clash(one, two)
    if clash is not None:
        index, mine, other = clash
        raise DataError(
            f"teacher and student have different tokenizers: token {index} is {other!r} to the "
            f"teacher and {mine!r} to the student",
            _HINT,
        )
    if _start(one) != _start(two):
        raise DataError(
            f"teacher and student have different tokenizers: text starts with {_start(two)!r} for "
            f"the teacher and with {_start(one)!r} for the student",
            _HINT,
        )
    for text in texts:
        mine, other = _ids(one, text), _ids(two, text)
        if mine != other:
            raise DataError(
                f"teacher and student have different tokenizers: {text[:24]!r} becomes "
                f"{len(other)} tokens for the teacher and {len(mine)} others for the student",
                _HINT,
            )


def _clash(one: Any, two: Any) -> tuple[int, str, str] | None:
    """The first id that names different tokens."""
    mine = {index: token for token, index in one.get_vocab().items()}
    other = {index: token for token, index in two.get_vocab().items()}
    both = mine.keys() & other.keys()
    index = min((index for index in both if mine[index] != other[index]), default=None)
    return None if index is None else (index, mine[index], other[index])


def _start(tokenizer: Any) -> Any:
    return tokenizer.eos_token if tokenizer.bos_token is None else tokenizer.bos_token


def _ids(tokenizer: Any, text: str) -> Any:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
