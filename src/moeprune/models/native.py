"""transformers' own classes and configurations, without advice and progress bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from moeprune.errors import UnsupportedModelError
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.sanity import refuse_absurd


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No advice and no progress bars from transformers: both would be one per layer."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def read_config(checkpoint: Checkpoint) -> Any:
    """The transformers configuration of a checkpoint.

    Remote code runs only if the checkpoint was opened with ``trust_remote_code``.

    Raises:
        CheckpointError: its numbers cannot be those of the checkpoint.
        UnsupportedModelError: transformers does not know the architecture.
    """
    refuse_absurd(checkpoint)
    trust = checkpoint.trust_remote_code
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust)
    except Exception as error:  # whatever a configuration class makes of what it is given
        kind = str(checkpoint.config.get("model_type", "without model_type"))
        hint = first_line(error)
        if not trust and isinstance(checkpoint.config.get("auto_map"), dict):
            hint = "it brings its own code: if you trust that, read it and add --trust-remote-code"
        where = f"{checkpoint.path} (model {kind[:80]!r})"
        raise UnsupportedModelError(
            f"transformers cannot read the configuration of {where}", hint
        ) from error


def first_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:200])


def native_class(config: Any) -> Any:
    """transformers' own class for a causal language model of this configuration."""
    cls = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if cls is None:
        raise UnsupportedModelError(f"{config.model_type} is not a causal language model")
    return cls[0] if isinstance(cls, (list, tuple)) else cls


def text_config(config: Any) -> Any:
    """The language model's part of a configuration."""
    return config.get_text_config()
