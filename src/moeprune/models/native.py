"""transformers' own classes and configurations, without advice, progress bars or remote code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)
from transformers.utils import logging as transformers_logging

from moeprune.errors import UnsupportedModelError
from moeprune.models import quirks
from moeprune.models.checkpoint import Checkpoint


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
    """The transformers configuration of a checkpoint; remote code never runs.

    Raises:
        UnsupportedModelError: transformers does not know the architecture.
    """
    try:
        return AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError) as error:
        kind = checkpoint.config.get("model_type", "without model_type")
        if "auto_map" in checkpoint.config and kind not in list(CONFIG_MAPPING):
            raise _needs_its_own_code(f"{checkpoint.path} (model {kind!r})", str(kind)) from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModelError(
            f"transformers cannot read the configuration of {checkpoint.path} (model {kind!r})",
            first[:200],
        ) from error


def _needs_its_own_code(what: str, kind: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"transformers {transformers.__version__} has no class of its own for {what}; "
        "code that comes with a checkpoint is not run",
        quirks.ONLY_WITH_OWN_CODE.get(kind, "use a checkpoint of a type that transformers has"),
    )


def native_class(config: Any) -> Any:
    """transformers' own class for a language model of this configuration.

    A configuration with parts for vision or audio gets the class that has those towers as well,
    unless ``architectures`` names the language model alone.

    Raises:
        UnsupportedModelError: there is none.
    """
    mappings = (AutoModelForMultimodalLM._model_mapping, AutoModelForCausalLM._model_mapping)
    found = [mapping.get(type(config), None) for mapping in mappings]
    classes = [cls[0] if isinstance(cls, (list, tuple)) else cls for cls in found if cls]
    if not classes and getattr(config, "auto_map", None):
        raise _needs_its_own_code(f"a language model of type {config.model_type!r}", "")
    if not classes:
        raise UnsupportedModelError(f"{config.model_type} is not a causal language model")
    named = [cls for cls in classes if cls.__name__ in (config.architectures or ())]
    return (named or classes)[0]


def auto_classes(cls: type[Any]) -> list[str]:
    """The names of transformers' auto classes that open checkpoints of ``cls``."""
    return [
        auto.__name__
        for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
        if auto._model_mapping.get(cls.config_class, None) is cls
    ]


def text_config(config: Any) -> Any:
    """The language model's part of a configuration."""
    return config.get_text_config()


def knows_type(model_type: Any) -> bool:
    """Whether transformers has a configuration of that ``model_type``."""
    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def knows_class(name: str) -> bool:
    """Whether transformers has a model class of that name."""
    return isinstance(getattr(transformers, name, None), type)
