"""Refuses a config.json that cannot be of its checkpoint, before anything is built from it.

Configuration classes make lists as long as the model has layers, and models make tables as wide as
a head: ten digits in a text file would cost hours or all memory. What is stored on disk bounds what
may be asked for. Sizes that are merely wrong are found later, when weights do not fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from moeprune.errors import CheckpointError, UnsupportedModelError
from moeprune.models import quirks
from moeprune.models.checkpoint import Checkpoint

MOST_LAYERS = 1000
MOST_EXPERTS = 1 << 14
_LEAST_BOUND = 1 << 13
_LEAST_LAYERS = 64
_LARGEST = 1 << 40
_LARGEST_ALONE = 1 << 20
_SQUARED = {"block_size": 512}
"""What some models keep tables of this size squared for, in every layer."""
_LAYERS = re.compile(r"(num|n)_(\w+_)?layers?")
_NO_SIZE = re.compile(
    r"position|theta|token|(?<![a-z])(id|ids|seed|base|version|window|budget|floor)(?![a-z])"
    r"|length|seq|ctx|context|chunk|scale|scaling|factor|label",
    re.IGNORECASE,
)
"""Names of numbers that no tensor is as large as."""


def refuse_absurd(checkpoint: Checkpoint) -> None:
    """Raise unless the numbers of config.json are of the order of what is stored.

    Raises:
        CheckpointError: more layers than tensors, more experts than the stored values could be the
            routers of, a size larger than any axis of any tensor; the message names the key.
        UnsupportedModelError: it asks for another configuration file, or for code from elsewhere.
    """
    config = checkpoint.config
    if "configuration_files" in config:
        raise UnsupportedModelError(
            f"{checkpoint.path}/config.json refers to other configuration files",
            "put the one for this version of transformers in its place",
        )
    tensors = checkpoint.tensors
    axes = {size for info in tensors.values() for size in info.shape}
    layers, size = (
        min(MOST_LAYERS, max(_LEAST_LAYERS, len(tensors))),
        max(_LEAST_BOUND, max(axes, default=0)),
    )
    if not tensors:  # config.json alone
        layers, size = MOST_LAYERS, _LARGEST_ALONE
    for key, value in _leaves(config):
        _refuse_code(checkpoint, key, value)
        _refuse_share(checkpoint, key, value)
        if isinstance(value, int) and abs(value) > (most := _most(key, layers, size)):
            _refuse(checkpoint, key, value, f"at most {most} fits what is stored")
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            _check_together(checkpoint, part, axes)


def _most(key: str, layers: int, size: int) -> int:
    """The largest number that may stand under ``key``."""
    if _LAYERS.fullmatch(key):
        return layers
    if key in quirks.EXPERT_COUNT_KEYS or key in quirks.TOP_K_KEYS:
        return min(MOST_EXPERTS, size)
    return _LARGEST if _NO_SIZE.search(key) else _SQUARED.get(key, size)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All values with the name that they, or the list they are in, stand under."""
    waiting = [(key, value)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, part) for part in value]
        else:
            yield key, value


def _refuse_code(checkpoint: Checkpoint, key: str, value: Any) -> None:
    """transformers fetches and runs what it takes for the name of a kernel on the hub."""
    if isinstance(value, str) and key.endswith("_implementation") and re.search("[/:]", value):
        raise UnsupportedModelError(
            f"{checkpoint.path}/config.json asks for code from elsewhere: {key} = {value[:80]!r}",
            f"remove {key} from it",
        )


def _refuse_share(checkpoint: Checkpoint, key: str, value: Any) -> None:
    """The only number that is no integer and becomes a size; a text would be repeated instead."""
    fits = value is None or (isinstance(value, (int, float)) and 0 <= value <= 1)
    if key.startswith("partial_rotary") and not fits:
        _refuse(checkpoint, key, value, "it is a share of a head's width")


def _check_together(checkpoint: Checkpoint, part: dict[str, Any], axes: set[int]) -> None:
    hidden = part.get("hidden_size")
    for key in ("hidden_size", "vocab_size"):
        size = part.get(key)
        if axes and type(size) is int and size not in axes:
            _refuse(checkpoint, key, size, "no tensor has an axis of that length")
    experts = [part[key] for key in quirks.EXPERT_COUNT_KEYS if type(part.get(key)) is int]
    if experts and type(hidden) is int and max(experts) * hidden > checkpoint.numel > 0:
        key = next(key for key in quirks.EXPERT_COUNT_KEYS if part.get(key) == max(experts))
        _refuse(checkpoint, key, max(experts), "their router would be larger than the checkpoint")


def _refuse(checkpoint: Checkpoint, key: str, value: object, why: str) -> None:
    large = isinstance(value, int) and abs(value) >= 10**18
    shown = "a number of more than 18 digits" if large else f"{value!r}"[:80]
    raise CheckpointError(
        f"{checkpoint.path}/config.json: {key[:80]!r} is {shown}, but {why}",
        "the checkpoint and its config.json do not belong together",
    )
