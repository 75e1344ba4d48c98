"""transformers' own classes and configurations, without advice and progress bars."""

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
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging as transformers_logging

from moeprune.errors import UnsupportedModelError
from moeprune.models import quirks
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.sanity import refuse_absurd

GENERATED_MODULE = "modeling_moeprune"
"""The module that checkpoints of moeprune name in ``auto_map``."""


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
    trust = checkpoint.trust_remote_code
    kind = str(checkpoint.config.get("model_type", "without model_type"))
    where = f"{checkpoint.path} (model {kind[:80]!r})"
    own_code = isinstance(checkpoint.config.get("auto_map"), dict)
    if own_code and not trust and not knows_type(kind):
        raise _needs_its_own_code(where, kind)
    refuse_absurd(checkpoint)
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust)
    except Exception as error:  # whatever a configuration class makes of what it is given
        hint = first_line(error)
        raise UnsupportedModelError(
            f"transformers cannot read the configuration of {where}", hint
        ) from error


def _needs_its_own_code(what: str, kind: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"transformers {transformers.__version__} has no class of its own for {what}; "
        "code that comes with a checkpoint is not run",
        quirks.ONLY_WITH_OWN_CODE.get(kind, "")
        or "if you trust that code, read it and add --trust-remote-code",
    )


def first_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:200])


def remote_class(checkpoint: Checkpoint, config: Any) -> Any | None:
    """The class in the checkpoint's own files, if it names one and they may run.

    Files that moeprune generated never run from a checkpoint: anyone could have changed them, and
    the package has the same classes.

    Raises:
        UnsupportedModelError: the files cannot be loaded.
    """
    names = getattr(config, "auto_map", None)
    name = names.get("AutoModelForCausalLM") if isinstance(names, dict) else None
    ours = str(name).startswith(f"{GENERATED_MODULE}.")
    if name is None or ours or not checkpoint.trust_remote_code:
        return None
    try:
        return get_class_from_dynamic_module(name, str(checkpoint.path))
    except Exception as error:  # whatever that code raises
        raise UnsupportedModelError(
            f"the code that {checkpoint.path} brings cannot be loaded ({str(name)[:80]!r})",
            first_line(error),
        ) from error


def model_class(checkpoint: Checkpoint, config: Any) -> Any:
    """The class of a checkpoint: its own, if that may run, or transformers'.

    Raises:
        UnsupportedModelError: there is none.
    """
    return remote_class(checkpoint, config) or native_class(config)


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
    names = config.architectures if isinstance(config.architectures, list) else []
    named = [cls for cls in classes if cls.__name__ in names]
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
